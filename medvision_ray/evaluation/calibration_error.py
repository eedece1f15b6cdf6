"""Expected calibration error: how far confidence and share correct lie apart, in 15 bins of equal width."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 15


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo 2017, equation 3; L1, 15 bins of equal width over [0, 1]).

    The mean over the images of |share correct - mean confidence| of the image's bin. A bin holds its
    lower edge, the last one also 1. It is biased upwards in small samples (a perfect model scores above
    0), and a bootstrap adds the same bias once more, so no interval is given for it.

    Args:
        confidence: shape `(n,)`, probabilities.
        correct: shape `(n,)`, the event with that probability happened.

    Returns:
        In [0, 1]; NaN where there are no images.

    Examples:
        >>> round(expected_calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False])), 3)
        0.1
    """
    if not confidence.size:
        return math.nan
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gap = np.bincount(place, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / confidence.size)
