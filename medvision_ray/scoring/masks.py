"""Masks as they lie in a row: the bounding box, and the packed bits inside it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEVEL = 6


@dataclass(frozen=True)
class EncodedMask:
    """A mask on the source's grid, compressed.

    Attributes:
        pixels: pixels in the mask.
        fraction: share of the frame that the mask covers, in [0, 1].
        box: `(top, left, bottom, right)` in pixels, bottom and right exclusive; None for an empty mask.
        data: zlib of `numpy.packbits` of the box, row by row; None for an empty mask.
    """

    pixels: int
    fraction: float
    box: tuple[int, int, int, int] | None
    data: bytes | None


EMPTY = EncodedMask(0, 0.0, None, None)


def encode_mask(mask: NDArray[np.bool_]) -> EncodedMask:
    """Compress a mask of shape `(rows, columns)`."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return EMPTY
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    inside = np.ascontiguousarray(mask[top:bottom, left:right])
    count = int(np.count_nonzero(inside))
    data = zlib.compress(np.packbits(inside).tobytes(), _LEVEL)
    return EncodedMask(count, count / mask.size, (top, left, bottom, right), data)


def decode_mask(data: bytes | None, box: tuple[int, ...] | None, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of shape `(rows, columns)` that `encode_mask` compressed.

    Args:
        data: None for an empty mask, which has no box either.

    Raises:
        ValueError: the data do not fit the box, or the box not the shape, or a mask was drawn and not kept.
    """
    mask = np.zeros(shape, dtype=bool)
    if box is None:
        return mask
    if data is None:
        raise ValueError("Expected a mask, but its row has a box alone: it was written with `save_masks: false`.")
    top, left, bottom, right = (int(value) for value in box)
    if not (0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]):
        raise ValueError(f"Expected a box inside {shape}, but got {(top, left, bottom, right)}.")
    count = (bottom - top) * (right - left)
    limit = (count + 7) // 8
    packed = zlib.decompressobj().decompress(data, limit + 1)
    if len(packed) != limit:
        raise ValueError(f"Expected {limit} bytes of mask, but got {len(packed)} or more.")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count)
    mask[top:bottom, left:right] = bits.reshape(bottom - top, right - left)
    return mask
