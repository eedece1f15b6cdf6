"""What a score's order alone decides, under many weightings at once: AUROC, average precision, sensitivity at a specificity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medvision_ray.evaluation.intervals import divide

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SPECIFICITIES = (0.90, 0.95)
"""Sensitivity is given at these."""

_SLACK = 1e-9  # of a false alarm: 0.1 * 30 is 3.0000000000000004, and 3 false alarms of 30 are a specificity of 0.9


def sensitivity_metric(specificity: float) -> str:
    """Name of the metric: `sensitivity_at_90_specificity`."""
    return f"sensitivity_at_{100 * specificity:g}_specificity"


def weighted_ranking(scores: Floats, positive: Bools) -> Callable[[Floats], dict[str, Floats]]:
    """`auroc`, `average_precision` and `sensitivity_at_..._specificity` of one score under many weightings; sorts once.

    Images of equal score form one step, as in `sklearn.metrics.roc_auc_score` and
    `average_precision_score` with `sample_weight`; no interpolation. The sensitivity at a specificity
    is the largest of any threshold that has at least that specificity. The threshold is chosen on the
    very images that are measured: it says what the ranking can do, not what a deployed threshold does.

    Args:
        scores: shape `(n,)`, higher means more likely positive.
        positive: shape `(n,)`.

    Returns:
        A function from weights of shape `(resamples, n)` to the metrics, each of shape `(resamples,)`,
        NaN where a resample has no positive (or, except for average precision, no negative).

    Examples:
        >>> ranking = weighted_ranking(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
        >>> found = ranking(np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))
        >>> found["auroc"]
        array([0.875,   nan])
        >>> found["average_precision"].round(4)
        array([0.8333,    nan])
        >>> found["sensitivity_at_90_specificity"]
        array([0.5, nan])
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    steps = np.flatnonzero(np.concatenate(([True], descending[1:] != descending[:-1]))) if order.size else order
    positive_in_order = positive[order].astype(np.float64)
    has_ties = steps.size < order.size

    def ranking(weights: Floats) -> dict[str, Floats]:
        flagged = weights[:, order]
        hits = flagged * positive_in_order
        if has_ties:
            flagged, hits = np.add.reduceat(flagged, steps, axis=1), np.add.reduceat(hits, steps, axis=1)
        all_flagged, true_flagged = flagged.cumsum(axis=1), hits.cumsum(axis=1)
        positives = hits.sum(axis=1)
        negatives = flagged.sum(axis=1) - positives
        # A false alarm costs the positives ranked below it, and half of those of equal score.
        misranked = ((flagged - hits) * (positives[:, None] - true_flagged + 0.5 * hits)).sum(axis=1)
        precision = np.divide(true_flagged, all_flagged, out=np.zeros_like(hits), where=all_flagged > 0)
        false_flagged = all_flagged - true_flagged
        return {
            "auroc": 1 - divide(misranked, positives * negatives),
            "average_precision": divide((hits * precision).sum(axis=1), positives),
            **{
                sensitivity_metric(specificity): _sensitivity(
                    true_flagged, false_flagged, positives, negatives, specificity
                )
                for specificity in SPECIFICITIES
            },
        }

    return ranking


def weighted_ranks(scores: Floats, positive: Bools) -> Callable[[Floats], tuple[Floats, Floats]]:
    """AUROC and average precision of `weighted_ranking`."""
    ranking = weighted_ranking(scores, positive)

    def ranks(weights: Floats) -> tuple[Floats, Floats]:
        found = ranking(weights)
        return found["auroc"], found["average_precision"]

    return ranks


def _sensitivity(
    true_flagged: Floats, false_flagged: Floats, positives: Floats, negatives: Floats, specificity: float
) -> Floats:
    """From cumulative counts by falling threshold, shape `(resamples, steps)`."""
    allowed = (1 - specificity) * negatives + _SLACK
    # Both counts only grow as the threshold falls, so the last allowed step has the most hits; before it, none.
    last = (false_flagged <= allowed[:, None]).sum(axis=1)
    if not true_flagged.shape[1]:
        return np.full(positives.shape, np.nan)
    hits = np.take_along_axis(true_flagged, np.maximum(last - 1, 0)[:, None], axis=1)[:, 0]
    found = divide(np.where(last > 0, hits, 0.0), positives)
    return np.where(negatives > 0, found, np.nan)
