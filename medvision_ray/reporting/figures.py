"""Figures of the report as SVG that follows the reader's light or dark theme. Matplotlib, no display.

Colours are Okabe and Ito's (Color Universal Design, 2008), with dashes once they run out, so that
no curve is told apart by colour alone twice over.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

_INK = "#1f2429"
_INK_DARK_THEME = "#e4e7ea"
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", _INK)
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_LONGEST_NAME = 32
_MOST_INSIDE = 5
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "medvision_ray",
    # A class may be called `$5`: names are text, never formulas.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#8a9099",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
}


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
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    area: float


def training_curves(history: pd.DataFrame) -> bytes:
    """Loss, validation scores and learning rate by epoch.

    Args:
        history: a row per epoch with `epoch`, `train_loss`, `val_loss`, `val_accuracy`, `val_f1`,
            `val_auroc`, `val_dice` and `learning_rate`; a column that is absent or blank
            throughout (a model without that head) is left out.
    """
    losses = {"train_loss": "train", "val_loss": "validation"}
    scores = {"val_accuracy": "accuracy", "val_f1": "F1, macro", "val_auroc": "AUROC, macro", "val_dice": "Dice"}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.2))
        loss, score, rate = figure.subplots(1, 3)
        _plot_columns(loss, history, losses, "Loss", "loss (no unit)")
        _plot_columns(score, history, scores, "Validation scores", "score (0 to 1)")
        score.set_ylim(-0.02, 1.02)
        _plot_columns(rate, history, {"learning_rate": "heads"}, "Learning rate", "learning rate per step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        return _to_svg(figure)


def _plot_columns(axes: Axes, history: pd.DataFrame, columns: dict[str, str], title: str, unit: str) -> None:
    epochs = pd.to_numeric(history["epoch"]).to_numpy(dtype=float)
    shown = [name for name in columns if name in history and history[name].notna().any()]
    for index, name in enumerate(shown):
        values = pd.to_numeric(history[name], errors="coerce").to_numpy(dtype=float)
        axes.plot(epochs, values, marker="o", markersize=3, label=columns[name], **_line(index))
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(shown) > 1:
        axes.legend()


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
    names = [_shown(name) for name in classes]
    side = 2.3 + 0.6 * len(classes)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
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
        return _to_svg(figure)


def count_confusion(labels: NDArray[np.integer], predicted: NDArray[np.integer], n_classes: int) -> NDArray[np.int64]:
    """Images by true class (rows) and predicted class (columns), shape `(n_classes, n_classes)`."""
    known = labels >= 0
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(counts, (labels[known], predicted[known]), 1)
    return counts


def roc_curves(labels: NDArray[np.number], probabilities: NDArray[np.floating], classes: Sequence[str]) -> bytes:
    """Each class's sensitivity against its false positive rate; arguments as in `curves`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_curves_size(len(classes)))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#8a9099", linewidth=1, linestyle=(0, (4, 3)))
        _plot_curves(axes, curves(labels, probabilities, classes, kind="roc"), "AUROC")
        axes.set(title="ROC, class against rest", xlabel="1 − specificity (0 to 1)", ylabel="sensitivity (0 to 1)")
        return _to_svg(figure)


def precision_recall_curves(
    labels: NDArray[np.number], probabilities: NDArray[np.floating], classes: Sequence[str]
) -> bytes:
    """Each class's precision against its recall; arguments as in `curves`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_curves_size(len(classes)))
        axes = figure.subplots()
        _plot_curves(axes, curves(labels, probabilities, classes, kind="precision_recall"), "AP")
        axes.set(
            title="Precision and recall, class against rest",
            xlabel="recall = sensitivity (0 to 1)",
            ylabel="precision (0 to 1)",
        )
        return _to_svg(figure)


def curves(
    labels: NDArray[np.number], probabilities: NDArray[np.floating], classes: Sequence[str], *, kind: str
) -> list[Curve]:
    """The points of each class's curve, by scikit-learn.

    Args:
        labels: class index, shape `(n,)`, negative where blank; or 0, 1 or NaN per finding, shape
            `(n, classes)`.
        probabilities: shape `(n, classes)`.
        kind: `roc` or `precision_recall`.

    Returns:
        A curve per class; empty with a NaN area where the images of the class, or those of the
        rest, are absent.
    """
    result = []
    for index, name in enumerate(classes):
        truth = labels[:, index] if labels.ndim == 2 else np.where(labels < 0, np.nan, labels == index)
        scores = probabilities[:, index]
        known = ~np.isnan(truth.astype(float)) & ~np.isnan(scores)
        truth, scores = truth[known].astype(int), scores[known]
        if truth.size == 0 or truth.min() == truth.max():
            result.append(Curve(name, np.empty(0), np.empty(0), math.nan))
        elif kind == "roc":
            x, y, _ = roc_curve(truth, scores)
            result.append(Curve(name, x, y, float(roc_auc_score(truth, scores))))
        else:
            y, x, _ = precision_recall_curve(truth, scores)
            result.append(Curve(name, x, y, float(average_precision_score(truth, scores))))
    return result


def _curves_size(n_classes: int) -> tuple[float, float]:
    """Width and height in inches: square axes, and a line below for each class that finds no room inside."""
    return 4.4, 4.4 + (0.2 * n_classes if n_classes > _MOST_INSIDE else 0.0)


def _plot_curves(axes: Axes, drawn: list[Curve], area_name: str) -> None:
    for index, curve in enumerate(drawn):
        area = "undefined" if math.isnan(curve.area) else f"{curve.area:.3f}"
        # Average precision is a sum of steps (recall falls along the points); AUROC is of trapezoids.
        style = "steps-post" if area_name == "AP" else "default"
        label = f" {_shown(curve.name)}: {area_name} {area}"
        axes.plot(curve.x, curve.y, drawstyle=style, label=label, **_line(index))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    if len(drawn) <= _MOST_INSIDE:
        axes.legend(loc="lower left" if area_name == "AP" else "lower right")
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


def failures_by_reason(counts: pd.Series) -> bytes:
    """Failed objects by reason, most frequent first.

    Args:
        counts: number of objects by error code.
    """
    ordered = counts.sort_values(ascending=True, kind="stable")
    names = [_shown(str(name)) for name in ordered.index]
    with mpl.rc_context({**_STYLE, "axes.spines.bottom": False}):
        figure = Figure(figsize=(7.5, 0.9 + 0.36 * max(len(ordered), 1)))
        axes = figure.subplots()
        bars = axes.barh(range(len(ordered)), ordered.to_numpy(dtype=float), color=_PALETTE[1], height=0.62)
        axes.bar_label(bars, [f"{count:,.0f}" for count in ordered], padding=4)
        axes.set_yticks(range(len(ordered)), names)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="objects")
        return _to_svg(figure)


def _line(index: int) -> dict[str, Any]:
    dash = _DASHES[index // len(_PALETTE) % len(_DASHES)]
    return {"color": _PALETTE[index % len(_PALETTE)], "linestyle": dash}


def _shown(name: str) -> str:
    """A name as one short printable line; control characters would make the SVG invalid XML."""
    line = "".join(character if character.isprintable() else "?" for character in name)
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"


def _to_svg(figure: Figure) -> bytes:
    """The figure as SVG on no background, its ink light where the reader's theme is dark."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    style = f"<style>svg{{color:{_INK}}}@media (prefers-color-scheme:dark){{svg{{color:{_INK_DARK_THEME}}}}}</style>"
    start = svg.index("<svg ")
    head = svg.index(">", start) + 1
    return (svg[start:head] + style + svg[head:].replace(_INK, "currentColor")).encode()
