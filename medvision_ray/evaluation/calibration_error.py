"""Expected calibration error and the reliability diagram: confidence against share correct in 15 bins of equal width."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    gap = np.bincount(_bin_of(confidence), weights=correct - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / confidence.size)


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar of a reliability diagram (Guo 2017, figure 1).

    Attributes:
        low: lower edge of the bin.
        high: upper edge.
        images: images in it.
        confidence: their mean probability; None where there are none.
        correct: share of them where the event happened; None where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    correct: float | None


def reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """The bins that `expected_calibration_error` averages over, in order.

    Args:
        confidence: shape `(n,)`, probabilities.
        correct: shape `(n,)`, the event with that probability happened.

    Examples:
        >>> last = reliability(np.array([0.95, 1.0, 0.2]), np.array([True, False, False]))[-1]
        >>> last.images, round(last.confidence, 3), last.correct
        (2, 0.975, 0.5)
    """
    place = _bin_of(confidence)
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (confidence, correct)]
    return [
        ReliabilityBin(
            low=number / BINS,
            high=(number + 1) / BINS,
            images=int(count),
            confidence=float(sums[0][number] / count) if count else None,
            correct=float(sums[1][number] / count) if count else None,
        )
        for number, count in enumerate(counts)
    ]


def _bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(np.minimum((confidence * BINS).astype(np.int64), BINS - 1))
