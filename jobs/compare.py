"""What `ray job submit -- python jobs/compare.py --config jobs/compare.yaml` runs; the same as `medvision compare`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("compare")
