"""Every metric's difference between two models on the same images, with an interval over the same draws of patients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.at_points import at_points
from medvision_ray.evaluation.carriers import class_carriers, overlap_carriers, ratio_carriers
from medvision_ray.evaluation.classification import OneVsRest, one_vs_rest, plain_metrics, right, weighted_metrics
from medvision_ray.evaluation.intervals import Key, Statistic, bootstrap_intervals
from medvision_ray.evaluation.mask_detail import Ratios, over_all, over_marked
from medvision_ray.evaluation.paired_tests import AurocTest, McNemarTest, delong_test, mcnemar_test
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.segmentation import mask_view, plain_overlaps, weighted_overlaps


@dataclass(frozen=True)
class Difference:
    """One metric of two models.

    Attributes:
        class_name: a class, `macro` or `all`.
        metric: as `measure` names it.
        value: of the model; None where undefined.
        baseline: of the one it is compared with.
        difference: value minus baseline.
        ci_low: lower limit of the difference's 95 % interval over patients, drawn alike for both.
        ci_high: upper limit.
    """

    class_name: str
    metric: str
    value: float | None
    baseline: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        images: images that both have predicted.
        patients: their patients.
        differences: every metric that both have.
        auroc_tests: a class's AUROCs tested.
        accuracy_tests: over `all` (single-label) or a finding.
    """

    images: int
    patients: int
    differences: tuple[Difference, ...]
    auroc_tests: dict[str, AurocTest]
    accuracy_tests: dict[str, McNemarTest]


@dataclass(frozen=True, eq=False)
class _Part:
    """Metrics that rest on the same images."""

    patients: NDArray[np.str_]
    plain: dict[Key, float]
    weighted: Statistic
    carriers: dict[Key, int]


def compare_samples(model: EvaluationSamples, baseline: EvaluationSamples, *, resamples: int, seed: int) -> Comparison:
    """Compare two models' predictions of the same images, in the same order.

    Raises:
        MedVisionError: the images or their truth differ, or the models have no metric in common.
    """
    _check_paired(model, baseline)
    ours, theirs = _parts(model), _parts(baseline)
    differences = [
        difference
        for name in ours
        if name in theirs
        for difference in _differences(ours[name], theirs[name], resamples, seed)
    ]
    if not differences:
        raise MedVisionError(
            "Expected two models with a metric in common, but one classifies and the other draws masks only, "
            "or there is no truth for what both do."
        )
    view, other = one_vs_rest(model), one_vs_rest(baseline)
    return Comparison(
        images=model.n,
        patients=int(np.unique(model.patients).size),
        differences=tuple(differences),
        auroc_tests=dict(_auroc_tests(view, other)) if view is not None and other is not None else {},
        accuracy_tests=dict(_accuracy_tests(view, other)) if view is not None and other is not None else {},
    )


def _check_paired(model: EvaluationSamples, baseline: EvaluationSamples) -> None:
    if not np.array_equal(model.patients, baseline.patients):
        raise MedVisionError("Expected both models' predictions of the same images in the same order, but they differ.")
    classify = model.probabilities is not None and baseline.probabilities is not None
    if classify and (model.classes != baseline.classes or model.multi_label != baseline.multi_label):
        raise MedVisionError(
            f"Expected two models of the same classes in the same order, but got {', '.join(model.classes)} and "
            f"{', '.join(baseline.classes)}."
        )
    if classify and not np.array_equal(model.truth(), baseline.truth(), equal_nan=True):
        raise MedVisionError("Expected the same labels for both models, but they differ.")
    if model.true_area is not None and baseline.true_area is not None:
        same = np.array_equal(model.true_area, baseline.true_area, equal_nan=True)
        if not same:
            raise MedVisionError("Expected the same true masks for both models, but they differ.")


def _parts(samples: EvaluationSamples) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    if (view := one_vs_rest(samples)) is not None:
        plain = plain_metrics(view)
        parts["classes"] = _Part(view.patients, plain, weighted_metrics(view), class_carriers(view, plain))
        if samples.operating_points:
            parts["points"] = _ratio_part(at_points(view, samples.operating_points), view.patients)
    if (masks := mask_view(samples)) is None:
        return parts
    inside = masks.take(masks.marked)
    parts["overlaps"] = _Part(
        inside.patients, plain_overlaps(inside), weighted_overlaps(inside), overlap_carriers(inside)
    )
    if masks.detail is not None and inside.detail is not None:
        marked = over_marked(inside.detail, inside.groups, inside.members)
        every = over_all(masks.detail, masks.groups, masks.members)
        parts["outlines"] = _ratio_part(marked, inside.patients)
        parts["lesions"] = _ratio_part(every, masks.patients)
    return parts


def _ratio_part(ratios: Ratios, patients: NDArray[np.str_]) -> _Part:
    return _Part(patients, ratios.plain(), ratios.weighted(), ratio_carriers(ratios, patients))


def _differences(ours: _Part, theirs: _Part, resamples: int, seed: int) -> Iterator[Difference]:
    shared = [key for key in ours.plain if key in theirs.plain]

    def statistic(weights: NDArray[np.float64]) -> dict[Key, NDArray[np.float64]]:
        one, other = ours.weighted(weights), theirs.weighted(weights)
        return {key: one[key] - other[key] for key in shared}

    carriers = {key: min(ours.carriers[key], theirs.carriers[key]) for key in shared}
    intervals = bootstrap_intervals(statistic, ours.patients, resamples=resamples, seed=seed, carriers=carriers)
    for key in shared:
        value, baseline = (None if np.isnan(part.plain[key]) else part.plain[key] for part in (ours, theirs))
        difference = None if value is None or baseline is None else value - baseline
        low, high = (difference is not None and intervals.get(key)) or (None, None)
        yield Difference(*key, value, baseline, difference, low, high)


def _auroc_tests(view: OneVsRest, other: OneVsRest) -> Iterator[tuple[str, AurocTest]]:
    for k, name in enumerate(view.classes):
        known = view.known[:, k]
        scores, baseline = view.scores[known, k], other.scores[known, k]
        test = delong_test(scores, baseline, view.positive[known, k], view.patients[known])
        if test is not None:
            yield name, test


def _accuracy_tests(view: OneVsRest, other: OneVsRest) -> Iterator[tuple[str, McNemarTest]]:
    if view.exclusive:
        yield "all", mcnemar_test(right(view), right(other))
        return
    for k, name in enumerate(view.classes):
        known = view.known[:, k]
        truth = view.positive[known, k]
        yield name, mcnemar_test(truth == view.decided[known, k], truth == other.decided[known, k])
