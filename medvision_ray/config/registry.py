"""Every job's configuration by the verb that takes it."""

from __future__ import annotations

from medvision_ray.config.jobs import (
    CalibrateJob,
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
from medvision_ray.config.tuning import TuneJob

JOBS: dict[str, type[Section]] = {
    "inventory": InventoryJob,
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "compare": CompareJob,
    "calibrate": CalibrateJob,
    "score": ScoreJob,
    "explain": ExplainJob,
    "report": ReportJob,
    "serve": ServeJob,
    "tune": TuneJob,
}
