"""Figures about classification: confusion, ROC, precision and recall, reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from medvision_ray.evaluation.calibration_error import BINS, expected_calibration_error
from medvision_ray.evaluation.intervals import FEWEST_PATIENTS
from medvision_ray.reporting.plotting import INK, MARKERS, PALETTE, SOFT, line, shown, styled, to_svg

_MOST_INSIDE = 5
_MOST_BANDS = 4
_GRID = np.linspace(0, 1, 101)
_RESAMPLES = 200
_LEVELS = (2.5, 97.5)
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """One class's ROC or precision-recall curve.

    Attributes:
        name: the class.
        x: false positive rate, or recall; empty where the curve is undefined.
        y: true positive rate, or precision, same length.
        area: AUROC, or average precision; NaN where undefined.
    """

    name: str
    x: Floats
    y: Floats
    area: float


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled predictions, as the curves need them.

    Attributes:
        labels: class index, shape `(n,)`, negative where blank; or 0, 1 or NaN per finding, shape `(n, classes)`.
        probabilities: shape `(n, classes)`.
        classes: names, in order of index.
        calibrated: probabilities after calibration, same shape; None without.
        patients: a number a patient, shape `(n,)`; None where it is not known who is whose, and no band is drawn.
        points: thresholds to decide at, `(classes,)` a name; NaN for a class that has none.
        decided: index of the class that was named, shape `(n,)`; None for findings, and where it is the likeliest.
    """

    labels: NDArray[np.number]
    probabilities: NDArray[np.floating]
    classes: Sequence[str]
    calibrated: NDArray[np.floating] | None = None
    patients: NDArray[np.integer] | None = None
    points: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    decided: NDArray[np.integer] | None = None

    def one(self, index: int) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
        """Truth and score of one class where both are known, and which images these are."""
        labels = self.labels
        truth = labels[:, index] if labels.ndim == 2 else np.where(labels < 0, np.nan, labels == index)
        scores = self.probabilities[:, index].astype(np.float64)
        known = ~np.isnan(truth.astype(float)) & ~np.isnan(scores)
        return truth[known].astype(np.int64), scores[known], known


def confusion_matrix(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> bytes:
    """Images by true class (rows) and predicted class (columns), with the share of each row.

    Args:
        labels: true class index, shape `(n,)`; images with a negative one (blank) are left out.
        predicted: predicted class index, shape `(n,)`.
        classes: class names, in order of index.
    """
    counts = count_confusion(labels, predicted, len(classes))
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    names = [shown(name) for name in classes]
    side = 2.3 + 0.6 * len(classes)
    with styled(**{"axes.grid": False}):
        figure = Figure(figsize=(side + 0.3, side))
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        for (row, column), count in np.ndenumerate(counts):
            text = f"{count:,}\n{shares[row, column]:.0%}" if totals[row, 0] else "–"
            color = "#ffffff" if shares[row, column] > 0.55 else "#10151a"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10 if len(classes) < 7 else 8)
        ticks = range(len(classes))
        axes.set_xticks(ticks, names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(title="Confusion (images)", xlabel="predicted class", ylabel="true class")
        return to_svg(figure)


def count_confusion(labels: NDArray[np.integer], predicted: NDArray[np.integer], n_classes: int) -> NDArray[np.int64]:
    """Images by true class (rows) and predicted class (columns), shape `(n_classes, n_classes)`."""
    known = labels >= 0
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(counts, (labels[known], predicted[known]), 1)
    return counts


def roc_curves(scored: Scored) -> bytes:
    """Each class's sensitivity against its false positive rate, with a 95 % band over patients and the points to decide at."""
    with styled():
        figure = Figure(figsize=_curves_size(scored))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for index, (low, high) in roc_bands(scored).items():
            axes.fill_between(_GRID, low, high, color=PALETTE[index % len(PALETTE)], alpha=0.15, linewidth=0)
        _plot_curves(axes, curves(scored, kind="roc"), "AUROC")
        _plot_points(axes, scored, kind="roc")
        axes.set(title="ROC, class against rest", xlabel="1 − specificity (0 to 1)", ylabel="sensitivity (0 to 1)")
        _legend(axes, "lower right")
        return to_svg(figure)


def precision_recall_curves(scored: Scored) -> bytes:
    """Each class's precision against its recall, with the points to decide at."""
    with styled():
        figure = Figure(figsize=_curves_size(scored))
        axes = figure.subplots()
        _plot_curves(axes, curves(scored, kind="precision_recall"), "AP")
        _plot_points(axes, scored, kind="precision_recall")
        axes.set(
            title="Precision and recall, class against rest",
            xlabel="recall = sensitivity (0 to 1)",
            ylabel="precision (0 to 1)",
        )
        _legend(axes, "lower left")
        return to_svg(figure)


def curves(scored: Scored, *, kind: str) -> list[Curve]:
    """The points of each class's curve, by scikit-learn.

    Args:
        kind: `roc` or `precision_recall`.

    Returns:
        A curve per class; empty with a NaN area where the images of the class, or those of the
        rest, are absent.
    """
    result = []
    for index, name in enumerate(scored.classes):
        truth, scores, _ = scored.one(index)
        if truth.size == 0 or truth.min() == truth.max():
            result.append(Curve(name, np.empty(0), np.empty(0), math.nan))
        elif kind == "roc":
            x, y, _ = roc_curve(truth, scores)
            result.append(Curve(name, x, y, float(roc_auc_score(truth, scores))))
        else:
            y, x, _ = precision_recall_curve(truth, scores)
            result.append(Curve(name, x, y, float(average_precision_score(truth, scores))))
    return result


def roc_bands(scored: Scored) -> dict[int, tuple[Floats, Floats]]:
    """A class's 95 % limits of sensitivity at 101 false positive rates, over resampled patients (pointwise, not joint).

    None of a class that fewer than `FEWEST_PATIENTS` have or lack, as its AUROC has no interval then.
    """
    if scored.patients is None or len(scored.classes) > _MOST_BANDS:
        return {}
    found = {}
    for index in range(len(scored.classes)):
        truth, scores, known = scored.one(index)
        patients = scored.patients[known]
        if min(np.unique(patients[truth == value]).size for value in (0, 1)) < FEWEST_PATIENTS:
            continue
        _, groups = np.unique(patients, return_inverse=True)
        drawn = _resampled_curves(truth, scores, groups)
        if len(drawn):
            low, high = np.percentile(drawn, _LEVELS, axis=0)
            found[index] = (low, high)
    return found


def _resampled_curves(truth: NDArray[np.int64], scores: Floats, groups: NDArray[np.intp]) -> Floats:
    """Sensitivity on `_GRID` of each draw of patients that has both kinds, shape `(draws, 101)`."""
    rng, count = np.random.default_rng(0), int(groups.max()) + 1
    drawn = []
    for _ in range(_RESAMPLES):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)[groups]
        kept = weights > 0
        if truth[kept].min() != truth[kept].max():
            x, y, _ = roc_curve(truth[kept], scores[kept], sample_weight=weights[kept])
            drawn.append(np.interp(_GRID, x, y))
    return np.array(drawn)


def at_threshold(
    truth: NDArray[np.int64], scores: NDArray[np.floating], threshold: float
) -> tuple[float, float, float]:
    """False positive rate, sensitivity and precision of "present from this score on"; NaN where undefined."""
    present = scores >= np.float32(threshold)
    positive = truth == 1
    hits = float(np.count_nonzero(present & positive))
    parts = (float(np.count_nonzero(present & ~positive)), hits, hits)
    wholes = (np.count_nonzero(~positive), np.count_nonzero(positive), np.count_nonzero(present))
    rate, sensitivity, precision = (
        part / whole if whole else math.nan for part, whole in zip(parts, wholes, strict=True)
    )
    return rate, sensitivity, precision


def reliability(scored: Scored) -> bytes:
    """Share that was right by stated probability, raw and calibrated, and below it how many images said so.

    Of single-label predictions it is the likeliest class's probability and whether that class is true (Guo et al.
    2017), of findings every finding's probability and whether it is there. Bars are 95 % intervals of the share (Wilson
    1927), as if images were independent; a mark is the larger the more images it stands for.
    """
    series = [("raw", *confidences(scored, scored.probabilities))]
    if scored.calibrated is not None and not np.isnan(scored.calibrated).all():
        series.append(("calibrated", *confidences(scored, scored.calibrated)))
    with styled():
        figure = Figure(figsize=(4.4, 4.9))
        axes, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        edges = np.linspace(0, 1, BINS + 1)
        for index, (name, confidence, right) in enumerate(series):
            middles, shares, low, high = reliability_points(confidence, right)
            error = expected_calibration_error(confidence, right)
            counts = np.histogram(confidence, edges)[0]
            sizes = 12 + 150 * counts[counts > 0] / max(counts.sum(), 1)
            color, marker = PALETTE[index], MARKERS[index]
            axes.vlines(middles, low, high, color=color, linewidth=1, alpha=0.7)
            label = f" {name}: ECE {error:.3f}"
            axes.scatter(
                middles, shares, s=sizes, color=color, marker=marker, zorder=3, label=label, alpha=0.85, clip_on=False
            )
            below.hist(confidence, bins=list(edges), histtype="step", linewidth=1.4, **line(index))
        axes.set(title="Reliability", ylabel="share that was right", xlim=(-0.01, 1.01), ylim=(-0.03, 1.03))
        for handle in axes.legend(loc="upper left").legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([30])
        below.set(xlabel="stated probability (0 to 1)", ylabel="images")
        below.margins(y=0.15)
        return to_svg(figure)


def confidences(scored: Scored, probabilities: NDArray[np.floating]) -> tuple[Floats, NDArray[np.bool_]]:
    """Stated probabilities and whether what they stand for is true, each of shape `(m,)`."""
    if scored.labels.ndim == 2:
        known = ~np.isnan(scored.labels.astype(float)) & ~np.isnan(probabilities)
        return probabilities[known].astype(np.float64), scored.labels[known] == 1
    known = (scored.labels >= 0) & ~np.isnan(probabilities).any(axis=1)
    named = probabilities[known].argmax(axis=1) if scored.decided is None else scored.decided[known].astype(np.int64)
    stated = np.take_along_axis(probabilities[known], named[:, None], axis=1)[:, 0]
    return stated.astype(np.float64), named == scored.labels[known]


def reliability_points(confidence: Floats, right: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean confidence and share right of each bin that has images, and the share's Wilson limits."""
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    filled = counts > 0
    n = counts[filled].astype(float)
    share = np.bincount(place, weights=right, minlength=BINS)[filled] / n
    mean = np.bincount(place, weights=confidence, minlength=BINS)[filled] / n
    z = 1.959964
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return mean, share, np.minimum(middle - half, share), np.maximum(middle + half, share)


def _curves_size(scored: Scored) -> tuple[float, float]:
    """Width and height in inches: square axes, and a line below for each class that finds no room inside."""
    lines = len(scored.classes) + len(scored.points)
    return 4.4, 4.4 + (0.2 * lines if lines > _MOST_INSIDE else 0.0)


def _plot_curves(axes: Axes, drawn: list[Curve], area_name: str) -> None:
    for index, curve in enumerate(drawn):
        area = "undefined" if math.isnan(curve.area) else f"{curve.area:.3f}"
        # Average precision is a sum of steps (recall falls along the points); AUROC is of trapezoids.
        style = "steps-post" if area_name == "AP" else "default"
        axes.plot(curve.x, curve.y, drawstyle=style, label=f" {shown(curve.name)}: {area_name} {area}", **line(index))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")


def _plot_points(axes: Axes, scored: Scored, *, kind: str) -> None:
    for number, (name, thresholds) in enumerate(scored.points.items()):
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "linestyle": "none", "markersize": 6}
        for index in range(len(scored.classes)):
            truth, scores, _ = scored.one(index)
            rate, sensitivity, precision = at_threshold(truth, scores, float(thresholds[index]))
            x, y = (rate, sensitivity) if kind == "roc" else (sensitivity, precision)
            if not (math.isnan(thresholds[index]) or math.isnan(x) or math.isnan(y)):
                color = PALETTE[index % len(PALETTE)]
                axes.plot([x], [y], color=color, markeredgecolor="#ffffff", zorder=5, **style)
        axes.plot([], [], color=INK, markerfacecolor="none", label=f" at {shown(name)}", **style)


def _legend(axes: Axes, inside: str) -> None:
    if len(axes.get_legend_handles_labels()[0]) <= _MOST_INSIDE:
        axes.legend(loc=inside)
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
