"""One row a study that holds several scored objects, computed from the committed predictions when asked for.

It is a view and no table of its own: rows of a study come from several runs, and what is computed
from the predictions can neither lack nor repeat one of them.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import storage, tables
from medvision_ray.archive.ids import ONLINE
from medvision_ray.bundle import Bundle
from medvision_ray.operating_points import named_class
from medvision_ray.scoring.rows import decide

_COLUMNS = ["study_key", "patient_key", "uri", "image_id", "modality", "frames", "mask_fraction", "scored_at"]


def studies_schema(classes: tuple[str, ...]) -> pa.Schema:
    """Columns of `study_rows`; `objects` counts rows of `predictions`, `volumes` those of several frames among them."""
    return pa.schema(
        [
            pa.field("model_id", pa.string()),
            pa.field("study_key", pa.string()),
            pa.field("patient_key", pa.string()),
            pa.field("objects", pa.int32()),
            pa.field("volumes", pa.int32()),
            pa.field("frames", pa.int32()),
            pa.field("modalities", pa.list_(pa.string())),
            pa.field("predicted_label", pa.string()),
            pa.field("predicted_probability", pa.float32()),
            *[pa.field(column, pa.float32()) for column in tables.probability_columns(classes)],
            pa.field("key_image_id", pa.int64()),
            pa.field("largest_mask_fraction", pa.float64()),
            pa.field("scored_at", tables.TIMESTAMP),
            # From here on: not in files of earlier versions.
            *[pa.field(column, pa.float32()) for column in tables.calibrated_columns(classes)],
        ]
    )


def study_rows(output: str, bundle: Bundle) -> pa.Table:
    """Studies of which this model has scored at least two objects, in order of their key.

    A finding of a multi-label model has the largest probability that any object of the study gives
    it: one series that shows it is enough. The classes of a single-label model have their means over
    objects. `c_<class>` is the calibrated probability of the study's own `p_<class>`, as for an object of several frames;
    of a study's largest probability it is no more than that: the calibration was fitted to single objects. It is null where
    the bundle has no calibration. `key_image_id` is the object that gives the study's likeliest class the most, of a model
    without classes the one with the largest mask. Of an object that was scored again after it
    changed the last row counts. Objects that were sent to a server count nowhere: the archive has them too, or
    they came again. Failures name no study, so a study's row does not tell that one of its objects failed.
    """
    schema = studies_schema(bundle.classes)
    columns = tables.probability_columns(bundle.classes)
    read = tables.read(output, "predictions", [*_COLUMNS, *columns], pads.field("model_id") == bundle.model_id)
    if read is None:
        return schema.empty_table()
    rows = read.to_pandas().dropna(subset=["study_key"]).sort_values(["scored_at", "image_id"])
    rows = rows[~rows["uri"].str.startswith(ONLINE)].drop_duplicates("uri", keep="last").dropna(subset=columns)
    several = rows.groupby("study_key", sort=True).filter(lambda study: len(study) > 1)
    found = [_row(bundle, key, study, columns) for key, study in several.groupby("study_key", sort=True)]
    return pa.Table.from_pylist(found, schema=schema)


def write_studies(output: str, bundle: Bundle, file: str | None = None) -> tuple[str, int]:
    """Write `study_rows` as Parquet.

    Args:
        file: path or URI; None is OUTPUT/reports/MODEL-studies.parquet.

    Returns:
        Where it is and how many studies are in it.
    """
    place = file or storage.join(output, "reports", f"{bundle.model_id}-studies.parquet")
    rows = study_rows(output, bundle)
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    storage.write_bytes(place, sink.getvalue())
    return storage.absolute(place), rows.num_rows


def _row(bundle: Bundle, key: Any, study: pd.DataFrame, columns: list[str]) -> dict[str, Any]:
    each = study[columns].to_numpy(np.float32)
    merged, weights = None, study["mask_fraction"].fillna(0.0).to_numpy()
    if columns:
        merged = each.max(axis=0) if bundle.multi_label else each.mean(axis=0, dtype=np.float64).astype(np.float32)
        weights = each[:, int(named_class(merged, bundle.class_offsets))]
    label, probability = decide(bundle, merged)
    patients = study["patient_key"].dropna().unique()
    return {
        "model_id": bundle.model_id,
        "study_key": key,
        "patient_key": patients[0] if len(patients) == 1 else None,
        "objects": len(study),
        "volumes": int((study["frames"] > 1).sum()),
        "frames": int(study["frames"].sum()),
        "modalities": sorted(study["modality"].dropna().unique()),
        "predicted_label": label,
        "predicted_probability": probability,
        **dict(zip(columns, merged.tolist() if merged is not None else [], strict=True)),
        "key_image_id": int(study["image_id"].iloc[int(weights.argmax())]),
        "largest_mask_fraction": study["mask_fraction"].max() if study["mask_fraction"].notna().any() else None,
        "scored_at": study["scored_at"].max(),
        **_calibrated(bundle, merged),
    }


def _calibrated(bundle: Bundle, merged: NDArray[np.float32] | None) -> dict[str, float | None]:
    if bundle.calibration is None or merged is None:
        return {}
    values = bundle.calibration.apply(merged[None])[0].tolist()
    columns = tables.calibrated_columns(bundle.classes)
    return {name: None if math.isnan(value) else value for name, value in zip(columns, values, strict=True)}
