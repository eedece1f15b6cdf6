"""The evaluate job: metrics of a bundle on one split of a label table, from written prediction rows."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import EvaluateJob
from medvision_ray.evaluation.collect import Collected, collect
from medvision_ray.evaluation.measure import MetricRow, measure
from medvision_ray.evaluation.metric_rows import commit_metrics, latest_key
from medvision_ray.evaluation.subgroups import measure_subgroups, subgroup_values
from medvision_ray.logs import Reporter
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.summary import RunSummary

_METRICS_VERSION = "3"  # part of the key: an evaluation of an earlier version is measured again
_SETTINGS = (
    "resamples",
    "seed",
    "surface_tolerance_mm",
    "surface_tolerance_px",
    "lesion_iou",
    "subgroups",
    "subgroup_columns",
    "subgroup_min_patients",
)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        key: names the evaluation in the metrics table's `run_key`.
        metrics: rows of `measure`, `failed_images`, and rows of `measure_subgroups`.
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
        """One metric's value over all images."""
        whole = [row for row in self.metrics if row.subgroup == "all"]
        found = [row.value for row in whole if row.metric == metric and row.class_name == class_name]
        return found[0] if found else None


def evaluate(job: EvaluateJob, say: Reporter) -> Evaluation:
    """Measure a bundle on one split.

    Raises:
        LabelError: the split is empty, was trained on, or its classes are not the bundle's.
        MedVisionError: the images could not be scored.
    """
    bundle = load_bundle(job.bundle)
    found = collect(job, bundle, say)
    rows = (
        *measure(found.samples, resamples=job.resamples, seed=job.seed),
        _failed_row(found),
        *measure_subgroups(
            found.samples,
            subgroup_values(found.scored, found.samples, job.subgroups, job.subgroup_columns),
            min_patients=job.subgroup_min_patients,
            resamples=job.resamples,
            seed=job.seed,
        ),
    )
    key = latest_key(job.output, _key(job, bundle, found), bundle.model_id, found.dataset, job.split)
    commit_metrics(job.output, rows, key=key, model_id=bundle.model_id, dataset=found.dataset, split=job.split)
    details = storage.join(job.output, "evaluations", bundle.model_id, f"{found.dataset}-{job.split}.parquet")
    _write_details(details, bundle, _with_shares(found), found.names)
    return Evaluation(
        key, bundle.model_id, found.dataset, job.split, found.images, found.failed, rows, found.run, details
    )


def _failed_row(found: Collected) -> MetricRow:
    """Images of the split without a prediction: they are in no other metric, so their number stands beside them."""
    return MetricRow("all", "all", "failed_images", float(found.failed), None, None, found.images, found.patients)


def _key(job: EvaluateJob, bundle: Bundle, found: Collected) -> str:
    """Names what the metrics were made of, so that the same again is committed once and anything else beside it.

    Of patients goes in whose images belong together, and not who they are.
    """
    table = found.table
    text = "\n".join(
        [_METRICS_VERSION, bundle.model_id, found.dataset, job.split, *[str(getattr(job, name)) for name in _SETTINGS]]
        + [*table.uris, *[cell for cells in table.columns.values() for cell in cells]]
        + [str(value) for value in table.labels.tolist()]
        + ([] if table.targets is None else [table.targets.tobytes().hex()])
        + [str(mask) for mask in table.masks]
        + [str(number) for number in pd.factorize(np.array(table.patients, dtype=object))[0]]
        + [str(image) for image in found.scored["image_id"]]
    )
    return f"metrics-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _with_shares(found: Collected) -> pd.DataFrame:
    """With `patient_number` (0, 1, ... in the order of the table) and `true_mask_fraction`, null without a true mask."""
    scored, area = found.scored, found.samples.true_area
    share = np.nan if area is None else area / (scored["height"] * scored["width"]).to_numpy(np.float64)
    return scored.assign(patient_number=pd.factorize(scored["patient"])[0], true_mask_fraction=share)


def _write_details(uri: str, bundle: Bundle, scored: pd.DataFrame, names: Pseudonymiser | None) -> None:
    """What the report draws: no patient in it, only a number that tells whose images belong together."""
    if names is not None:
        shown = {column: scored[column].map(names.address, na_action="ignore") for column in ("uri", "mask_uri")}
        scored = scored.assign(**shown)
    truth = [name for name in scored.columns if name.startswith("t_")]
    columns = ["image_id", "uri", "mask_uri", "frames", "height", "width", "true_label", *truth, "predicted_label"]
    columns += [
        *tables.probability_columns(bundle.classes),
        *tables.calibrated_columns(bundle.classes),
        "dice",
        "mask_box",
        "mask",
        "patient_number",
        "true_mask_fraction",
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(scored[columns], preserve_index=False), sink)
    storage.write_bytes(uri, sink.getvalue())
