"""What `ray job submit -- python jobs/evaluate.py --config jobs/evaluate.yaml` runs; the same as `medvision evaluate`."""

import sys

from medvision_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
