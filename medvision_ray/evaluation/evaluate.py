"""The evaluate job: metrics of a bundle on one split of a label table, from written prediction rows."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import Inventory, list_uris, only_new
from medvision_ray.bundle import Bundle, image_digest, load_bundle
from medvision_ray.config import EvaluateJob
from medvision_ray.errors import LabelError, MedVisionError
from medvision_ray.evaluation.measure import MetricRow, measure
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.imaging.decode import decode
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.logs import Reporter
from medvision_ray.privacy import Pseudonymiser, address_pseudonymiser
from medvision_ray.scoring.masks import decode_mask
from medvision_ray.scoring.run import RunPlan, execute
from medvision_ray.scoring.summary import RunSummary

_THREADS = 4


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        key: names the evaluation in the metrics table's `run_key`.
        metrics: rows of `measure`, and `failed_images`.
        run: the scoring of images that had no prediction; its budget decides the exit code.
        details_uri: Parquet with one row an image: truth, prediction, probabilities, Dice.
    """

    key: str
    model_id: str
    dataset: str
    split: str
    images: int
    failed: int
    metrics: tuple[MetricRow, ...]
    run: RunSummary
    details_uri: str

    def value(self, metric: str, class_name: str = "all") -> float | None:
        """One metric's value."""
        found = [row.value for row in self.metrics if row.metric == metric and row.class_name == class_name]
        return found[0] if found else None


def evaluate(job: EvaluateJob, say: Reporter) -> Evaluation:
    """Measure a bundle on one split.

    Raises:
        LabelError: the split is empty, was trained on, or its classes are not the bundle's.
        MedVisionError: the images could not be scored.
    """
    bundle = load_bundle(job.bundle)
    table = load_labels(job.labels).select(job.split)
    _check(job, bundle, table)
    dataset = job.dataset or storage.absolute(job.labels.table).rsplit("/", 2)[-2]
    names = address_pseudonymiser(job.privacy)
    listed = list_uris(table.uris, names)
    plan = RunPlan("evaluate", f"{storage.absolute(job.labels.table)}#{job.split}", job)
    run = execute(plan, lambda found: only_new(listed, job.output, found.model_id), say)
    frame = _join(job, bundle, table, listed)
    failed = int(frame["predicted_label"].isna().sum()) if bundle.classes else int(frame["height"].isna().sum())
    say(f"Measuring {len(frame) - failed} of {len(frame)} {job.split} images of {dataset}.")
    scored = frame[frame["height"].notna()].reset_index(drop=True)
    if scored.empty:
        raise MedVisionError(f"Expected predictions for the {job.split} split, but every one of its images failed.")
    samples = _samples(job, bundle, scored)
    rows = (*measure(samples, resamples=job.resamples, seed=job.seed), _failed_row(frame, failed))
    key = _key(job, bundle, dataset, table)
    _commit(job, bundle, dataset, key, rows)
    details = storage.join(job.output, "evaluations", bundle.model_id, f"{dataset}-{job.split}.parquet")
    _write_details(details, bundle, scored, names)
    return Evaluation(key, bundle.model_id, dataset, job.split, len(frame), failed, rows, run, details)


def _check(job: EvaluateJob, bundle: Bundle, table: LabelTable) -> None:
    if not len(table):
        raise LabelError(f"Expected images in the {job.split} split of {job.labels.table}, but it has none.")
    if bundle.classes and table.classes and set(table.classes) - set(bundle.classes):
        raise LabelError(
            f"Expected classes of the bundle ({', '.join(bundle.classes)}) in {job.labels.table}, but it has others too: "
            f"{', '.join(sorted(set(table.classes) - set(bundle.classes)))}."
        )
    trained = set(bundle.train_digest)
    names = address_pseudonymiser(job.privacy)
    if names is None and bundle.trained.get("image_digests") == "hashed":
        raise LabelError(
            f"Expected `privacy.uri: hash` and the key with which {bundle.model_id} was trained: without them nobody can "
            "tell which images it has seen."
        )
    leaked = sum(bool({image_digest(uri), image_digest(uri, names)} & trained) for uri in table.uris)
    if leaked and job.split != "train":
        raise LabelError(
            f"Expected images that {bundle.model_id} has not seen, but {leaked} of {len(table)} in the {job.split} split "
            "were trained on. Use the label table and split settings of the training."
        )


def _join(job: EvaluateJob, bundle: Bundle, table: LabelTable, listed: Inventory) -> pd.DataFrame:
    """One row an image of the split, in its order: truth, and the prediction row or nulls."""
    ids = listed.objects["image_id"]
    condition = (pads.field("model_id") == bundle.model_id) & pads.field("image_id").isin(ids.combine_chunks())
    names = ["image_id", "height", "width", "frames", "key_frame", "mask_box", "mask", "predicted_label"]
    columns = [*names, *tables.probability_columns(bundle.classes)]
    rows = tables.read(job.output, "predictions", columns, condition)
    predictions = rows.to_pandas() if rows is not None else pd.DataFrame(columns=columns)
    frame = pd.DataFrame({"image_id": ids.to_numpy(), "uri": table.uris, "mask_uri": table.masks})
    frame["patient"] = [f"p:{name}" for name in table.patients]
    names_of = np.array([*table.classes, ""], dtype=object)
    frame["true_label"] = names_of[table.labels] if not table.multi_label else ""
    if table.targets is not None:
        for place, name in enumerate(table.classes):
            frame[f"t_{name}"] = table.targets[:, place]
    joined = frame.merge(predictions, on="image_id", how="left", validate="one_to_one")
    return joined


def _samples(job: EvaluateJob, bundle: Bundle, scored: pd.DataFrame) -> EvaluationSamples:
    """Truth and prediction as arrays; masks are compared on each image's own grid."""
    areas = _areas(job, scored) if bundle.architecture.segmentation else None
    overlap, predicted_area, true_area = areas if areas is not None else (None, None, None)
    scored["dice"] = np.nan
    if areas is not None:
        total = areas[1] + areas[2]
        scored["dice"] = np.where(total > 0, 2 * areas[0] / np.where(total > 0, total, 1), np.nan)
    samples = EvaluationSamples(
        classes=bundle.classes or ("lesion",),
        multi_label=bundle.multi_label,
        patients=scored["patient"].to_numpy().astype(str),
        overlap=overlap,
        predicted_area=predicted_area,
        true_area=true_area,
        labels=None if bundle.multi_label else np.full(len(scored), -1),
        targets=np.full((len(scored), len(bundle.classes)), np.nan) if bundle.multi_label else None,
    )
    if not bundle.classes:
        return samples
    probabilities = scored[tables.probability_columns(bundle.classes)].to_numpy(np.float32)
    if bundle.multi_label:
        targets = np.stack([scored.get(f"t_{n}", pd.Series(np.nan, scored.index)) for n in bundle.classes], axis=1)
        thresholds = np.asarray(bundle.thresholds, np.float32)
        return replace(samples, targets=targets.astype(float), probabilities=probabilities, thresholds=thresholds)
    index = {name: place for place, name in enumerate(bundle.classes)}
    labels = scored["true_label"].map(index).fillna(-1).to_numpy(np.int64)
    predicted = scored["predicted_label"].map(index).to_numpy(np.int64)
    return replace(samples, labels=labels, probabilities=probabilities, predicted=predicted)


def _areas(
    job: EvaluateJob, scored: pd.DataFrame
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels in both masks, in the predicted and in the true one; NaN where there is no true mask."""

    def measure_one(row: Any) -> tuple[float, float, float]:
        if not isinstance(row.mask_uri, str) or row.frames != 1:
            return np.nan, np.nan, np.nan
        shape = (int(row.height), int(row.width))
        data = storage.read_bytes(row.mask_uri, max_bytes=job.decode.max_bytes)
        truth = decode(data, job.decode).pixels[0] != 0
        if truth.shape != shape:
            raise LabelError(
                f"Expected a mask of {shape} pixels like its image, but got {truth.shape}; row {row.Index + 2}."
            )
        box = tuple(int(v) for v in row.mask_box) if row.mask_box is not None else None
        predicted = decode_mask(row.mask, box, shape)
        return float((truth & predicted).sum()), float(predicted.sum()), float(truth.sum())

    with ThreadPoolExecutor(_THREADS) as pool:
        found = np.array(list(pool.map(measure_one, scored.itertuples())), dtype=float).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def _failed_row(frame: pd.DataFrame, failed: int) -> MetricRow:
    """Images of the split without a prediction: they are in no other metric, so their number stands beside them."""
    patients = frame["patient"].nunique()
    return MetricRow("all", "all", "failed_images", float(failed), None, None, len(frame), int(patients))


def _key(job: EvaluateJob, bundle: Bundle, dataset: str, table: LabelTable) -> str:
    text = "\n".join(
        [bundle.model_id, dataset, job.split, str(job.resamples), str(job.seed), *table.uris]
        + [str(value) for value in table.labels.tolist()]
        + ([] if table.targets is None else [table.targets.tobytes().hex()])
        + [str(mask) for mask in table.masks]
    )
    return f"metrics-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _commit(job: EvaluateJob, bundle: Bundle, dataset: str, key: str, rows: tuple[MetricRow, ...]) -> None:
    now = datetime.now(timezone.utc)
    table = pa.Table.from_pylist(
        [
            {
                "run_key": key,
                "model_id": bundle.model_id,
                "dataset": dataset,
                "split": job.split,
                "subgroup": row.subgroup,
                "class": row.class_name,
                "metric": row.metric,
                "value": row.value,
                "ci_low": row.ci_low,
                "ci_high": row.ci_high,
                "n_images": row.n_images,
                "n_patients": row.n_patients,
                "measured_at": now,
            }
            for row in rows
        ],
        schema=tables.METRICS,
    )
    tables.commit(job.output, "metrics", tables.METRICS, table.to_batches(), key)


def _write_details(uri: str, bundle: Bundle, scored: pd.DataFrame, names: Pseudonymiser | None) -> None:
    """What the report draws: no patient in it."""
    if names is not None:
        shown = {column: scored[column].map(names.address, na_action="ignore") for column in ("uri", "mask_uri")}
        scored = scored.assign(**shown)
    truth = [name for name in scored.columns if name.startswith("t_")]
    columns = ["image_id", "uri", "mask_uri", "frames", "height", "width", "true_label", *truth, "predicted_label"]
    columns += [*tables.probability_columns(bundle.classes), "dice", "mask_box", "mask"]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(scored[columns], preserve_index=False), sink)
    storage.write_bytes(uri, sink.getvalue())
