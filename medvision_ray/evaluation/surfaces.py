"""How far apart the outlines of two masks lie: 95th percentile Hausdorff distance and surface Dice.

A mask's surface is its pixels that have a neighbour (4-neighbourhood; outside of the image counts as
background) not in it, each one at its centre. These are the definitions of MONAI's
`compute_hausdorff_distance(percentile=95)` and `compute_surface_dice`; tests hold them equal.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def surface_agreement(
    truth: Bools, predicted: Bools, spacing: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    """HD95 and surface Dice of one image.

    HD95 (Huttenlocher 1993, with the percentile of Taha and Hanbury 2015) is the larger of the two
    directed 95th percentiles of distances from one surface to the other. Surface Dice (Nikolov 2021)
    is the share of both surfaces that lies within the tolerance of the other.

    Where nothing was drawn the worst case counts: HD95 is the image's diagonal, surface Dice is 0.

    Args:
        truth: shape `(rows, columns)`.
        predicted: same shape.
        spacing: distance between rows, and between columns; in mm, or 1 and 1 for pixels.
        tolerance: in the unit of `spacing`.

    Returns:
        HD95 in the unit of `spacing`, and surface Dice in [0, 1]; NaN and NaN where `truth` is empty.

    Examples:
        >>> truth, predicted = np.zeros((2, 8, 8), bool)
        >>> truth[2:5, 2:5], predicted[2:5, 3:6] = True, True
        >>> surface_agreement(truth, predicted, (1.0, 2.0), 1.0)
        (2.0, 0.625)
        >>> surface_agreement(truth, np.zeros((8, 8), bool), (3.0, 4.0), 1.0)
        (40.0, 0.0)
    """
    if not truth.any():
        return math.nan, math.nan
    if not predicted.any():
        return math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1]), 0.0
    window = _window(truth | predicted)
    true_surface, found_surface = _surface(truth[window]), _surface(predicted[window])
    to_found = _distance_to(found_surface, spacing)[true_surface]
    to_true = _distance_to(true_surface, spacing)[found_surface]
    hd95 = max(float(np.percentile(distances, 95)) for distances in (to_found, to_true))
    near = int((to_found <= tolerance).sum()) + int((to_true <= tolerance).sum())
    return hd95, near / (to_found.size + to_true.size)


def _window(mask: Bools) -> tuple[slice, slice]:
    """The bounding box of a mask: distances between surfaces need nothing outside of it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _surface(mask: Bools) -> Bools:
    return np.asarray(mask & ~binary_erosion(mask))


def _distance_to(surface: Bools, spacing: tuple[float, float]) -> Floats:
    return np.asarray(distance_transform_edt(~surface, sampling=spacing), dtype=np.float64)
