"""Figures about trainings and runs: learning curves, counts by name, what probabilities a night gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medvision_ray.reporting.plotting import PALETTE, SOFT, line, shown, styled, to_svg

_HISTOGRAM_BINS = 20
_LOSSES = {"train_loss": "train", "val_loss": "validation"}
_SCORES = {"val_accuracy": "accuracy", "val_f1": "F1, macro", "val_auroc": "AUROC, macro", "val_dice": "Dice"}


def training_curves(history: pd.DataFrame, best_epoch: int | None = None) -> bytes:
    """Loss, validation scores and learning rate by epoch; a dotted line at the epoch that was kept.

    Args:
        history: a row per epoch with `epoch`, `train_loss`, `val_loss`, `val_accuracy`, `val_f1`,
            `val_auroc`, `val_dice` and `learning_rate`; a column that is absent or blank
            throughout (a model without that head) is left out.
    """
    with styled():
        figure = Figure(figsize=(11, 3.3))
        loss, score, rate = figure.subplots(1, 3)
        _plot_columns(loss, history, _LOSSES, "Loss", "loss (no unit)")
        _plot_columns(score, history, _SCORES, "Validation scores", "score (0 to 1)")
        score.set_ylim(-0.02, 1.02)
        _plot_columns(rate, history, {"learning_rate": "heads"}, "Learning rate", "learning rate per step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if best_epoch is not None:
            for axes in (loss, score):
                axes.axvline(best_epoch, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        return to_svg(figure)


def training_speed(history: pd.DataFrame) -> bytes:
    """Images a second and the share of an epoch's time that steps waited for data, by epoch."""
    waited = pd.to_numeric(history["wait_seconds"], errors="coerce") / pd.to_numeric(
        history["seconds"], errors="coerce"
    )
    shares = history.assign(wait_share=100 * waited)
    with styled():
        figure = Figure(figsize=(8, 3))
        speed, wait = figure.subplots(1, 2)
        _plot_columns(speed, history, {"images_per_second": "images"}, "Speed", "images per second")
        speed.set_ylim(bottom=0)
        _plot_columns(wait, shares, {"wait_share": "wait"}, "Waiting for data", "share of time (%)")
        wait.set_ylim(bottom=0)
        return to_svg(figure)


def _plot_columns(axes: Axes, history: pd.DataFrame, columns: dict[str, str], title: str, unit: str) -> None:
    epochs = pd.to_numeric(history["epoch"]).to_numpy(dtype=float)
    present = [name for name in columns if name in history and history[name].notna().any()]
    for index, name in enumerate(present):
        values = pd.to_numeric(history[name], errors="coerce").to_numpy(dtype=float)
        axes.plot(epochs, values, marker="o", markersize=3, label=columns[name], **line(index))
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(present) > 1:
        axes.legend()


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    xlabel: str,
    digits: int = 0,
    marks: Sequence[tuple[float, str]] = (),
) -> bytes:
    """A bar a name, in the order given from the top.

    Args:
        digits: behind the point of the number at each bar.
        marks: values at which a dashed line is drawn, and its name.
    """
    rows = len(names)
    with styled(**{"axes.spines.bottom": False}):
        figure = Figure(figsize=(7.2, 1.1 + 0.32 * max(rows, 1)))
        axes = figure.subplots()
        drawn = axes.barh(range(rows), list(values), color=PALETTE[0], height=0.62)
        axes.bar_label(drawn, [f"{value:,.{digits}f}" for value in values], padding=4, fontsize=9)
        axes.set_yticks(range(rows), [shown(name) for name in names])
        axes.set_ylim(rows - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="y")
        for value, name in marks:
            axes.axvline(value, color=PALETTE[1], linewidth=1.2, linestyle=(0, (4, 3)), label=f"{name} ({value:g})")
        axes.margins(x=0.12)
        if digits == 0:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if marks:
            axes.legend(loc="lower right")
        axes.set(title=title, xlabel=xlabel)
        return to_svg(figure)


def probability_histograms(probabilities: NDArray[np.floating], classes: Sequence[str]) -> bytes:
    """How often each probability was given, a panel a class.

    Args:
        probabilities: shape `(n, classes)`.
    """
    columns = min(len(classes), 3)
    rows = -(-len(classes) // columns)
    with styled():
        figure = Figure(figsize=(1 + 3.2 * columns, 0.4 + 2.4 * rows))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, name) in enumerate(zip(panels, classes, strict=False)):
            values = probabilities[:, index]
            edges = [float(edge) for edge in np.linspace(0, 1, _HISTOGRAM_BINS + 1)]
            axes.hist(values[~np.isnan(values)], bins=edges, color=PALETTE[0])
            axes.set(title=shown(name), xlim=(0, 1), xlabel="probability (0 to 1)", ylabel="objects")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        for axes in panels[len(classes) :]:
            axes.set_visible(False)
        return to_svg(figure)
