"""The display chain: stored values to [0, 1], composed into one lookup table where values are few.

Order (DICOM PS3.4 N.2.1; PS3.3 C.11.1, C.11.2, C.11.6): modality LUT or rescale, then VOI LUT,
window or percentiles, then inversion; padding ends as black, whatever comes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision_ray.imaging.image import Display, LookupTable, MedicalImage, VoiFunction, Window

Floats = NDArray[np.float64]

_TABLE_TOP = 65535
_LARGEST_TABLE = 1 << 16
_TAKEN_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """Modality values that become 0 and 1, with a straight line between."""

    low: float
    high: float


Scaling = Window | LookupTable | Bounds
"""What maps modality values to [0, 1]."""


def modality_values(stored: NDArray[Any], display: Display) -> Floats:
    """Stored values in the modality's unit, such as HU (DICOM PS3.3 C.11.1), same shape."""
    if display.modality_lut is not None:
        return _look_up(display.modality_lut, stored)
    return stored.astype(np.float64) * display.slope + display.intercept


def unit_values(stored: NDArray[Any], display: Display, scaling: Scaling) -> Floats:
    """The whole chain in float64.

    Args:
        stored: stored values of any real type and shape.
        scaling: the window, VOI LUT or bounds to use, in modality units.

    Returns:
        Values in [0, 1], same shape; padding and values that are not finite are 0.
    """
    shown = _scale(modality_values(stored, display), scaling)
    if display.invert:
        shown = 1.0 - shown
    if display.padding is not None:
        shown[(stored >= display.padding[0]) & (stored <= display.padding[1])] = 0.0
    return np.nan_to_num(shown, copy=False, nan=0.0)


def unit_table(display: Display, lowest: int, highest: int, scaling: Scaling) -> NDArray[np.uint16]:
    """`unit_values` of every stored value from `lowest` to `highest`, as 0 to 65535."""
    stored = np.arange(lowest, highest + 1, dtype=np.int64)
    return np.rint(unit_values(stored, display, scaling) * _TABLE_TOP).astype(np.uint16)


def show(stored: NDArray[Any], display: Display, scaling: Scaling) -> NDArray[np.uint16]:
    """Apply the chain to one grey frame.

    Args:
        stored: shape `(rows, columns)`, any real type.

    Returns:
        0 (black) to 65535 (white), same shape. Integers whose range fits 16 bits go through one
        table, which gives what the float chain gives.
    """
    if stored.dtype.kind in "iu":
        lowest, highest = int(stored.min()), int(stored.max())
        if highest - lowest < _LARGEST_TABLE and (stored.itemsize <= 2 or -(2**31) <= lowest <= highest < 2**31):
            table = unit_table(display, lowest, highest, scaling)
            return _taken(table, _offset(stored, lowest))
    return np.rint(unit_values(stored, display, scaling) * _TABLE_TOP).astype(np.uint16)


def _taken(table: NDArray[np.uint16], indices: NDArray[Any]) -> NDArray[np.uint16]:
    """`table[indices]` a few rows at a time: numpy makes 64-bit indices first, four times a frame of 16 bits at once."""
    shown = np.empty(indices.shape, table.dtype)
    rows = max(1, _TAKEN_AT_ONCE // max(1, indices.shape[-1]))
    for start in range(0, len(indices), rows):
        part = slice(start, start + rows)
        np.take(table, indices[part], out=shown[part], mode="clip")  # with `raise`, `out` would be a copy
    return shown


def percentile_bounds(image: MedicalImage, percentiles: tuple[float, float]) -> Bounds:
    """Modality values at two percentiles over the non-padding pixels of all frames of a grey image.

    A percentile is the smallest value that at least that share of the pixels does not exceed
    (numpy's `inverted_cdf`).
    """
    pairs = [_counted(image.pixels[index], image.display_of(index)) for index in range(image.frames)]
    values = np.concatenate([pair[0] for pair in pairs])
    counts = np.concatenate([pair[1] for pair in pairs])
    if not values.size:
        return Bounds(0.0, 1.0)
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(counts[order])
    low, high = (
        float(values[order[min(int(np.searchsorted(cumulative, share / 100 * cumulative[-1])), len(order) - 1)]])
        for share in percentiles
    )
    return Bounds(low, high)


def _offset(stored: NDArray[Any], lowest: int) -> NDArray[Any]:
    """Stored values as indices from 0."""
    if stored.itemsize <= 2:  # wraps around where the difference needs the sign bit
        unsigned = stored.view(f"u{stored.itemsize}")
        return (
            unsigned
            if lowest == 0
            else np.asarray(unsigned - unsigned.dtype.type(lowest & ((1 << 8 * stored.itemsize) - 1)))
        )
    return stored.astype(np.int64) - lowest


def _counted(stored: NDArray[Any], display: Display) -> tuple[Floats, Floats]:
    """Distinct modality values of a frame and how often each occurs, padding left out."""
    if stored.dtype.kind in "iu" and stored.itemsize <= 2:
        lowest = int(stored.min())
        size = int(stored.max()) - lowest + 1
        shifted = np.ascontiguousarray(_offset(stored, lowest))
        counts = cv2.calcHist([shifted], [0], None, [size], [0, size]).ravel().astype(np.float64)
        found = np.flatnonzero(counts)
        raw: NDArray[Any] = found + lowest
        counts = counts[found]
    else:
        raw = stored[np.isfinite(stored)]
        counts = np.ones(raw.size)
    if display.padding is not None:
        kept = (raw < display.padding[0]) | (raw > display.padding[1])
        raw, counts = raw[kept], counts[kept]
    return modality_values(raw, display), counts


def _look_up(table: LookupTable, inputs: NDArray[Any]) -> Floats:
    indices = np.clip(np.nan_to_num(np.rint(inputs.astype(np.float64))) - table.first, 0, table.values.size - 1)
    return np.asarray(table.values[indices.astype(np.intp)], dtype=np.float64)


def _scale(values: Floats, scaling: Scaling) -> Floats:
    if isinstance(scaling, LookupTable):
        return _look_up(scaling, values) / _lut_top(scaling)
    if isinstance(scaling, Bounds):
        if scaling.high <= scaling.low:  # one value only: black
            return np.where(values > scaling.high, 1.0, 0.0)
        return np.clip((values - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return _window(values, scaling)


def _lut_top(table: LookupTable) -> int:
    """White of a VOI LUT: its declared depth, or its maximum where that leaves the leading bit unused."""
    declared = (1 << table.bits) - 1
    largest = int(table.values.max())
    return declared if largest > declared // 2 else max(largest, 1)


def _window(values: Floats, window: Window) -> Floats:
    """DICOM PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT)."""
    if window.function is VoiFunction.SIGMOID:
        with np.errstate(over="ignore"):
            return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (values - window.center) / window.width)))
    if window.function is VoiFunction.LINEAR_EXACT:
        return np.clip((values - window.center) / window.width + 0.5, 0.0, 1.0)
    if window.width <= 1:  # a step: the formula would divide by 0
        return np.where(values > window.center - 0.5, 1.0, 0.0)
    return np.clip((values - (window.center - 0.5)) / (window.width - 1.0) + 0.5, 0.0, 1.0)


def frame_scalings(
    image: MedicalImage, use_file_window: bool, percentiles: tuple[float, float], fixed: Window | Bounds | None
) -> Iterator[Scaling]:
    """The scaling of each frame of a grey image: `fixed`, else the file's, else percentiles.

    Args:
        use_file_window: take the file's VOI LUT, else its window (DICOM PS3.3 C.11.2: the LUT wins).
        fixed: one scaling for all frames, such as a window in HU; wins over everything.
    """
    bounds: Bounds | None = None
    for index in range(image.frames):
        display = image.display_of(index)
        from_file = (display.voi_lut or display.window) if use_file_window else None
        scaling = fixed or from_file
        if scaling is None:
            bounds = bounds or percentile_bounds(image, percentiles)
            scaling = bounds
        yield scaling
