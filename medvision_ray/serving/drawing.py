"""Masks as outlines, run lengths and pictures; an overlay. Needs neither Ray nor torch."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_ORANGE_BGR = (0, 159, 230)


def contours(mask: NDArray[np.bool_]) -> list[list[list[float]]]:
    """Closed outlines of a mask's parts and holes, on the edges between pixels.

    Args:
        mask: shape `(rows, columns)`.

    Returns:
        Points `[row, column]` where (0, 0) is the centre of the first pixel; the first point of an
        outline is not repeated. Filling them by the even-odd rule gives the mask back.
    """
    from skimage.measure import find_contours  # half a second to import

    found = find_contours(np.pad(mask, 1).astype(np.uint8), 0.5)
    return [(_corners(line[:-1]) - 1.0).tolist() for line in found]


def _corners(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points where a closed outline turns."""
    before = line - np.roll(line, 1, axis=0)
    after = np.roll(line, -1, axis=0) - line
    turns: NDArray[np.bool_] = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return np.asarray(line[turns])


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Runs outside, inside, outside, ... down the columns: COCO's uncompressed encoding."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return [*([0] if flat.size and flat[0] else []), *(int(run) for run in runs)]


def png_base64(picture: NDArray[np.uint8]) -> str:
    """A grey picture, shape `(rows, columns)`, as PNG in base64."""
    return base64.b64encode(encode_png(picture)).decode()


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """PNG of grey or of BGR."""
    _, encoded = cv2.imencode(".png", picture, (cv2.IMWRITE_PNG_COMPRESSION, 3))
    return bytes(encoded.tobytes())


def draw_overlay(shown: NDArray[np.uint8], outlines: list[list[list[float]]]) -> bytes:
    """A frame with outlines in orange, as PNG of the frame's own size.

    Args:
        shown: grey `(rows, columns)` or RGB `(rows, columns, 3)`.
        outlines: as `contours` gives them.
    """
    canvas: Any = cv2.cvtColor(shown, cv2.COLOR_GRAY2BGR if shown.ndim == 2 else cv2.COLOR_RGB2BGR)
    thickness = max(1, round(max(shown.shape[:2]) / 400))
    fraction_bits = 3
    for line in outlines:
        points = np.rint(np.asarray(line)[:, ::-1] * (1 << fraction_bits)).astype(np.int32)
        cv2.polylines(canvas, [points], True, _ORANGE_BGR, thickness, cv2.LINE_AA, fraction_bits)
    return encode_png(canvas)
