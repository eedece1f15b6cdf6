"""Outlines and lesions over many images: HD95, surface Dice, lesion sensitivity, false positives an image.

Every metric here is a ratio of sums over images, so the bootstrap needs two matrix products. HD95 and
surface Dice are means over the images whose true mask is not empty, like Dice; a structure of which
nothing was drawn counts with the worst case (`surfaces.surface_agreement`) and is never dropped:
`undrawn_masks` says how many there are. An image has distances in mm where its spacing is true in the
patient and in pixels elsewhere; the two are different metrics (`hd95_mm`, `hd95_px`), never averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import Key, Statistic, divide

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskDetail:
    """What was measured on each pair of masks; shape `(n,)` throughout, anything where no true mask is known.

    Attributes:
        in_mm: distances are in mm, else in pixels.
        hd95: see `surfaces.surface_agreement`; NaN where the true mask is empty.
        surface_dice: in [0, 1]; NaN where the true mask is empty.
        lesions: connected components of the true mask.
        detected: those of them that were found.
        false_positives: predicted components that match no true one.
        tolerance_mm: of surface Dice where distances are in mm.
        tolerance_px: of surface Dice elsewhere.
    """

    in_mm: Bools
    hd95: Floats
    surface_dice: Floats
    lesions: Floats
    detected: Floats
    false_positives: Floats
    tolerance_mm: float = 2.0
    tolerance_px: float = 2.0

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in self.arrays()}
        if len(set(shapes.values())) != 1 or self.in_mm.ndim != 1:
            raise MedVisionError(f"Expected arrays of one shape (n,) in the mask detail, but got {shapes}.")

    def __len__(self) -> int:
        return int(self.in_mm.size)

    @staticmethod
    def arrays() -> tuple[str, ...]:
        """Names of the fields with an entry an image."""
        return tuple(item.name for item in fields(MaskDetail) if not item.name.startswith("tolerance"))

    def take(self, rows: NDArray[np.bool_]) -> MaskDetail:
        """The detail of some images."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.arrays()})


@dataclass(frozen=True, eq=False)
class Ratios:
    """Metrics that are a sum over images divided by another.

    Attributes:
        keys: M group and metric names.
        numerators: shape `(n, M)`.
        denominators: shape `(n, M)`; the image takes part where it is above 0.
    """

    keys: tuple[Key, ...]
    numerators: Floats
    denominators: Floats

    def plain(self) -> dict[Key, float]:
        """Each metric's value; NaN where no image takes part."""
        values = divide(self.numerators.sum(axis=0), self.denominators.sum(axis=0))
        return dict(zip(self.keys, map(float, values), strict=True))

    def weighted(self) -> Statistic:
        """The metrics as a function of weights of shape `(resamples, n)`."""

        def statistic(weights: Floats) -> Mapping[Key, Floats]:
            values = divide(weights @ self.numerators, weights @ self.denominators)
            return dict(zip(self.keys, values.T, strict=True))

        return statistic


def over_marked(detail: MaskDetail, groups: tuple[str, ...], members: Bools) -> Ratios:
    """HD95, surface Dice and lesion sensitivity of images whose true mask is not empty.

    Args:
        detail: of these images.
        groups: names of G groups.
        members: shape `(n, G)`.

    Returns:
        Per group: `hd95_mm` and `surface_dice_Tmm` where an image has mm, `hd95_px` and
        `surface_dice_Tpx` where one has not (T is the tolerance), and `lesion_sensitivity`, detected
        over all lesions.
    """
    one = np.ones(len(detail))
    columns: dict[str, tuple[Floats, Floats]] = {}
    for unit, tolerance, there in (
        ("mm", detail.tolerance_mm, detail.in_mm),
        ("px", detail.tolerance_px, ~detail.in_mm),
    ):
        if there.any():
            counted = one * there
            columns[f"hd95_{unit}"] = np.where(there, detail.hd95, 0.0), counted
            columns[f"surface_dice_{tolerance:g}{unit}"] = np.where(there, detail.surface_dice, 0.0), counted
    columns["lesion_sensitivity"] = detail.detected, detail.lesions
    return _by_group(columns, groups, members)


def over_all(detail: MaskDetail, groups: tuple[str, ...], members: Bools) -> Ratios:
    """`false_positives_per_image` of images whose true mask is known, empty ones included."""
    columns = {"false_positives_per_image": (detail.false_positives, np.ones(len(detail)))}
    return _by_group(columns, groups, members)


def detail_counts(detail: MaskDetail, predicted_area: Floats, marked: Bools) -> dict[str, tuple[Floats, Bools]]:
    """What is summed, and among which images, each shape `(n,)`.

    Returns:
        `undrawn_masks`, images with a true mask where nothing was drawn, so that the worst case counts;
        `lesions`, `detected_lesions` and `false_positive_lesions`.
    """
    every = np.ones(len(detail), dtype=np.bool_)
    return {
        "undrawn_masks": ((marked & (predicted_area == 0)).astype(np.float64), marked),
        "lesions": (detail.lesions, marked),
        "detected_lesions": (detail.detected, marked),
        "false_positive_lesions": (detail.false_positives, every),
    }


def _by_group(columns: Mapping[str, tuple[Floats, Floats]], groups: tuple[str, ...], members: Bools) -> Ratios:
    return Ratios(
        keys=tuple((group, metric) for metric in columns for group in groups),
        numerators=np.concatenate([top[:, None] * members for top, _ in columns.values()], axis=1),
        denominators=np.concatenate([bottom[:, None] * members for _, bottom in columns.values()], axis=1),
    )
