"""What `ray job submit -- python jobs/train.py --config jobs/train.yaml` runs; the same as `medvision train`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("train")
