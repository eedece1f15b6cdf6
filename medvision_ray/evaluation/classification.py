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
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.calibration_error import expected_calibration_error
from medvision_ray.evaluation.intervals import Key, Statistic, divide, plain_means, weighted_means
from medvision_ray.evaluation.ranking import SPECIFICITIES, sensitivity_metric, weighted_ranking
from medvision_ray.evaluation.samples import EvaluationSamples

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ROUNDING = 1e-12  # of 1 - specificity
_OVER_ALL = ("accuracy", "balanced_accuracy", "cohen_kappa", "brier", "log_loss", "ece")
_CALIBRATED = ("brier_calibrated", "log_loss_calibrated", "ece_calibrated")  # the same of calibrated probabilities
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
        calibrated: shape `(n, K)`, calibrated probabilities; None where there are none, NaN for a finding without.
    """

    classes: tuple[str, ...]
    exclusive: bool
    patients: NDArray[np.str_]
    known: Bools
    positive: Bools
    decided: Bools
    scores: Floats
    calibrated: Floats | None = None

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
        calibrated=None if samples.calibrated is None else samples.calibrated[kept].astype(np.float64),
    )


def outcomes(view: OneVsRest) -> tuple[Bools, Bools, Bools, Bools]:
    """True positive, false positive, false negative, true negative: four arrays of shape `(n, K)`."""
    yes, no = view.positive, view.known & ~view.positive
    return yes & view.decided, no & view.decided, yes & ~view.decided, no & ~view.decided


def right(view: OneVsRest) -> Bools:
    """Shape `(n,)`: single-label, the model decided for the true class."""
    return np.asarray((view.positive & view.decided).any(axis=1))


def plain_metrics(view: OneVsRest) -> dict[Key, float]:
    """Every metric that has an interval, from counts and scikit-learn.

    Returns:
        Per class and `macro`: precision, recall, specificity, f1, auroc, average_precision and
        sensitivity at fixed specificities (`ranking.weighted_ranking`); for findings also accuracy,
        balanced_accuracy (mean of recall and specificity), cohen_kappa, brier and log_loss. For
        single-label data, over `all`: accuracy, balanced_accuracy (macro recall), cohen_kappa
        (unweighted; Cohen 1960), brier (sum over the classes, so in [0, 2]; Brier 1950) and log_loss
        (nats). NaN where undefined.
    """
    tables = _rates(view, *(outcome.sum(axis=0).astype(np.float64) for outcome in outcomes(view)))
    ranks = [_plain_ranks(view, k) for k in range(len(view.classes))]
    tables.update({metric: np.array([found[metric] for found in ranks]) for metric in ranks[0]})
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
        tables.update({metric: np.stack([found[metric] for found in ranks], axis=1) for metric in ranks[0]})
        for metric, (values, members) in losses.items():
            tables[metric] = weighted_means(weights, values, members)
        return _named(view, tables)

    return statistic


def calibration_errors(view: OneVsRest) -> dict[Key, float]:
    """`ece`: over `all`, of the decided class, for single-label data; per finding and `macro` otherwise.

    `ece_calibrated` is the same of calibrated probabilities. A class's confidence is its probability. For
    findings the event is that the finding is there, as in torchmetrics' `binary_calibration_error`.
    """
    found = {"ece": _errors(view, view.scores)}
    if view.calibrated is not None:
        found["ece_calibrated"] = _errors(view, view.calibrated)
    return {key: float(value) for key, value in _named(view, found).items()}


def _errors(view: OneVsRest, scores: Floats) -> Floats:
    """Expected calibration error, shape `(1,)` or `(K,)`."""
    events = confidences(view, scores)
    return np.array([expected_calibration_error(score, true) if _complete(score) else np.nan for score, true in events])


def confidences(view: OneVsRest, scores: Floats) -> list[tuple[Floats, Bools]]:
    """Confidences and whether they were right: over all (single-label: of the decided class), or of each finding.

    Args:
        scores: raw or calibrated probabilities, shape `(n, K)`.
    """
    if view.exclusive:
        return [(np.where(view.decided, scores, 0.0).sum(axis=1), right(view))]
    columns = zip(scores.T, view.positive.T, view.known.T, strict=True)
    return [(score[known], true[known]) for score, true, known in columns]


def _complete(scores: Floats) -> bool:
    return not bool(np.isnan(scores).any())


def _ranking(view: OneVsRest, k: int) -> Callable[[Floats], dict[str, Floats]]:
    known = view.known[:, k]
    ranking = weighted_ranking(view.scores[known, k], view.positive[known, k])
    return ranking if known.all() else lambda weights: ranking(weights[:, known])


def _plain_ranks(view: OneVsRest, k: int) -> dict[str, float]:
    known = view.known[:, k]
    positive, scores = view.positive[known, k], view.scores[known, k]
    names = {sensitivity_metric(value): value for value in SPECIFICITIES}
    found = dict.fromkeys(("auroc", "average_precision", *names), np.nan)
    if positive.any():
        found["average_precision"] = float(average_precision_score(positive, scores))
    if positive.any() and not positive.all():
        found["auroc"] = float(roc_auc_score(positive, scores))
        false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
        for name, specificity in names.items():
            found[name] = float(true_rate[false_rate <= 1 - specificity + _ROUNDING].max())
    return found


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
        images = (tp + fn).sum(-1, keepdims=True)
        chance = divide(((tp + fn) * (tp + fp)).sum(-1, keepdims=True), images**2)
    else:
        rates["accuracy"] = divide(tp + tn, tp + fp + fn + tn)
        rates["balanced_accuracy"] = (rates["recall"] + rates["specificity"]) / 2
        chance = divide((tp + fn) * (tp + fp) + (tn + fp) * (tn + fn), (tp + fp + fn + tn) ** 2)
    rates["cohen_kappa"] = divide(rates["accuracy"] - chance, 1 - chance)
    return rates


def _losses(view: OneVsRest) -> dict[str, tuple[Floats, Bools]]:
    """Brier and logarithmic loss of each image, raw and calibrated, and where they are known: `(n, 1)` or `(n, K)`."""
    brier, surprise = _scoring_rules(view, view.scores)
    known = np.ones((view.patients.size, 1), dtype=np.bool_) if view.exclusive else view.known
    found = {"brier": (brier, known), "log_loss": (surprise, known)}
    if view.calibrated is not None:
        calibrated = [(losses, known & _whole(losses)) for losses in _scoring_rules(view, view.calibrated)]
        found |= dict(zip(_CALIBRATED, calibrated, strict=False))
    return found


def _whole(losses: Floats) -> Bools:
    """Shape `(1, M)`: a value of which an image lacks its part is undefined, not the mean of the others."""
    return np.asarray(~np.isnan(losses).any(axis=0, keepdims=True))


def _scoring_rules(view: OneVsRest, scores: Floats) -> tuple[Floats, Floats]:
    squared = (scores - view.positive) ** 2
    clipped = scores.clip(_CLIP, 1 - _CLIP)
    if view.exclusive:
        surprise = -np.where(view.positive, np.log(clipped), 0.0).sum(axis=1, keepdims=True)
        return squared.sum(axis=1, keepdims=True), surprise
    return squared, -np.log(np.where(view.positive, clipped, 1 - clipped))


def _macro(view: OneVsRest, values: Floats) -> Floats:
    """Mean over the classes that have a true image, from shape `(..., K)` to `(...)`."""
    present = values[..., view.present]
    return present.mean(axis=-1) if present.shape[-1] else np.full(values.shape[:-1], np.nan)


def _named(view: OneVsRest, tables: Mapping[str, Floats]) -> dict[Key, Floats]:
    """Take tables of shape `(..., K)` apart into classes and `macro`, and `(..., 1)` into `all`."""
    named: dict[Key, Floats] = {}
    over_all = (*_OVER_ALL, *_CALIBRATED) if view.exclusive else ()
    for metric, values in tables.items():
        if metric in over_all:
            named["all", metric] = values[..., 0]
            continue
        named["macro", metric] = _macro(view, values)
        for k, name in enumerate(view.classes):
            named[name, metric] = values[..., k]
    return named
