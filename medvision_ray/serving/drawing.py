"""Masks as outlines, run lengths and pictures; an overlay. Needs neither Ray nor torch."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_ORANGE_BGR = (0, 159, 230)


def contours(mask: NDArray[np.bool_]) -> list[list[list[float]]]:
    """Closed outlines of a mask's parts and holes, along the edges of its pixels; the time goes with their length.

    Args:
        mask: shape `(rows, columns)`.

    Returns:
        Corners `[row, column]` where (0, 0) is the centre of the first pixel; the first corner of an
        outline is not repeated. Parts turn clockwise as displayed and holes the other way; pixels that touch at a
        corner alone are two parts. The areas within, holes negative, sum to the mask's pixels.
    """
    starts, ends, turns, width = _edges(mask)
    following = _successors(starts, ends, turns).tolist()
    found: list[list[list[float]]] = []
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        line: list[int] = []
        edge = first
        while not seen[edge]:
            seen[edge] = 1
            line.append(edge)
            edge = following[edge]
        path = np.array(line)
        corners = starts[path[turns[path] != turns[np.roll(path, 1)]]]
        # Vertex (r, c) is the top left corner of pixel (r, c) of the padded mask.
        found.append((np.stack([corners // width, corners % width], axis=1) - 1.5).tolist())
    return found


_Ints = NDArray[np.int64]


def _edges(mask: NDArray[np.bool_]) -> tuple[_Ints, _Ints, _Ints, int]:
    """Edges between pixels inside and outside, with the inside on their right.

    Returns:
        Start and end vertex, direction (0 right, 1 down, 2 left, 3 up), and vertices a row.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    width = padded.shape[1] + 1
    down, across = np.diff(padded, axis=0), np.diff(padded, axis=1)
    parts = []
    for difference, sign, begin, end, direction in (
        (down, 1, (1, 0), (1, 1), 0),
        (across, -1, (0, 1), (1, 1), 1),
        (down, -1, (1, 1), (1, 0), 2),
        (across, 1, (1, 1), (0, 1), 3),
    ):
        rows, columns = np.nonzero(difference == sign)
        start = (rows + begin[0]) * width + columns + begin[1]
        parts.append((start, (rows + end[0]) * width + columns + end[1], np.full(rows.size, direction)))
    starts, ends, directions = (np.concatenate(part).astype(np.int64) for part in zip(*parts, strict=True))
    return starts, ends, directions, width


def _successors(starts: _Ints, ends: _Ints, directions: _Ints) -> _Ints:
    """For each edge the one that goes on where it ends; to the right where two do."""
    keys = starts * 4 + directions
    order = np.argsort(keys)
    ranked = keys[order]
    following = np.full(len(starts), -1, np.int64)
    if not len(starts):
        return following
    for turn in (3, 0, 1):  # the last one wins
        wanted = ends * 4 + (directions + turn) % 4
        place = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
        hit = ranked[place] == wanted
        following[hit] = order[place[hit]]
    return following


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
