"""Drawing from a search space: which options of a train job each trial has."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from medvision_ray.config import TrainJob, TuneJob, build_job

_ELSEWHERE = {"on_finish", "logging"}  # of the search as a whole; a webhook would come out masked


def draw_trials(job: TuneJob) -> list[dict[str, Any]]:
    """Value of each option of `job.search` in each trial: equal seeds give equal trials.

    Draws are Ray Tune's: `loguniform` is uniform in the logarithm. Each combination of `grid` values is drawn
    `job.samples` times.
    """
    grids = {key: space["grid"] for key, space in job.search.items() if "grid" in space}
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    rng = np.random.RandomState(job.seed)
    trials: list[dict[str, Any]] = []
    for _ in range(job.samples):
        for combination in combinations:
            drawn = {key: combination[key] if key in combination else _draw(job.search[key], rng) for key in job.search}
            trials.append(drawn)
    return trials


def _draw(space: dict[str, tuple[Any, ...]], rng: np.random.RandomState) -> Any:
    from ray import tune

    kind, values = next(iter(space.items()))
    if kind == "choice":
        return values[int(rng.randint(len(values)))]  # numpy would make an array of lists
    if kind == "randint":
        return int(tune.randint(values[0], values[1] + 1).sample(random_state=rng))
    sampler = tune.loguniform if kind == "loguniform" else tune.uniform
    return float(sampler(float(values[0]), float(values[1])).sample(random_state=rng))


def trial_job(base: TrainJob, values: dict[str, Any], what: str) -> TrainJob:
    """A train job with some options set.

    Args:
        values: by the dotted name of the option.
        what: names the trial in errors.

    Raises:
        ConfigError: there is no such option, or the train job does not take the value.
    """
    data = base.model_dump(mode="json", exclude=_ELSEWHERE)
    for key, value in values.items():
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            child = node.get(parent)
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[last] = list(value) if isinstance(value, tuple) else value
    return build_job(TrainJob, data, what)
