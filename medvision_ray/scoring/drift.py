"""A scored run held against its model's fingerprint: drift rows for the metrics table, a flag for the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import HEADER_FIELDS, DriftConfig
from medvision_ray.fingerprint import (
    CATEGORIES,
    MASK_FRACTION,
    NUMBERS,
    Drift,
    FeatureDrift,
    Fingerprint,
    Reference,
    drift_of,
)
from medvision_ray.scoring.summary import RunIdentity

if TYPE_CHECKING:
    import pandas as pd

SUBGROUP = "drift"
"""`subgroup` of drift rows; `subgroup_value` is the feature."""

PSI, KS, SHIFTED = "drift_psi", "drift_ks", "drift_shifted"
_SPACINGS = ("row_spacing_mm", "column_spacing_mm")
_READ = ("patient_key", "frames", "spacing_mm", *CATEGORIES, *(name for name in NUMBERS if name not in _SPACINGS))


def judge_drift(
    output: str, bundle: Bundle, identity: RunIdentity, config: DriftConfig, header_fields: tuple[str, ...]
) -> Drift:
    """Compare the predictions of a run with its model's fingerprint and commit the drift rows, once a run.

    Args:
        header_fields: those that `privacy` lets into the tables; the others are null whatever the scanner.
    """
    if bundle.fingerprint is None:
        return Drift(False, "the bundle has no fingerprint; `medvision calibrate` gives it one, as training does")
    frame = _predictions(output, bundle, identity)
    images = 0 if frame is None else len(frame)
    if frame is None or images < config.min_images:
        return Drift(False, f"{images} images are fewer than `drift.min_images` ({config.min_images})")
    found = compare(bundle.fingerprint, frame, config.min_images, header_fields)
    tables.commit(output, "metrics", tables.METRICS, _rows(identity, found).to_batches(), identity.run_key)
    return _judged(found, config)


def read_drift(output: str, run_key: str, config: DriftConfig) -> Drift:
    """What `judge_drift` committed for a run that is published."""
    condition = (pads.field("run_key") == run_key) & (pads.field("subgroup") == SUBGROUP)
    rows = tables.read(output, "metrics", None, condition)
    by_feature: dict[str, dict[str, Any]] = {}
    for row in rows.to_pylist() if rows is not None else []:
        by_feature.setdefault(row["subgroup_value"], row)[row["metric"]] = row["value"]
    if not by_feature:
        return Drift(False, "the run has no drift rows")
    found = [
        FeatureDrift(name, row[PSI], row.get(KS), bool(row[SHIFTED]), row["n_images"], row["n_patients"])
        for name, row in by_feature.items()
    ]
    return _judged(found, config)


def compare(
    fingerprint: Fingerprint, frame: pd.DataFrame, min_images: int, header_fields: tuple[str, ...] = HEADER_FIELDS
) -> list[FeatureDrift]:
    """Drift of every feature that the fingerprint and a run's predictions share.

    Scores are compared over objects of one frame: those of a volume are means and maxima over its frames, and the
    training measured single ones.

    Args:
        frame: a row an image, named as the table's columns; spacings as `row_spacing_mm` and `column_spacing_mm`.
        min_images: a feature of fewer images is left out.
    """
    whole, single = frame, frame[frame["frames"] == 1]
    patients = {id(rows): _patients(rows) for rows in (whole, single)}
    found = []
    for name, reference in fingerprint.features.items():
        if name not in frame or (name in HEADER_FIELDS and name not in header_fields):
            continue
        rows = single if _is_score(name) else whole
        if len(rows) >= min_images and not (_is_score(name) and rows[name].isna().all()):
            found.append(drift_of(name, reference, _values(rows[name], reference), patients[id(rows)]))
    return found


def _is_score(name: str) -> bool:
    return name.startswith("p_") or name == MASK_FRACTION


def _values(column: pd.Series[Any], reference: Reference) -> Sequence[Any] | NDArray[np.float64]:
    if reference.kind == "number":
        return column.to_numpy(np.float64, na_value=np.nan)
    return [value if isinstance(value, str) else None for value in column.to_numpy(object)]


def _patients(rows: pd.DataFrame) -> int:
    """Different patients; an image of an unknown one counts as its own."""
    known = rows["patient_key"].dropna()
    return int(known.nunique()) + len(rows) - len(known)


def _predictions(output: str, bundle: Bundle, identity: RunIdentity) -> pd.DataFrame | None:
    scores = [*tables.probability_columns(bundle.classes), MASK_FRACTION]
    condition = (
        (pads.field("model_id") == identity.model_id)
        & (pads.field("run_date") == identity.started_at.date())
        & (pads.field("run_key") == identity.run_key)
    )
    rows = tables.read(output, "predictions", [*_READ, *scores], condition)
    if rows is None:
        return None
    frame: pd.DataFrame = rows.to_pandas()
    for place, name in enumerate(_SPACINGS):
        frame[name] = [None if pair is None else pair[place] for pair in frame["spacing_mm"]]
    return frame


def _judged(found: list[FeatureDrift], config: DriftConfig) -> Drift:
    ordered = tuple(sorted(found, key=lambda item: (-item.psi, item.feature)))
    over = config.max_psi is not None and bool(ordered) and ordered[0].psi > config.max_psi
    shifted = tuple(item.feature for item in ordered if item.shifted)
    return Drift(True, shifted=shifted, features=ordered, over_budget=over)


def _rows(identity: RunIdentity, found: list[FeatureDrift]) -> pa.Table:
    row = partial(_row, identity, datetime.now(timezone.utc))
    rows = []
    for item in found:
        rows += [row(item, PSI, item.psi), row(item, SHIFTED, float(item.shifted))]
        if item.ks is not None:
            rows.append(row(item, KS, item.ks))
    return pa.Table.from_pylist(rows, schema=tables.METRICS)


def _row(
    identity: RunIdentity, measured_at: datetime, item: FeatureDrift, metric: str, value: float
) -> Mapping[str, Any]:
    return {
        "run_key": identity.run_key,
        "model_id": identity.model_id,
        "dataset": identity.archive,
        "split": None,
        "subgroup": SUBGROUP,
        "subgroup_value": item.feature,
        "class": "all",
        "metric": metric,
        "value": value,
        "n_images": item.n_images,
        "n_patients": item.n_patients,
        "measured_at": measured_at,
    }
