"""Figures that set groups side by side: Dice by size of the mask, values with intervals by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medvision_ray.reporting.plotting import INK, PALETTE, SOFT, shown, styled, to_svg

_SIZES = ((0.005, "under 0.5 %"), (0.02, "0.5 to 2 %"), (1.0, "over 2 %"))
"""As the subgroup `mask_size` has them: the true mask's share of the image."""
_MOST_DOTS = 400


@dataclass(frozen=True)
class Estimate:
    """One line of a figure of intervals.

    Attributes:
        name: what is measured.
        value: None where it is undefined.
        low: lower limit; None without an interval.
        high: upper limit.
        note: what is written at the right, such as how many images.
        emphasised: the whole, beside its parts.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""
    emphasised: bool = False


def dice_by_size(dice: NDArray[np.floating], share: NDArray[np.floating] | None) -> bytes:
    """Dice of each image with a true mask, by the mask's share of the image: dots, quartiles and median.

    Args:
        dice: shape `(n,)`; NaN where neither mask has a pixel or no true one is known.
        share: shape `(n,)` in [0, 1]; None where it is not known, and all are one group.
    """
    groups = size_groups(dice, share)
    rng = np.random.default_rng(0)
    with styled():
        figure = Figure(figsize=(5.2, 3.9))
        axes = figure.subplots()
        for place, (_, values) in enumerate(groups):
            drawn = values if len(values) <= _MOST_DOTS else rng.choice(values, _MOST_DOTS, replace=False)
            spread = rng.uniform(-0.2, 0.2, len(drawn))
            axes.plot(place + spread, drawn, "o", color=PALETTE[0], alpha=0.5, markersize=3, markeredgewidth=0)
            if len(values):
                low, middle, high = np.percentile(values, (25, 50, 75))
                axes.add_patch(_box(place, low, high))
                axes.plot([place - 0.3, place + 0.3], [middle, middle], color=PALETTE[1], linewidth=2.4)
                axes.text(place + 0.34, middle, f"{middle:.2f}", va="center", fontsize=9)
        axes.set_xticks(range(len(groups)), [f"{name}\n{len(values):,} images" for name, values in groups])
        axes.set(title="Dice by size of the true mask", ylabel="Dice (0 to 1)", ylim=(-0.03, 1.03))
        axes.set_xlim(-0.6, len(groups) - 0.3)
        axes.grid(visible=False, axis="x")
        return to_svg(figure)


def size_groups(
    dice: NDArray[np.floating], share: NDArray[np.floating] | None
) -> list[tuple[str, NDArray[np.floating]]]:
    """Dice of the images with a true mask, a group a size; an image whose true mask is empty is in none."""
    if share is None:
        return [("any size", dice[~np.isnan(dice)])]
    groups, lower = [], 0.0
    for upper, name in _SIZES:
        inside = (share > lower) & (share <= upper) & ~np.isnan(dice)
        groups.append((name, dice[inside]))
        lower = upper
    return groups


def intervals(
    estimates: Sequence[Estimate], *, title: str, xlabel: str, reference: float | None = None, limits: bool = True
) -> bytes:
    """A dot and a 95 % interval a line; a dashed line at the reference.

    Args:
        limits: the axis shows [0, 1], or less where all lies in less.
    """
    rows = len(estimates)
    with styled():
        figure = Figure(figsize=(7.2, 1.1 + 0.3 * max(rows, 1)))
        axes = figure.subplots()
        if reference is not None:
            axes.axvline(reference, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for place, each in enumerate(estimates):
            color = PALETTE[1] if each.emphasised else PALETTE[0]
            if each.low is not None and each.high is not None:
                axes.plot([each.low, each.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
            if each.value is not None:
                axes.plot([each.value], [place], "D" if each.emphasised else "o", color=color, markersize=5.5)
            note = each.note if each.value is not None else f"{each.note} undefined"
            axes.annotate(note, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK)
        axes.set_yticks(range(rows), [shown(each.name) for each in estimates])
        axes.set_ylim(rows - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set(title=title, xlabel=xlabel)
        if limits:
            left, right = axes.get_xlim()
            axes.set_xlim(max(left, -0.02), min(right, 1.005))
        return to_svg(figure)


def _box(place: int, low: float, high: float) -> Rectangle:
    return Rectangle((place - 0.3, low), 0.6, high - low, fill=False, edgecolor=INK, linewidth=1.2)
