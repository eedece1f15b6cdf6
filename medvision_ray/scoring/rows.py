"""Rows of the tables out of predictions: one per object, with nested results per frame."""

from __future__ import annotations

import io
import math
import uuid
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle
from medvision_ray.imaging.intensity import input_statistics
from medvision_ray.operating_points import named_class
from medvision_ray.scoring.masks import EMPTY, EncodedMask, encode_mask

if TYPE_CHECKING:
    from medvision_ray.scoring.objects import Effort, Failure, PreparedObject

SCORED, FAILED = "scored", "failed"
# What an object cost: summed into its run's row when that is published, no columns of the tables.
EFFORT_FIELDS = (
    pa.field("read_seconds", pa.float64()),
    pa.field("decode_seconds", pa.float64()),
    pa.field("preprocess_seconds", pa.float64()),
    pa.field("predict_seconds", pa.float64()),
    pa.field("bytes_read", pa.int64()),
    pa.field("peak_memory_bytes", pa.int64()),
)
_RUN_FIELDS = ("run_key", "run_date", "model_id")


@dataclass(frozen=True)
class FrameResult:
    """What the model says of one frame."""

    probabilities: NDArray[np.float32] | None
    mask: EncodedMask | None


def working_schema(classes: tuple[str, ...]) -> pa.Schema:
    """Columns of a run's working rows: status, those of predictions and failures, and the cost."""
    fields = {"status": pa.field("status", pa.string())}
    for schema in (tables.predictions_schema(classes), tables.FAILURES):
        fields.update({item.name: item for item in schema if item.name not in _RUN_FIELDS})
    return pa.schema([*fields.values(), *EFFORT_FIELDS])


def effort_columns(effort: Effort) -> dict[str, Any]:
    """An object's cost as columns of its working row."""
    return vars(effort)


def frame_result(
    bundle: Bundle, ready: PreparedObject, probabilities: NDArray[np.float32] | None, mask: NDArray[np.float32] | None
) -> FrameResult:
    """One frame's result; the mask goes back to the source's grid.

    Args:
        probabilities: shape `(K,)`.
        mask: lesion probability on the model's grid, shape `(H, W)`.
    """
    if mask is None:
        return FrameResult(probabilities, None)
    # Interpolation never exceeds the largest value, so a map below the threshold is an empty mask.
    empty = bool(mask.max() < bundle.mask_threshold)
    encoded = EMPTY if empty else encode_mask(ready.transform.mask_to_source(mask, bundle.mask_threshold))
    return FrameResult(probabilities, encoded)


def decide(bundle: Bundle, probabilities: NDArray[np.float32] | None) -> tuple[str | None, float | None]:
    """Label and its probability: the likeliest class (with the bundle's offsets), or each finding over its threshold joined by `|`."""
    if probabilities is None:
        return None, None
    if not bundle.multi_label:
        best = int(named_class(probabilities, bundle.class_offsets))
        return bundle.classes[best], float(probabilities[best])
    thresholds = np.asarray(bundle.thresholds, probabilities.dtype)
    present = [name for name, on in zip(bundle.classes, probabilities >= thresholds, strict=True) if on]
    return "|".join(present), float(probabilities.max())


def scored_row(
    bundle: Bundle,
    entry: dict[str, Any],
    ready: PreparedObject,
    frames: list[FrameResult],
    *,
    preprocess_id: str,
    save_masks: bool,
) -> dict[str, Any]:
    """The row of an object that was scored."""
    each = [frame.probabilities for frame in frames if frame.probabilities is not None]
    probabilities: NDArray[np.float32] | None = None
    if each:
        probabilities = np.stack(each).mean(axis=0, dtype=np.float64).astype(np.float32)
    label, probability = decide(bundle, probabilities)
    calibrated = _calibrated(bundle, each) if len(frames) > 1 else []
    key_frame = max(range(len(frames)), key=lambda i: frames[i].mask.pixels if frames[i].mask else 0)  # type: ignore[union-attr]
    rows, columns = ready.transform.source_shape
    nested = (
        [
            {**_frame_row(bundle, ready, i, frame, save_masks), "calibrated": calibrated[i] if calibrated else None}
            for i, frame in enumerate(frames)
        ]
        if len(frames) > 1
        else []
    )
    row = {
        "status": SCORED,
        "image_id": entry["image_id"],
        "uri": entry["uri"],
        "etag": entry["etag"],
        "modality": ready.modality,
        "patient_key": ready.keys.patient_key,
        "study_key": ready.keys.study_key,
        "series_key": ready.keys.series_key,
        "height": rows,
        "width": columns,
        "frames": len(frames),
        "spacing_mm": list(ready.spacing_mm) if ready.spacing_mm else None,
        "spacing_source": ready.spacing_source.value,
        "predicted_label": label,
        "predicted_probability": probability,
        "key_frame": key_frame,
        **_mask_columns(ready, frames[key_frame].mask, save_masks),
        "frame_results": nested,
        "preprocess_id": preprocess_id,
        "scored_at": datetime.now(timezone.utc),
        **_header_columns(ready),
        **input_statistics(ready.pixels),
    }
    if probabilities is not None:
        row.update(zip(tables.probability_columns(bundle.classes), probabilities.tolist(), strict=True))
        for values in _calibrated(bundle, [probabilities]):
            row.update(zip(tables.calibrated_columns(bundle.classes), values, strict=True))
    return row


def failed_row(entry: dict[str, Any], failure: Failure, attempts: int = 1) -> dict[str, Any]:
    """The row of an object that failed."""
    return {
        "status": FAILED,
        "image_id": entry["image_id"],
        "uri": entry["uri"],
        "etag": entry["etag"],
        "stage": failure.stage,
        "error_code": failure.error_code,
        "error": failure.error,
        "attempts": attempts,
        "failed_at": datetime.now(timezone.utc),
    }


def to_table(rows: list[dict[str, Any]], classes: tuple[str, ...]) -> pa.Table:
    """Rows as Arrow with the explicit schema (an all-null column would otherwise lose its type)."""
    return pa.Table.from_pylist(rows, schema=working_schema(classes))


def write_rows(rows: pa.Table, run_folder: str) -> None:
    """Write a block's rows as one file of the run, whole or not at all, under a name of its own."""
    if rows.num_rows:
        sink = io.BytesIO()
        pq.write_table(rows, sink)
        name = f"{rows['image_id'][0].as_py()}-{uuid.uuid4().hex[:12]}.parquet"
        storage.write_bytes(storage.join(run_folder, "rows", name), sink.getvalue())


def _mask_columns(ready: PreparedObject, mask: EncodedMask | None, save: bool) -> dict[str, Any]:
    if mask is None:
        return {"mask_fraction": None, "mask_area_mm2": None, "mask_box": None, "mask": None}
    spacing = ready.spacing_mm if ready.spacing_source.true_in_patient else None
    area = mask.pixels * spacing[0] * spacing[1] if spacing else None
    box = list(mask.box) if mask.box else None
    return {"mask_fraction": mask.fraction, "mask_area_mm2": area, "mask_box": box, "mask": mask.data if save else None}


def _header_columns(ready: PreparedObject) -> dict[str, Any]:
    day = ready.header.study_date
    return {**vars(ready.header), "study_date": date.fromisoformat(day) if day else None}


def _calibrated(bundle: Bundle, raw: list[NDArray[np.float32]]) -> list[list[float | None]]:
    """Calibrated probabilities of each of `raw`, None for a class without; nothing where the bundle has no calibration."""
    if bundle.calibration is None or not raw:
        return []
    values = bundle.calibration.apply(np.stack(raw)).astype(np.float32).tolist()
    return [[None if math.isnan(value) else value for value in row] for row in values]


def _frame_row(bundle: Bundle, ready: PreparedObject, index: int, frame: FrameResult, save: bool) -> dict[str, Any]:
    label, probability = decide(bundle, frame.probabilities)
    return {
        "frame": index,
        "predicted_label": label,
        "predicted_probability": probability,
        "probabilities": frame.probabilities.tolist() if frame.probabilities is not None else None,
        **_mask_columns(ready, frame.mask, save),
    }
