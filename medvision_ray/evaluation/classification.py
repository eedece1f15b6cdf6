"""Classification metrics, each class against the rest: plain values, and the same with image weights.

A metric is NaN exactly where its formula is 0/0 and never a made-up 0: recall and average
precision of a class without a true image, precision of a class that is never decided, AUROC and
specificity of a class that every image has. `macro` is the mean over the classes that have a true
image, and NaN if one of those has no value, so that a model can't raise a macro value by never
deciding for a class. Recall is sensitivity.

The plain values come from integer counts and scikit-learn; the weighted ones from matrix products
and one sort per class, for all resamples at once. Tests hold them equal at unit weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import Key, Statistic, divide, plain_means, weighted_means
from medvision_ray.evaluation.samples import EvaluationSamples

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_CLIP = float(np.finfo(np.float32).eps)  # tables hold float32; a confident mistake costs at most 15.9 nats


@dataclass(frozen=True, eq=False)
class OneVsRest:
    """The images with a known label, each class (or finding) as a yes-or-no question.

    Attributes:
        classes: names of the K classes.
        exclusive: single-label: exactly one class is true, exactly one decided.
        patients: shape `(n,)`.
        known: shape `(n, K)`, the truth is known.
        positive: shape `(n, K)`, the class is true; False where not known.
        decided: shape `(n, K)`, the model decided for the class.
        scores: shape `(n, K)`, probabilities.
    """

    classes: tuple[str, ...]
    exclusive: bool
    patients: NDArray[np.str_]
    known: Bools
    positive: Bools
    decided: Bools
    scores: Floats

    @cached_property
    def present(self) -> Bools:
        """Shape `(K,)`: the class has a true image, so it counts in `macro`."""
        return np.asarray(self.positive.any(axis=0))


def one_vs_rest(samples: EvaluationSamples) -> OneVsRest | None:
    """The images of `samples` with a known label; None without a classification head or any label."""
    truth = samples.truth()
    known = ~np.isnan(truth)
    kept = known.any(axis=1)
    if samples.probabilities is None or not kept.any():
        return None
    scores = samples.probabilities.astype(np.float64)
    if samples.thresholds is not None:
        # In the probabilities' own precision: a float32 probability of 0.7 is below the float64 0.7.
        decided = samples.probabilities >= samples.thresholds.astype(samples.probabilities.dtype)
    elif samples.predicted is not None:
        decided = samples.predicted[:, None] == np.arange(len(samples.classes))
    else:  # unreachable after EvaluationSamples' checks; narrows the type
        raise MedVisionError("Expected `thresholds` or `predicted`, but both are None.")
    return OneVsRest(
        classes=samples.classes,
        exclusive=not samples.multi_label,
        patients=samples.patients[kept],
        known=known[kept],
        positive=(truth == 1)[kept],
        decided=decided[kept],
        scores=scores[kept],
    )


def outcomes(view: OneVsRest) -> tuple[Bools, Bools, Bools, Bools]:
    """True positive, false positive, false negative, true negative: four arrays of shape `(n, K)`."""
    yes, no = view.positive, view.known & ~view.positive
    return yes & view.decided, no & view.decided, yes & ~view.decided, no & ~view.decided


def plain_metrics(view: OneVsRest) -> dict[Key, float]:
    """Every metric that has an interval, from counts and scikit-learn.

    Returns:
        Per class and `macro`: precision, recall, specificity, f1, auroc, average_precision; for
        findings also accuracy, balanced_accuracy (mean of recall and specificity), brier and
        log_loss. For single-label data, over `all`: accuracy, balanced_accuracy (macro recall),
        brier (sum over the classes, so in [0, 2]; Brier 1950) and log_loss (nats). NaN where
        undefined.
    """
    tables = _rates(view, *(outcome.sum(axis=0).astype(np.float64) for outcome in outcomes(view)))
    ranks = [_plain_ranks(view, k) for k in range(len(view.classes))]
    tables["auroc"] = np.array([auroc for auroc, _ in ranks])
    tables["average_precision"] = np.array([precision for _, precision in ranks])
    for metric, (losses, members) in _losses(view).items():
        tables[metric] = plain_means(losses, members)
    return {key: float(value) for key, value in _named(view, tables).items()}


def weighted_metrics(view: OneVsRest) -> Statistic:
    """The metrics of `plain_metrics` as a function of weights of shape `(resamples, n)`.

    Weights are how often an image counts: whole numbers from 0.
    """
    indicators = np.concatenate(outcomes(view), axis=1).astype(np.float64)
    rankings = [_ranking(view, k) for k in range(len(view.classes))]
    losses = _losses(view)

    def statistic(weights: Floats) -> Mapping[Key, Floats]:
        tables = _rates(view, *np.split(weights @ indicators, 4, axis=1))
        ranks = [ranking(weights) for ranking in rankings]
        tables["auroc"] = np.stack([auroc for auroc, _ in ranks], axis=1)
        tables["average_precision"] = np.stack([precision for _, precision in ranks], axis=1)
        for metric, (values, members) in losses.items():
            tables[metric] = weighted_means(weights, values, members)
        return _named(view, tables)

    return statistic


def weighted_ranks(scores: Floats, positive: Bools) -> Callable[[Floats], tuple[Floats, Floats]]:
    """AUROC and average precision of one score under many weightings; sorts once.

    Images of equal score form one step, as in `sklearn.metrics.roc_auc_score` and
    `average_precision_score` with `sample_weight`; no interpolation.

    Args:
        scores: shape `(n,)`, higher means more likely positive.
        positive: shape `(n,)`.

    Returns:
        A function from weights of shape `(resamples, n)` to AUROC and average precision, each of
        shape `(resamples,)`, NaN where a resample has no positive (or, for AUROC, no negative).

    Examples:
        >>> ranks = weighted_ranks(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
        >>> auroc, precision = ranks(np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))
        >>> auroc
        array([0.875,   nan])
        >>> precision.round(4)
        array([0.8333,    nan])
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    steps = np.flatnonzero(np.concatenate(([True], descending[1:] != descending[:-1]))) if order.size else order
    positive_in_order = positive[order].astype(np.float64)
    has_ties = steps.size < order.size

    def ranks(weights: Floats) -> tuple[Floats, Floats]:
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
        return 1 - divide(misranked, positives * negatives), divide((hits * precision).sum(axis=1), positives)

    return ranks


def _ranking(view: OneVsRest, k: int) -> Callable[[Floats], tuple[Floats, Floats]]:
    known = view.known[:, k]
    ranks = weighted_ranks(view.scores[known, k], view.positive[known, k])
    return ranks if known.all() else lambda weights: ranks(weights[:, known])


def _plain_ranks(view: OneVsRest, k: int) -> tuple[float, float]:
    known = view.known[:, k]
    positive, scores = view.positive[known, k], view.scores[known, k]
    if not positive.any():
        return np.nan, np.nan
    auroc = np.nan if positive.all() else float(roc_auc_score(positive, scores))
    return auroc, float(average_precision_score(positive, scores))


def _rates(view: OneVsRest, *counts: Floats) -> dict[str, Floats]:
    """Rates from tp, fp, fn, tn of shape `(..., K)`; over all classes at once, shape `(..., 1)`."""
    tp, fp, fn, tn = counts
    rates = {
        "precision": divide(tp, tp + fp),
        "recall": divide(tp, tp + fn),
        "specificity": divide(tn, tn + fp),
        "f1": divide(2 * tp, 2 * tp + fp + fn),
    }
    if view.exclusive:
        rates["accuracy"] = divide(tp.sum(-1, keepdims=True), (tp + fn).sum(-1, keepdims=True))
        rates["balanced_accuracy"] = _macro(view, rates["recall"])[..., None]
    else:
        rates["accuracy"] = divide(tp + tn, tp + fp + fn + tn)
        rates["balanced_accuracy"] = (rates["recall"] + rates["specificity"]) / 2
    return rates


def _losses(view: OneVsRest) -> dict[str, tuple[Floats, Bools]]:
    """Brier and logarithmic loss of each image, and where they are known: `(n, 1)` or `(n, K)`."""
    squared = (view.scores - view.positive) ** 2
    clipped = view.scores.clip(_CLIP, 1 - _CLIP)
    if view.exclusive:
        known = np.ones((view.patients.size, 1), dtype=np.bool_)
        surprise = -(view.positive * np.log(clipped)).sum(axis=1, keepdims=True)
        return {"brier": (squared.sum(axis=1, keepdims=True), known), "log_loss": (surprise, known)}
    surprise = -np.log(np.where(view.positive, clipped, 1 - clipped))
    return {"brier": (squared, view.known), "log_loss": (surprise, view.known)}


def _macro(view: OneVsRest, values: Floats) -> Floats:
    """Mean over the classes that have a true image, from shape `(..., K)` to `(...)`."""
    present = values[..., view.present]
    return present.mean(axis=-1) if present.shape[-1] else np.full(values.shape[:-1], np.nan)


def _named(view: OneVsRest, tables: Mapping[str, Floats]) -> dict[Key, Floats]:
    """Take tables of shape `(..., K)` apart into classes and `macro`, and `(..., 1)` into `all`."""
    named: dict[Key, Floats] = {}
    over_all = ("accuracy", "balanced_accuracy", "brier", "log_loss") if view.exclusive else ()
    for metric, values in tables.items():
        if metric in over_all:
            named["all", metric] = values[..., 0]
            continue
        named["macro", metric] = _macro(view, values)
        for k, name in enumerate(view.classes):
            named[name, metric] = values[..., k]
    return named
