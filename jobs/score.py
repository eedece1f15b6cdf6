"""What `ray job submit -- python jobs/score.py --config jobs/score.yaml` runs; the same as `medvision score`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("score")
