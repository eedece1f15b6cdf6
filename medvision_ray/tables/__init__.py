"""The tables: their columns, whole commits once a run, reading, and upkeep."""

from medvision_ray.tables.delta import address, commit, dataset, is_committed, read
from medvision_ray.tables.erasure import ERASED_FROM, SERIES, PatientRows, erase_rows, erased_rows, rows_of_patients
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
from medvision_ray.tables.shortening import shorten_logs
from medvision_ray.tables.upkeep import Commit, Tidied, Vacuumed, compact, history, tidy, vacuum

__all__ = [
    "ERASED_FROM",
    "FAILURES",
    "FRAME",
    "LATER",
    "METRICS",
    "PROBABILITY_PREFIXES",
    "RUNS",
    "SERIES",
    "TABLES",
    "TIMESTAMP",
    "Commit",
    "PatientRows",
    "Tidied",
    "Vacuumed",
    "address",
    "calibrated_columns",
    "commit",
    "compact",
    "dataset",
    "erase_rows",
    "erased_rows",
    "history",
    "is_committed",
    "known_schema",
    "predictions_schema",
    "probability_column",
    "probability_columns",
    "read",
    "rows_of_patients",
    "shorten_logs",
    "tidy",
    "vacuum",
]
