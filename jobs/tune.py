"""What `ray job submit -- python jobs/tune.py --config jobs/tune.yaml` runs; the same as `medvision tune`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("tune")
