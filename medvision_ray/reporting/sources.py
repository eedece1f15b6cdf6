"""What reports are made of: rows of the tables, histories, evaluated images and comparisons, read from where jobs wrote them."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import listing, storage, tables
from medvision_ray.bundle import Bundle
from medvision_ray.reporting.figures import Scored

DRIFT = "drift"
"""`subgroup` of metric rows that say how a run differs from the training; they are no evaluation."""


def rows_of(output: str, bundle: Bundle, name: str) -> pd.DataFrame | None:
    """A model's rows of a table; None where there are none."""
    rows = tables.read(output, name, None, pads.field("model_id") == bundle.model_id)
    return None if rows is None or rows.num_rows == 0 else rows.to_pandas()


def evaluation_metrics(output: str, bundle: Bundle) -> pd.DataFrame | None:
    """Of each dataset and split the newest measurement, the newest of all first."""
    frame = rows_of(output, bundle, "metrics")
    if frame is None:
        return None
    frame = frame[(frame["subgroup"] != DRIFT) & frame["split"].notna()]
    newest = frame.groupby(["dataset", "split"])["measured_at"].transform("max")
    kept = frame[frame["measured_at"] == newest].sort_values("measured_at", ascending=False, kind="stable")
    return kept.rename(columns={"class": "class_name"})


def history(output: str, bundle: Bundle) -> pd.DataFrame | None:
    """A row per epoch of the training of that name."""
    place = storage.join(output, "training", bundle.name, "metrics.jsonl")
    if not storage.exists(place):
        return None
    lines = storage.read_bytes(place).decode().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines if line.strip()])


def runs(output: str, bundle: Bundle) -> pd.DataFrame | None:
    """Rows of the model's runs, without those of servers (`serve --record`): there each commit is one, up to one a second."""
    frame = rows_of(output, bundle, "runs")
    return None if frame is None else frame[frame["job"] != "serve"]


def run_of(output: str, bundle: Bundle, run_key: str | None) -> dict[str, Any] | None:
    """The row of a scoring run: the named one, else the one that finished last."""
    frame = rows_of(output, bundle, "runs")
    if frame is None:
        return None
    found = frame[frame["run_key"] == run_key] if run_key is not None else frame[frame["job"] == "score"]
    if found.empty:
        return None
    return {str(key): value for key, value in found.sort_values("finished_at").iloc[-1].items()}


def run_rows(
    output: str, bundle: Bundle, name: str, run_key: str, columns: list[str] | None = None
) -> pd.DataFrame | None:
    """A run's rows of a table; None where there is no table."""
    condition = (pads.field("model_id") == bundle.model_id) & (pads.field("run_key") == run_key)
    rows = tables.read(output, name, columns, condition)
    return None if rows is None else rows.to_pandas()


def details(output: str, bundle: Bundle, dataset: str, split: str) -> pd.DataFrame | None:
    """Truth and prediction of the evaluated images of a dataset and split."""
    place = storage.join(output, "evaluations", bundle.model_id, f"{dataset}-{split}.parquet")
    if not storage.exists(place):
        return None
    frame: pd.DataFrame = pq.read_table(io.BytesIO(storage.read_bytes(place))).to_pandas()
    return frame


def out_of_fold(output: str, bundle: Bundle) -> pd.DataFrame | None:
    """Truth and prediction of a cross-validation's images, those that were scored; None where this is no ensemble of one."""
    place = _of_training(output, bundle, "out_of_fold.parquet")
    if place is None:
        return None
    frame: pd.DataFrame = pq.read_table(io.BytesIO(storage.read_bytes(place))).to_pandas()
    if not set(frame["model_id"].dropna()) <= {member.model_id for member in bundle.members}:
        return None  # another cross-validation of the same name
    return frame[frame["error_code"].isna()].reset_index(drop=True)


def folds(output: str, bundle: Bundle) -> dict[str, Any] | None:
    """What a cross-validation says of its folds; None where this is no ensemble of one."""
    place = _of_training(output, bundle, "folds.json")
    if place is None:
        return None
    found: dict[str, Any] = json.loads(storage.read_bytes(place))
    same = [row["model_id"] for row in found["folds"]] == [member.model_id for member in bundle.members]
    return found if same else None


def _of_training(output: str, bundle: Bundle, name: str) -> str | None:
    place = storage.join(output, "training", bundle.name, name)
    return place if bundle.members and storage.exists(place) else None


def comparisons(output: str, bundle: Bundle, baseline: Bundle) -> list[dict[str, Any]]:
    """What the compare job wrote of two models, test splits first."""
    folder = storage.join(output, "comparisons", f"{bundle.model_id}-against-{baseline.model_id}")
    found = sorted(_files(folder, ".json"), key=lambda uri: (not uri.endswith("-test.json"), uri))
    return [json.loads(storage.read_bytes(uri)) for uri in found]


def scored_of(bundle: Bundle, frame: pd.DataFrame) -> tuple[Scored, NDArray[np.integer] | None]:
    """Labelled predictions out of evaluated images, and the predicted classes of single-label ones."""
    columns = tables.probability_columns(bundle.classes)
    calibrated = ["c_" + name.removeprefix("p_") for name in columns]
    has_calibrated = all(name in frame for name in calibrated) and bool(frame[calibrated].notna().to_numpy().any())
    points = {
        point.name: np.array([np.nan if one is None else one.threshold for one in point.thresholds])
        for point in getattr(bundle, "operating_points", ())
    }
    if bundle.multi_label:
        points = {"the bundle's thresholds": np.asarray(bundle.thresholds), **points}
        blank = pd.Series(np.nan, frame.index)
        labels = np.stack([frame.get(f"t_{name}", blank) for name in bundle.classes], axis=1).astype(float)
        predicted = None
    else:
        index = {name: place for place, name in enumerate(bundle.classes)}
        labels = frame["true_label"].map(index).fillna(-1).to_numpy(np.int64)
        predicted = frame["predicted_label"].map(index).to_numpy(np.int64)
    scored = Scored(
        labels=labels,
        probabilities=frame[columns].to_numpy(np.float64),
        classes=bundle.classes,
        calibrated=frame[calibrated].to_numpy(np.float64) if has_calibrated else None,
        patients=frame["patient_number"].to_numpy(np.int64) if "patient_number" in frame else None,
        points=points,
        decided=predicted,
    )
    return scored, predicted


def mask_share(frame: pd.DataFrame) -> NDArray[np.float64] | None:
    """The true mask's share of each image; None where the evaluation does not have it."""
    if "true_mask_fraction" not in frame:
        return None
    share: NDArray[np.float64] = frame["true_mask_fraction"].to_numpy(np.float64)
    return share


def _files(folder: str, ending: str) -> list[str]:
    if not storage.exists(folder):
        return []
    return sorted(item.uri for item in listing.list_objects(folder) if item.path.endswith(ending))
