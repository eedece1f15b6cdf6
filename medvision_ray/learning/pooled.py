"""What is made of out-of-fold predictions: every train and val image once, by a model that has not seen its patient."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import TrainJob
from medvision_ray.config.jobs import SUBGROUPS
from medvision_ray.evaluation.measure import MetricRow, measurable, measure
from medvision_ray.evaluation.metric_rows import commit_metrics
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.subgroups import measure_subgroups, subgroup_values
from medvision_ray.learning.calibrate import ValidationScores, one_against_rest
from medvision_ray.learning.class_offsets import ClassWeighing, choose_class_offsets
from medvision_ray.learning.mask_threshold import choose
from medvision_ray.learning.out_of_fold import BY_THRESHOLD, PIXELS
from medvision_ray.learning.validation import THRESHOLD

SPLIT = "out_of_fold"
"""`split` of these rows in the metrics table."""
_RESAMPLES = 1000
_MIN_PATIENTS = 10  # as `evaluate` has it
_TOLD = (("all", "accuracy"), ("macro", "accuracy"), ("macro", "auroc"), ("macro", "f1"), ("all", "dice"))


def pooled_samples(rows: pd.DataFrame, classes: tuple[str, ...], multi_label: bool) -> EvaluationSamples:
    """Truth and prediction as arrays; findings are decided at 0.5, whatever each fold's model has chosen on its own fold.

    Args:
        rows: of the table of out-of-fold predictions, those that were scored.
        classes: of the models; empty where they only draw masks.
    """
    areas = [rows[name].to_numpy(np.float64, na_value=np.nan) for name in PIXELS]
    drawn = bool(rows["mask_fraction"].notna().any())
    samples = EvaluationSamples(
        classes=classes or ("lesion",),
        multi_label=multi_label,
        patients=("n:" + rows["patient_number"].astype(str)).to_numpy().astype(np.str_),
        labels=None if multi_label else np.full(len(rows), -1),
        targets=np.full((len(rows), len(classes)), np.nan) if multi_label else None,
        overlap=areas[0] if drawn else None,
        predicted_area=areas[1] if drawn else None,
        true_area=areas[2] if drawn else None,
    )
    if not classes:
        return samples
    probabilities = rows[tables.probability_columns(classes)].to_numpy(np.float32)
    if multi_label:
        targets = rows[[f"t_{name}" for name in classes]].to_numpy(np.float64)
        thresholds = np.full(len(classes), THRESHOLD, np.float32)
        return replace(samples, targets=targets, thresholds=thresholds, probabilities=probabilities)
    index = {name: place for place, name in enumerate(classes)}
    labels = rows["true_label"].map(index).fillna(-1).to_numpy(np.int64)
    return replace(samples, labels=labels, predicted=probabilities.argmax(axis=1), probabilities=probabilities)


def pooled_metrics(
    rows: pd.DataFrame, classes: tuple[str, ...], multi_label: bool, *, size: tuple[int, int], seed: int
) -> list[MetricRow]:
    """The metrics of `measure` and of its subgroups, with intervals over patients, and `failed_images`.

    Args:
        rows: of the table of out-of-fold predictions, failures too.
        classes: of the models; empty where they only draw masks.
        size: rows and columns of the model's grid, on which masks are compared.
        seed: of the bootstrap.
    """
    scored = rows[rows["error_code"].isna()].reset_index(drop=True)
    failed, patients = len(rows) - len(scored), int(rows["patient_number"].nunique())
    found = [MetricRow("all", "all", "failed_images", float(failed), None, None, len(rows), patients)]
    if scored.empty:
        return found
    samples = pooled_samples(scored, classes, multi_label)
    if not measurable(samples):
        return found
    found += measure(samples, resamples=_RESAMPLES, seed=seed)
    on_grid = scored.assign(height=size[0], width=size[1])
    groups = subgroup_values(on_grid, samples, SUBGROUPS, ())
    return found + list(measure_subgroups(samples, groups, min_patients=_MIN_PATIENTS, resamples=_RESAMPLES, seed=seed))


@dataclass(frozen=True)
class PooledChoices:
    """How the ensemble of the folds decides, chosen on all out-of-fold predictions as a training chooses on its val split.

    Attributes:
        class_offsets: one a class, or none.
        mask_threshold: None leaves the members'.
        facts: for the bundle's `trained`.
    """

    class_offsets: tuple[float, ...]
    mask_threshold: float | None
    facts: dict[str, Any]


def choose_pooled(rows: pd.DataFrame, job: TrainJob, classes: tuple[str, ...], multi_label: bool) -> PooledChoices:
    """Choose class offsets and the mask threshold where the job leaves them open.

    Args:
        rows: of the table of out-of-fold predictions, failures too.
        classes: of the models; empty where they only draw masks.
    """
    scored = rows[rows["error_code"].isna()].reset_index(drop=True)
    facts: dict[str, Any] = {}
    offsets: tuple[float, ...] = ()
    threshold: float | None = None
    points = job.operating_points
    if classes and not multi_label and len(scored) and points.class_offsets == "auto":
        samples = pooled_samples(scored, classes, multi_label)
        assert samples.labels is not None  # single-label
        truth = one_against_rest(samples.labels, len(classes))
        scores = ValidationScores(classes, False, np.asarray(samples.probabilities), truth, samples.patients)
        least, weighing = points.min_class_patients, ClassWeighing.of(job)
        named = choose_class_offsets(scores, min_class_patients=least, weighing=weighing)
        offsets, facts["class_offsets"] = named.offsets, named.facts
    drawn = scored[scored[BY_THRESHOLD].notna()]
    if job.mask_threshold == "auto" and len(drawn):
        chosen = choose(np.stack(drawn[BY_THRESHOLD].to_list()), drawn["patient_number"].astype(str).to_numpy(np.str_))
        threshold, facts["mask_threshold"] = chosen.value, chosen.facts
    return PooledChoices(offsets, threshold, facts)


def commit_pooled(job: TrainJob, ensemble: Bundle, config_hash: str, place: str, say: Callable[[str], None]) -> None:
    """Measure the out-of-fold predictions and commit the rows under the ensemble's model_id, once.

    Args:
        job: the cross-validation.
        config_hash: of it.
        place: address of the out-of-fold predictions; those of earlier versions lack columns and are not measured.
        say: is told the headline.
    """
    key = f"folds-{hashlib.sha256(f'{ensemble.model_id} {config_hash}'.encode()).hexdigest()[:12]}"
    found = tables.read(job.output, "metrics", ["run_key"], pads.field("run_key") == key)
    if (found is not None and found.num_rows) or not storage.exists(place):
        return
    predicted = pq.read_table(io.BytesIO(storage.read_bytes(place)))
    if not {*PIXELS, "patient_number"} <= set(predicted.column_names):
        return
    size = ensemble.preprocess.size
    rows = pooled_metrics(predicted.to_pandas(), ensemble.classes, ensemble.multi_label, size=size, seed=job.seed)
    dataset = storage.absolute(job.labels.table).rsplit("/", 2)[-2]
    commit_metrics(job.output, rows, key=key, model_id=ensemble.model_id, dataset=dataset, split=SPLIT)
    for row in rows:
        if (row.class_name, row.metric) in _TOLD and row.subgroup == "all" and row.ci_low is not None:
            say(
                f"{ensemble.name}: out of fold {row.metric} {row.value:.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}], "
                f"{row.n_images} images of {row.n_patients} patients"
            )
