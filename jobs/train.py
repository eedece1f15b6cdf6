"""What `ray job submit -- python jobs/train.py --config jobs/train.yaml` runs; the same as `medvision train`."""

import sys

from medvision_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
