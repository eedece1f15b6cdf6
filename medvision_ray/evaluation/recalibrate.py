"""The calibrate job: a calibration and operating points for a bundle, fitted to its own predictions of the val split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle, image_digest, load_bundle
from medvision_ray.bundle_decisions import check_place, owners_of, save_with_decisions
from medvision_ray.config import CalibrateJob, EvaluateJob
from medvision_ray.errors import LabelError, MedVisionError, UsageError
from medvision_ray.evaluation.collect import JoinedSplit, join_split
from medvision_ray.evaluation.reference_rows import fingerprint_of_rows
from medvision_ray.learning.calibrate import ValidationScores, one_against_rest
from medvision_ray.learning.decisions import fit_decisions
from medvision_ray.learning.operating import check_positive_class
from medvision_ray.logs import Reporter
from medvision_ray.scoring.summary import RunSummary

SPLIT: Literal["val"] = "val"
_FOR_SCORING = ("labels", "bundle", "output", "scoring", "decode", "budget", "privacy", "ray")


@dataclass(frozen=True)
class Recalibrated:
    """What a calibrate job gives.

    Attributes:
        bundle: the new one.
        images: of the val split, with a prediction and a label: what was fitted to.
        patients: of these images.
        failed: images of the val split without a prediction.
        facts: `calibration` (with the reason where there is none), `without_operating_points`, ..., of the new bundle.
        metrics: `val_ece` and so on, raw and calibrated (out of fold), of the val split.
        run: the scoring of images that had no prediction.
    """

    bundle: Bundle
    images: int
    patients: int
    failed: int
    facts: dict[str, Any]
    metrics: dict[str, Any]
    run: RunSummary


def recalibrate(job: CalibrateJob, say: Reporter) -> Recalibrated:
    """Fit to a bundle's predictions of the val split as a training does to its own, and write a new bundle.

    The test split is not looked at. Images that the bundle was trained on are refused: an ensemble of folds has seen all
    patients of its table, and needs the val split of another one.

    Raises:
        UsageError: the bundle tells no classes, or the place is another model's.
        LabelError: the val split is empty, was trained on, or has no label of the bundle's kind.
        MedVisionError: more images failed than the budget allows.
    """
    bundle = load_bundle(job.bundle)
    name = job.name or f"{bundle.name}-calibrated"
    place = job.to or storage.join(job.output, "bundles", name)
    _check(job, bundle, place)
    found = join_split(_scoring_job(job), bundle, say)
    if found.run.over_budget:
        over = ", ".join(found.run.over_budget)
        raise MedVisionError(
            f"Expected the {SPLIT} split to be scored within `budget`, but it is over it ({over}): a fit to what is left "
            "would be to a choice of images. Look at the failures, or raise the budget."
        )
    scored = found.scored
    scores, rows = validation_scores(bundle, scored)
    say(f"Fitting to {len(rows)} of {len(found.frame)} {SPLIT} images of {found.dataset}.")
    fitted = fit_decisions(scores, job, bundle.thresholds or None, bundle.class_offsets)
    patients = int(np.unique(scores.patients).size)
    facts = {**fitted.facts, "calibrated_on": _basis(job, found, len(rows), patients)}
    if found.names is not None:
        facts["image_digests"] = "hashed"  # without the key nobody can tell which images were fitted to
    written = save_with_decisions(
        place,
        bundle,
        name=name,
        calibration=fitted.calibration,
        operating_points=fitted.operating_points,
        thresholds=fitted.thresholds,
        class_offsets=fitted.class_offsets,
        trained=facts,
        metrics=fitted.metrics,
        fingerprint=bundle.fingerprint or fingerprint_of_rows(job.output, bundle, scored),
        fitted_digest=[image_digest(uri, found.names) for uri in scored["uri"].iloc[rows]],
    )
    return Recalibrated(written, len(rows), patients, found.failed, facts, fitted.metrics, found.run)


def validation_scores(bundle: Bundle, scored: pd.DataFrame) -> tuple[ValidationScores, np.ndarray[Any, Any]]:
    """What is fitted to: the images with a label, and their places in `scored`.

    Args:
        scored: rows of `JoinedSplit.scored`.

    Raises:
        LabelError: none of them has a label of the bundle's kind.
    """
    if bundle.multi_label:
        blank = pd.Series(np.nan, scored.index)
        truth = np.stack([scored.get(f"t_{name}", blank) for name in bundle.classes], axis=1).astype(np.float64)
    else:
        index = {name: place for place, name in enumerate(bundle.classes)}
        truth = one_against_rest(scored["true_label"].map(index).fillna(-1).to_numpy(np.int64), len(bundle.classes))
    rows = np.flatnonzero(~np.isnan(truth).all(axis=1))
    if not len(rows):
        kind = "findings (`labels.findings`)" if bundle.multi_label else "classes (`labels.label_column`)"
        raise LabelError(f"Expected {kind} of {bundle.model_id} in the {SPLIT} split, but no image has one.")
    scores = ValidationScores(
        classes=bundle.classes,
        multi_label=bundle.multi_label,
        probabilities=scored[tables.probability_columns(bundle.classes)].to_numpy(np.float32)[rows],
        truth=truth[rows],
        patients=scored["patient"].to_numpy().astype(np.str_)[rows],
    )
    return scores, rows


def _check(job: CalibrateJob, bundle: Bundle, place: str) -> None:
    """What can be told before anything is scored."""
    if not bundle.classes:
        raise UsageError(f"Expected a bundle that tells classes, but {bundle.model_id} only draws masks.")
    points = job.operating_points
    if points.decide_at is not None and not bundle.multi_label:
        raise UsageError("`operating_points.decide_at` is for findings; single-label rows name the likeliest class.")
    if points.positive_class is not None and bundle.multi_label:
        raise UsageError(
            "`operating_points.positive_class` is for single-label bundles: every finding has a threshold."
        )
    check_positive_class(points, bundle.classes)
    check_place(place, bundle)
    owners_of(bundle.uri)  # a card whose owner's parts cannot be told is refused before anything is scored


def _scoring_job(job: CalibrateJob) -> EvaluateJob:
    return EvaluateJob(**{name: getattr(job, name) for name in _FOR_SCORING}, split=SPLIT)


def _basis(job: CalibrateJob, found: JoinedSplit, images: int, patients: int) -> dict[str, Any]:
    table = hashlib.sha256(storage.read_bytes(job.labels.table)).hexdigest()
    return {
        "dataset": found.dataset,
        "split": SPLIT,
        "labels_sha256": table,
        "images": images,
        "patients": patients,
        "failed": found.failed,
    }
