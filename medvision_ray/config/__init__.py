"""Configuration: one frozen pydantic model per job, YAML in, every option documented."""

from medvision_ray.config.decisions import CalibrationConfig, OperatingPointsConfig
from medvision_ray.config.jobs import (
    AugmentConfig,
    CompareJob,
    EvaluateJob,
    ExplainJob,
    FailureBudget,
    InventoryJob,
    LossConfig,
    ModelConfig,
    ReportJob,
    ScoreJob,
    ScoringConfig,
    TrainJob,
)
from medvision_ray.config.load import build_job, load_job, show_job
from medvision_ray.config.operations import LoggingConfig, OnFinishConfig
from medvision_ray.config.registry import JOBS
from medvision_ray.config.sections import (
    HEADER_FIELDS,
    ArchiveConfig,
    ClaheConfig,
    DecodeConfig,
    LabelsConfig,
    PreprocessConfig,
    PrivacyConfig,
    RayConfig,
    Section,
)

__all__ = [
    "HEADER_FIELDS",
    "JOBS",
    "ArchiveConfig",
    "AugmentConfig",
    "CalibrationConfig",
    "ClaheConfig",
    "CompareJob",
    "DecodeConfig",
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
    "build_job",
    "load_job",
    "show_job",
]
