"""What `ray job submit -- python jobs/evaluate.py --config jobs/evaluate.yaml` runs; the same as `medvision evaluate`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("evaluate")
