"""measure(): every metric of a set of samples as rows for the metrics table, with intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.at_points import at_points
from medvision_ray.evaluation.carriers import class_carriers, overlap_carriers, ratio_carriers
from medvision_ray.evaluation.classification import (
    OneVsRest,
    calibration_errors,
    one_vs_rest,
    outcomes,
    plain_metrics,
    weighted_metrics,
)
from medvision_ray.evaluation.intervals import bootstrap_intervals
from medvision_ray.evaluation.mask_detail import Ratios, detail_counts, over_all, over_marked
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.segmentation import MaskView, mask_counts, mask_view, plain_overlaps, weighted_overlaps


@dataclass(frozen=True)
class MetricRow:
    """One metric of one class.

    Attributes:
        subgroup: which images were measured: `all`, or those of a variable such as `patient_sex` whose
            value is `subgroup_value`.
        class_name: a class, `macro` (mean over the classes that have a true image) or `all`.
        metric: name of the metric, as `measure` lists them.
        value: None where the metric is undefined; counts are whole numbers.
        ci_low: lower limit of the 95 % interval over patients; None for counts and where there is no
            interval (see `intervals.bootstrap_intervals`).
        ci_high: upper limit.
        n_images: images the value rests on: those with a known label for a classification metric,
            those with a non-empty true mask for Dice and IoU, those a count was made among.
        n_patients: patients of these images.
        subgroup_value: None for `all`.
    """

    subgroup: str
    class_name: str
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n_images: int
    n_patients: int
    subgroup_value: str | None = None


def measure(samples: EvaluationSamples, *, resamples: int, seed: int) -> list[MetricRow]:
    """Measure all that truth and predictions allow.

    Single-label classification gives, for `all`: accuracy, balanced_accuracy, cohen_kappa, brier,
    log_loss and ece; per class and `macro`: precision, recall (sensitivity), specificity, f1, auroc,
    average_precision and sensitivity at fixed specificities (one against the rest); the confusion
    matrix as counts, metric `confusion:PREDICTED` with the true class as `class_name`. Multi-label
    classification gives all of these metrics per finding and `macro`, over the images where the finding
    is not blank, and the counts true_positives, false_positives, false_negatives and true_negatives.
    Calibrated probabilities add ece_calibrated, brier_calibrated and log_loss_calibrated; operating points
    add sensitivity, specificity, ppv and npv of each class at each of them (`sensitivity@POINT`).
    Masks give, for `all` and per true class: dice and iou, and the counts mask_images, missed_masks,
    empty_mask_images and spurious_masks; where outlines and
    lesions were measured also hd95, surface_dice, lesion_sensitivity and
    false_positives_per_image with their counts. Definitions and the cases in which a value is None are
    in `classification`, `segmentation` and `mask_detail`.

    Args:
        samples: truth and predictions.
        resamples: bootstrap resamples over patients; 0 leaves intervals out.
        seed: seed of the bootstrap; the same samples and seed give the same rows.

    Returns:
        Rows of `all` first, then `macro`, then the classes in their order.

    Raises:
        MedVisionError: `resamples` is negative, or no image has both a truth and a prediction of
            the same kind.

    Examples:
        >>> samples = EvaluationSamples(
        ...     classes=("normal", "pneumonia"),
        ...     multi_label=False,
        ...     patients=np.array(["a", "b", "c", "d"]),
        ...     labels=np.array([0, 0, 1, 1]),
        ...     probabilities=np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]]),
        ...     predicted=np.array([0, 1, 1, 1]),
        ... )
        >>> rows = {(row.class_name, row.metric): row.value for row in measure(samples, resamples=0, seed=0)}
        >>> rows["all", "accuracy"], rows["pneumonia", "recall"], rows["normal", "confusion:pneumonia"]
        (0.75, 1.0, 1.0)
    """
    rows: list[MetricRow] = []
    if (view := one_vs_rest(samples)) is not None:
        rows += _classification_rows(view, resamples, seed)
        if samples.operating_points:
            rows += _ratio_rows(at_points(view, samples.operating_points), view.patients, resamples, seed)
    if (masks := mask_view(samples)) is not None:
        rows += _segmentation_rows(masks, resamples, seed)
    if not rows:
        raise MedVisionError(
            f"Expected an image with a label and class probabilities, or with a true mask and a predicted one, "
            f"but none of {samples.n} images has either. Check the labels of the split, and which heads the bundle has."
        )
    order = {name: place for place, name in enumerate(("all", "macro", *samples.classes))}
    return sorted(rows, key=lambda row: order[row.class_name])


def measurable(samples: EvaluationSamples) -> bool:
    """Whether `measure` finds an image with a truth and a prediction of the same kind."""
    return one_vs_rest(samples) is not None or mask_view(samples) is not None


def _classification_rows(view: OneVsRest, resamples: int, seed: int) -> Iterator[MetricRow]:
    plain = plain_metrics(view)
    intervals = bootstrap_intervals(
        weighted_metrics(view), view.patients, resamples=resamples, seed=seed, carriers=class_carriers(view, plain)
    )
    images = {name: view.known[:, k] for k, name in enumerate(view.classes)}
    every = view.known.any(axis=1)
    for (class_name, metric), value in (plain | calibration_errors(view)).items():
        interval = intervals.get((class_name, metric))
        yield _row(class_name, metric, value, interval, view.patients[images.get(class_name, every)])
    for k, true in enumerate(view.classes):
        if view.exclusive:
            among = view.patients[view.positive[:, k]]
            for j, predicted in enumerate(view.classes):
                count = float((view.positive[:, k] & view.decided[:, j]).sum())
                yield _row(true, f"confusion:{predicted}", count, None, among)
        else:
            names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
            for name, outcome in zip(names, outcomes(view), strict=True):
                yield _row(true, name, float(outcome[:, k].sum()), None, view.patients[images[true]])


def _segmentation_rows(view: MaskView, resamples: int, seed: int) -> Iterator[MetricRow]:
    # Only patients who have a true mask are drawn: others can't change a mean over true masks.
    inside = view.take(view.marked)
    intervals = bootstrap_intervals(
        weighted_overlaps(inside), inside.patients, resamples=resamples, seed=seed, carriers=overlap_carriers(inside)
    )
    member = dict(zip(inside.groups, inside.members.T, strict=True))
    for (group, metric), value in plain_overlaps(view).items():
        yield _row(group, metric, value, intervals.get((group, metric)), inside.patients[member[group]])
    for (group, metric), (counted, among) in mask_counts(view).items():
        yield _row(group, metric, float(counted.sum()), None, view.patients[among])
    if view.detail is not None and inside.detail is not None:
        marked, every = (
            over_marked(inside.detail, view.groups, inside.members),
            over_all(view.detail, view.groups, view.members),
        )
        for ratios, patients in ((marked, inside.patients), (every, view.patients)):
            yield from _ratio_rows(ratios, patients, resamples, seed)
        for metric, (counted_, among) in detail_counts(view.detail, view.predicted_area, view.marked).items():
            for group, inside_group in zip(view.groups, view.members.T, strict=True):
                yield _row(
                    group,
                    metric,
                    float(counted_[among & inside_group].sum()),
                    None,
                    view.patients[among & inside_group],
                )


def _ratio_rows(ratios: Ratios, patients: NDArray[np.str_], resamples: int, seed: int) -> Iterator[MetricRow]:
    carriers = ratio_carriers(ratios, patients)
    intervals = bootstrap_intervals(ratios.weighted(), patients, resamples=resamples, seed=seed, carriers=carriers)
    for place, ((group, metric), value) in enumerate(ratios.plain().items()):
        yield _row(group, metric, value, intervals.get((group, metric)), patients[ratios.denominators[:, place] > 0])


def _row(
    class_name: str, metric: str, value: float, interval: tuple[float, float] | None, patients: NDArray[np.str_]
) -> MetricRow:
    """A row over these patients' images, one entry an image; an undefined value has no interval either."""
    defined = not math.isnan(value)
    low, high = interval if interval is not None and defined else (None, None)
    return MetricRow(
        subgroup="all",
        class_name=class_name,
        metric=metric,
        value=value if defined else None,
        ci_low=low,
        ci_high=high,
        n_images=int(patients.size),
        n_patients=int(np.unique(patients).size),
    )
