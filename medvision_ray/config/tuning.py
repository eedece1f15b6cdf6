"""The tune job: which options of a train job vary, how, and when a trial is given up."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from medvision_ray.config.jobs import TrainJob
from medvision_ray.config.sections import Name, Positive, Section, Seed

RANGES = ("choice", "grid", "uniform", "loguniform", "randint")
"""Kinds of search spaces, by Ray Tune's names."""
_UNTUNED = (
    *("output", "name", "labels", "folds", "decode", "max_failure_fraction"),
    *("workers", "use_gpu", "cpus_per_worker", "max_restarts"),
    *("privacy", "ray", "on_finish", "logging"),
)
"""Options of the train job that are no hyperparameters."""


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020): at rungs of epochs the worse trials stop."""

    enabled: bool = True
    """Stop trials early; off, each trains to its end."""
    grace_epochs: Positive = 1
    """Epochs that every trial gets: the first rung."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One trial in so many goes on from a rung, and rungs are so many times further apart."""


class TuneJob(Section):
    """Search for a better configuration of a train job with Ray Tune; the test split is never read."""

    train: TrainJob
    """The train job that is tuned; its `output`, `ray`, `privacy`, `on_finish` and `logging` are this job's too."""
    search: dict[str, dict[str, tuple[Any, ...]]]
    """What varies, such as `learning_rate: {loguniform: [1e-4, 3e-3]}`: choice, grid, uniform, loguniform or randint (both ends)."""
    samples: Positive = 8
    """Trials; where there are `grid`s, as many for each combination of their values."""
    asha: AshaConfig = AshaConfig()
    """When a trial is given up."""
    at_once: Positive | None = None
    """Most trials at a time; null is as many as the cluster has room for."""
    seed: Seed = 0
    """Seed of the draws; each trial trains with the train job's own seed."""
    name: Name | None = None
    """Name of the search; null derives one. The same name resumes."""

    @model_validator(mode="after")
    def _consistent(self) -> TuneJob:
        if self.train.folds:
            raise ValueError("`train.folds` must be 0: tune first, then cross-validate the best")
        if not self.search:
            raise ValueError("`search` names no option")
        for key, space in self.search.items():
            if key.split(".")[0] in _UNTUNED:
                raise ValueError(f"`search.{key}` is no hyperparameter")
            if len(space) != 1 or next(iter(space)) not in RANGES:
                raise ValueError(f"`search.{key}` must have exactly one of {', '.join(RANGES)}")
            kind, values = next(iter(space.items()))
            if problem := _problem(kind, values):
                raise ValueError(f"`search.{key}.{kind}` {problem}")
        return self


def _problem(kind: str, values: tuple[Any, ...]) -> str | None:
    """What is wrong with the values of a search space; None where nothing is."""
    if kind in ("choice", "grid"):
        return None if values else "has no values"
    numbers = int if kind == "randint" else (int, float)
    if len(values) != 2 or not all(isinstance(x, numbers) and not isinstance(x, bool) for x in values):
        return f"must be two {'whole numbers' if kind == 'randint' else 'numbers'}, the lower and the upper end"
    if not values[0] < values[1]:
        return "must have its lower end first"
    return "must be above 0" if kind == "loguniform" and values[0] <= 0 else None
