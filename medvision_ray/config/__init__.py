"""Configuration: one frozen pydantic model per job, YAML in, every option documented."""

from medvision_ray.config.decisions import CalibrationConfig, OperatingPointsConfig
from medvision_ray.config.jobs import (
    CalibrateJob,
    CompareJob,
    EvaluateJob,
    ExplainJob,
    FailureBudget,
    InventoryJob,
    ReportJob,
    ScoreJob,
    ScoringConfig,
    TrainJob,
)
from medvision_ray.config.load import build_job, load_job, read_yaml, show_job
from medvision_ray.config.network import AugmentConfig, LossConfig, ModelConfig
from medvision_ray.config.operations import LoggingConfig, OnFinishConfig
from medvision_ray.config.registry import JOBS
from medvision_ray.config.sections import (
    HEADER_FIELDS,
    ArchiveConfig,
    ClaheConfig,
    DecodeConfig,
    DriftConfig,
    LabelsConfig,
    PreprocessConfig,
    PrivacyConfig,
    RayConfig,
    Section,
)
from medvision_ray.config.tuning import AshaConfig, TuneJob

__all__ = [
    "HEADER_FIELDS",
    "JOBS",
    "ArchiveConfig",
    "AshaConfig",
    "AugmentConfig",
    "CalibrateJob",
    "CalibrationConfig",
    "ClaheConfig",
    "CompareJob",
    "DecodeConfig",
    "DriftConfig",
    "EvaluateJob",
    "ExplainJob",
    "FailureBudget",
    "InventoryJob",
    "LabelsConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OnFinishConfig",
    "OperatingPointsConfig",
    "PreprocessConfig",
    "PrivacyConfig",
    "RayConfig",
    "ReportJob",
    "ScoreJob",
    "ScoringConfig",
    "Section",
    "TrainJob",
    "TuneJob",
    "build_job",
    "load_job",
    "read_yaml",
    "show_job",
]
