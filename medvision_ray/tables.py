"""The schema of every table, and the one function that commits rows to it.

Tables are Delta Lake tables (Parquet files and a transaction log): a reader sees a whole commit or
nothing. Each commit carries an application transaction named by its run, so doing it twice is a no-op.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from medvision_ray import storage
from medvision_ray.errors import LabelError, MedVisionError

TIMESTAMP = pa.timestamp("us", tz="UTC")
_TARGET_FILE_BYTES = 128 << 20

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
FRAME = pa.struct(
    [
        pa.field("frame", pa.int32()),
        pa.field("predicted_label", pa.string()),
        pa.field("predicted_probability", pa.float32()),
        pa.field("probabilities", pa.list_(pa.float32())),
        *_MASK_COLUMNS,
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
        # Added later; rows of earlier versions read as null here.
        pa.field("state", pa.string()),
        pa.field("retried", pa.int64()),
        pa.field("not_scored", pa.int64()),
        *[
            pa.field(f"{stage}_seconds", pa.float64())
            for stage in ("list", "read", "decode", "preprocess", "predict", "write")
        ],
        pa.field("bytes_read", pa.int64()),
        pa.field("peak_memory_bytes", pa.int64()),
    ]
)
_PARTITIONS = {"predictions": ["model_id", "run_date"], "failures": [], "metrics": [], "runs": []}


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


def predictions_schema(classes: Sequence[str]) -> pa.Schema:
    """Columns of the predictions table for a model of these classes.

    `mask_box` is `[top, left, bottom, right)` in source pixels, `mask` the packed bits of that box
    (`scoring.masks`). Row-level mask columns belong to `key_frame`, the frame with the largest mask;
    row-level probabilities are means over frames.
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
            *[pa.field(column, pa.float32()) for column in probability_columns(classes)],
            pa.field("key_frame", pa.int32()),
            *_MASK_COLUMNS,
            pa.field("frame_results", pa.list_(FRAME)),
            pa.field("preprocess_id", pa.string()),
            pa.field("scored_at", TIMESTAMP),
        ]
    )


def address(output: str, name: str) -> str:
    """Where a table of an output lies: OUTPUT/tables/NAME."""
    return storage.join(output, "tables", name)


def _open(output: str, name: str) -> Any:
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    place = address(output, name)
    try:
        return DeltaTable(storage.table_uri(place), storage_options=storage.table_options(place))
    except TableNotFoundError:
        return None


def is_committed(output: str, name: str, run_key: str) -> bool:
    """Whether a run has committed to this table."""
    table = _open(output, name)
    return table is not None and table.transaction_version(run_key) is not None


def commit(output: str, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], run_key: str) -> bool:
    """Append a run's rows in one commit; False when this run has committed here before.

    Columns that the table lacks are added (older rows read as null).

    Args:
        batches: streamed, so that memory stays bounded.

    Raises:
        MedVisionError: the store refused the commit.
    """
    from deltalake import CommitProperties, Transaction, write_deltalake
    from deltalake.exceptions import DeltaError

    if is_committed(output, name, run_key):
        return False
    place = address(output, name)
    if storage.scheme_of(place) == "file":
        storage.make_folder(place)
    try:
        write_deltalake(
            storage.table_uri(place),
            pa.RecordBatchReader.from_batches(schema, batches),
            mode="append",
            schema_mode="merge",
            partition_by=_PARTITIONS[name] or None,
            target_file_size=_TARGET_FILE_BYTES,
            storage_options=storage.table_options(place),
            commit_properties=CommitProperties(
                custom_metadata={"run_key": run_key}, app_transactions=[Transaction(run_key, 1)]
            ),
        )
    except DeltaError:
        if is_committed(output, name, run_key):  # another process of the same run was first
            return False
        raise MedVisionError(
            f"Expected to commit to the table at {place}, but the store or the table refused."
        ) from None
    return True


def read(
    output: str, name: str, columns: Sequence[str] | None = None, condition: pads.Expression | None = None
) -> pa.Table | None:
    """Rows of a table, or None where there is no table yet.

    Args:
        columns: which columns; None is all.
        condition: a pyarrow expression over columns; rows of other partitions are not read.
    """
    table = _open(output, name)
    if table is None:
        return None
    return table.to_pyarrow_dataset().to_table(columns=list(columns) if columns else None, filter=condition)
