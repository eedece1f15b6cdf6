"""Columns of every table, and how each is partitioned."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from medvision_ray.config import HEADER_FIELDS
from medvision_ray.errors import LabelError

TIMESTAMP = pa.timestamp("us", tz="UTC")
PROBABILITY = pa.float32()
PROBABILITY_PREFIXES = ("p_", "c_")
"""Of the columns that hold a class's raw and calibrated probabilities."""
_STAGES = ("list", "read", "decode", "preprocess", "predict", "write")

_RUN_COLUMNS = [
    pa.field("run_key", pa.string()),
    pa.field("run_date", pa.date32()),
    pa.field("model_id", pa.string()),
]
_OBJECT_COLUMNS = [
    pa.field("image_id", pa.int64()),
    pa.field("uri", pa.string()),
    pa.field("etag", pa.string()),
]
_MASK_COLUMNS = [
    pa.field("mask_fraction", pa.float64()),
    pa.field("mask_area_mm2", pa.float64()),
    pa.field("mask_box", pa.list_(pa.int32())),
    pa.field("mask", pa.binary()),
]
HEADER_COLUMNS = [
    *[pa.field(name, pa.float64() if name in ("kvp", "slice_thickness_mm") else pa.string()) for name in HEADER_FIELDS],
    pa.field("study_date", pa.date32()),
    pa.field("may_contain_text", pa.bool_()),
]
"""Of the header, what the site's `privacy` lets in; null where it does not, or the header says nothing usable."""
INPUT_STATISTICS = [pa.field(f"input_{name}", pa.float64()) for name in ("mean", "sd", "p05", "p50", "p95")]
"""Brightness of the prepared input (`imaging.intensity`), by which drift is told."""
FRAME = pa.struct(
    [
        pa.field("frame", pa.int32()),
        pa.field("predicted_label", pa.string()),
        pa.field("predicted_probability", pa.float32()),
        pa.field("probabilities", pa.list_(pa.float32())),
        *_MASK_COLUMNS,
        # From here on: null in rows of earlier versions.
        pa.field("calibrated", pa.list_(pa.float32())),
    ]
)

FAILURES = pa.schema(
    [
        *_RUN_COLUMNS,
        *_OBJECT_COLUMNS,
        pa.field("stage", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("failed_at", TIMESTAMP),
    ]
)
METRICS = pa.schema(
    [
        pa.field("run_key", pa.string()),
        pa.field("model_id", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("subgroup", pa.string()),
        pa.field("class", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("n_images", pa.int64()),
        pa.field("n_patients", pa.int64()),
        pa.field("measured_at", TIMESTAMP),
        # From here on: null in rows of earlier versions (LATER).
        pa.field("subgroup_value", pa.string()),
    ]
)
RUNS = pa.schema(
    [
        pa.field("run_key", pa.string()),
        pa.field("job", pa.string()),
        pa.field("model_id", pa.string()),
        pa.field("archive", pa.string()),
        pa.field("config", pa.string()),
        pa.field("versions", pa.string()),
        pa.field("listed", pa.int64()),
        pa.field("excluded", pa.int64()),
        pa.field("already_done", pa.int64()),
        pa.field("scored", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("images_per_second", pa.float64()),
        pa.field("started_at", TIMESTAMP),
        pa.field("finished_at", TIMESTAMP),
        # From here on: null in rows of earlier versions (LATER).
        pa.field("state", pa.string()),
        pa.field("retried", pa.int64()),
        pa.field("not_scored", pa.int64()),
        *[pa.field(f"{stage}_seconds", pa.float64()) for stage in _STAGES],
        pa.field("bytes_read", pa.int64()),
        pa.field("peak_memory_bytes", pa.int64()),
    ]
)
TABLES = ("predictions", "failures", "metrics", "runs")
PARTITIONS = {"predictions": ["model_id", "run_date"], "failures": [], "metrics": [], "runs": []}
LATER = {
    "metrics": frozenset({"subgroup_value"}),
    "runs": frozenset(RUNS.names[RUNS.get_field_index("state") :]),
    "predictions": frozenset(
        ("spacing_source", *(column.name for column in HEADER_COLUMNS), *(column.name for column in INPUT_STATISTICS))
    ),
}
"""Columns that the first version did not write: a table may lack them until the next commit adds them."""


def probability_column(class_name: str) -> str:
    """`p_<class>`; characters that Delta Lake refuses in a column name become `_`."""
    return "p_" + re.sub(r"[\s,;{}()=]", "_", class_name)


def probability_columns(classes: Sequence[str]) -> list[str]:
    """One column a class, in order.

    Raises:
        LabelError: two classes share a column.
    """
    columns = [probability_column(name) for name in classes]
    if len({column.lower() for column in columns}) != len(columns):
        raise LabelError(
            "Expected class names that differ in more than letter case, blanks and punctuation; rename one."
        )
    return columns


def calibrated_columns(classes: Sequence[str]) -> list[str]:
    """`c_<class>`, one column a class, in order; null where the bundle has no calibration of the class.

    Raises:
        LabelError: two classes share a column.
    """
    return ["c_" + column.removeprefix("p_") for column in probability_columns(classes)]


def predictions_schema(classes: Sequence[str]) -> pa.Schema:
    """Columns of the predictions table for a model of these classes.

    `mask_box` is `[top, left, bottom, right)` in source pixels, `mask` the packed bits of that box
    (`scoring.masks`). Row-level mask columns belong to `key_frame`, the frame with the largest mask;
    row-level raw probabilities, `p_<class>`, are means over frames, and calibrated ones, `c_<class>`, are made from them.
    """
    return pa.schema(
        [
            *_RUN_COLUMNS,
            *_OBJECT_COLUMNS,
            pa.field("modality", pa.string()),
            pa.field("patient_key", pa.string()),
            pa.field("study_key", pa.string()),
            pa.field("series_key", pa.string()),
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("frames", pa.int32()),
            pa.field("spacing_mm", pa.list_(pa.float64())),
            pa.field("predicted_label", pa.string()),
            pa.field("predicted_probability", pa.float32()),
            *[pa.field(column, PROBABILITY) for column in probability_columns(classes)],
            pa.field("key_frame", pa.int32()),
            *_MASK_COLUMNS,
            pa.field("frame_results", pa.list_(FRAME)),
            pa.field("preprocess_id", pa.string()),
            pa.field("scored_at", TIMESTAMP),
            # From here on: null in rows of earlier versions (LATER).
            pa.field("spacing_source", pa.string()),
            *HEADER_COLUMNS,
            *[pa.field(column, PROBABILITY) for column in calibrated_columns(classes)],
            *INPUT_STATISTICS,
        ]
    )


def known_schema(name: str) -> pa.Schema:
    """Columns that this version writes to a table whatever the model; for predictions, without `p_<class>` and `c_<class>`."""
    if name == "predictions":
        return predictions_schema(())
    return {"failures": FAILURES, "metrics": METRICS, "runs": RUNS}[name]
