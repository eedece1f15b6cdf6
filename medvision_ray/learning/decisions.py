"""What a training fits to its validation split besides the weights, and what that is worth there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medvision_ray.calibration import Calibration
from medvision_ray.config import CalibrateJob, TrainJob
from medvision_ray.evaluation.calibration_error import reliability
from medvision_ray.evaluation.classification import OneVsRest, calibration_errors, confidences, plain_metrics
from medvision_ray.learning.calibrate import ValidationScores, fit_calibration
from medvision_ray.learning.class_offsets import ClassWeighing, choose_class_offsets
from medvision_ray.learning.operating import choose_points, decided_thresholds
from medvision_ray.learning.validation import THRESHOLD
from medvision_ray.operating_points import OperatingPoint

_RULES = ("ece", "brier", "log_loss")


@dataclass(frozen=True)
class Decisions:
    """Fitted to the validation split.

    Attributes:
        calibration: None where there is none.
        operating_points: those that could be chosen.
        thresholds: of a multi-label bundle, one a finding; else none.
        class_offsets: of a single-label bundle, one a class, or none where the likeliest class is named.
        metrics: `val_ece`, `val_brier` and `val_log_loss` (over `all`, or `macro` of the findings), the same
            `..._calibrated`, and `reliability`: the bins of the diagram, raw and calibrated, over `all` or a finding.
            What is calibrated is measured out of fold, by patient.
        facts: for the bundle's `trained`.
    """

    calibration: Calibration | None
    operating_points: tuple[OperatingPoint, ...]
    thresholds: list[float]
    metrics: dict[str, Any]
    facts: dict[str, Any]
    class_offsets: tuple[float, ...] = ()


def fit_decisions(
    scores: ValidationScores,
    job: TrainJob | CalibrateJob,
    before: Sequence[float] | None = None,
    offsets_before: Sequence[float] = (),
) -> Decisions:
    """Fit to the validation split.

    Args:
        scores: its raw probabilities and truth.
        job: says what is fitted.
        before: multi-label: the thresholds that the model has already, for findings that get none; None is 0.5.
        offsets_before: single-label: the offsets that the model has already, kept unless others are shown to be better.
    """
    fitted = fit_calibration(scores, job.calibration)
    points, reasons = choose_points(scores, job.operating_points)
    facts: dict[str, Any] = {"calibration": fitted.facts}
    if reasons:
        facts["without_operating_points"] = reasons
    thresholds: list[float] = []
    if scores.multi_label:
        defaults = before or [THRESHOLD] * len(scores.classes)
        thresholds = decided_thresholds(points, job.operating_points, defaults)
        facts["thresholds_from"] = job.operating_points.decide_at or ("the model before" if before else THRESHOLD)
    offsets: tuple[float, ...] = ()
    if scores.classes and not scores.multi_label and job.operating_points.class_offsets == "auto":
        least = job.operating_points.min_class_patients
        chosen = choose_class_offsets(
            scores, min_class_patients=least, weighing=ClassWeighing.of(job), before=offsets_before
        )
        offsets, facts["class_offsets"] = chosen.offsets, chosen.facts
    return Decisions(fitted.calibration, points, thresholds, _measure(scores, fitted.out_of_fold), facts, offsets)


def _measure(scores: ValidationScores, calibrated: Any) -> dict[str, Any]:
    view = _view(scores)
    if view is None:
        return {}
    if calibrated is not None:
        view = replace(view, calibrated=calibrated[~np.isnan(scores.truth).all(axis=1)])
    found = plain_metrics(view) | calibration_errors(view)
    group = "all" if view.exclusive else "macro"
    names = [name for rule in _RULES for name in (rule, f"{rule}_calibrated")]
    figures: dict[str, Any] = {f"val_{name}": found[group, name] for name in names if (group, name) in found}
    figures["reliability"] = {"raw": _diagram(view, view.scores)}
    if view.calibrated is not None:
        figures["reliability"]["calibrated"] = _diagram(view, view.calibrated)
    return figures


def _diagram(view: OneVsRest, values: Any) -> dict[str, Any]:
    groups = ("all",) if view.exclusive else view.classes
    parts = zip(groups, confidences(view, values), strict=True)
    return {
        group: [asdict(part) for part in reliability(confidence, correct)]
        for group, (confidence, correct) in parts
        if confidence.size and not np.isnan(confidence).any()
    }


def _view(scores: ValidationScores) -> OneVsRest | None:
    known = ~np.isnan(scores.truth)
    kept = known.any(axis=1)
    if not scores.classes or not kept.any():
        return None
    raw = scores.probabilities[kept].astype(np.float64)
    likeliest = raw.argmax(axis=1)[:, None] == np.arange(len(scores.classes))
    return OneVsRest(
        classes=scores.classes,
        exclusive=not scores.multi_label,
        patients=scores.patients[kept],
        known=known[kept],
        positive=(scores.truth == 1)[kept],
        decided=raw >= THRESHOLD if scores.multi_label else likeliest,
        scores=raw,
    )
