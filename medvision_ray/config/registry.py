"""Every job's configuration by the verb that takes it."""

from __future__ import annotations

from medvision_ray.config.jobs import (
    CompareJob,
    EvaluateJob,
    ExplainJob,
    InventoryJob,
    ReportJob,
    ScoreJob,
    TrainJob,
)
from medvision_ray.config.sections import Section
from medvision_ray.config.serving import ServeJob

JOBS: dict[str, type[Section]] = {
    "inventory": InventoryJob,
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "compare": CompareJob,
    "score": ScoreJob,
    "explain": ExplainJob,
    "report": ReportJob,
    "serve": ServeJob,
}
