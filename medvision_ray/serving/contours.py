"""A mask as outlines that a browser can draw."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Contours = list[list[list[int]]]
"""One closed line each, as `[row, column]` of the outermost pixels of a region or of a hole in it."""


def contours_of(mask: NDArray[np.bool_]) -> Contours:
    """Outlines of a mask of shape `(rows, columns)`, holes included: filled by the even-odd rule they are the mask."""
    if not mask.any():
        return []
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [np.asarray(line)[:, 0, ::-1].tolist() for line in found]
