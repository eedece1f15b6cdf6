"""The tables: their columns, whole commits once a run, reading, and upkeep."""

from medvision_ray.tables.delta import address, commit, dataset, is_committed, read
from medvision_ray.tables.schema import (
    FAILURES,
    FRAME,
    LATER,
    METRICS,
    PROBABILITY_PREFIXES,
    RUNS,
    TABLES,
    TIMESTAMP,
    calibrated_columns,
    known_schema,
    predictions_schema,
    probability_column,
    probability_columns,
)
from medvision_ray.tables.upkeep import Commit, Tidied, Vacuumed, compact, history, tidy, vacuum

__all__ = [
    "FAILURES",
    "FRAME",
    "LATER",
    "METRICS",
    "PROBABILITY_PREFIXES",
    "RUNS",
    "TABLES",
    "TIMESTAMP",
    "Commit",
    "Tidied",
    "Vacuumed",
    "address",
    "calibrated_columns",
    "commit",
    "compact",
    "dataset",
    "history",
    "is_committed",
    "known_schema",
    "predictions_schema",
    "probability_column",
    "probability_columns",
    "read",
    "tidy",
    "vacuum",
]
