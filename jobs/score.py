"""What `ray job submit -- python jobs/score.py --config jobs/score.yaml` runs; the same as `medvision score`."""

import sys

from medvision_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
