"""What `ray job submit -- python jobs/serve.py --config jobs/serve.yaml` runs; the same as `medvision serve`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("serve")
