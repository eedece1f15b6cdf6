"""`python jobs/submit.py score --config jobs/score.yaml` runs a job on a cluster; the same as `medvision submit`."""

from medvision_ray.cli import program

if __name__ == "__main__":
    program("submit")
