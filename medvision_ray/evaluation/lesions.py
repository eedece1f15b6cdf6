"""Detection lesion by lesion: which true lesions were found, and what was drawn where there is none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

_TOUCHING = np.ones((3, 3), dtype=np.bool_)  # 8-neighbourhood: pixels that meet at a corner are one lesion


@dataclass(frozen=True)
class LesionCounts:
    """Lesions of one image.

    Attributes:
        true: connected components of the true mask.
        detected: those of them that a predicted component matches.
        false_positives: predicted components that match no true one.
    """

    true: int
    detected: int
    false_positives: int


def match_lesions(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], min_iou: float = 0.0) -> LesionCounts:
    """Match connected components (8-neighbourhood) of two masks.

    A predicted component matches a true one where they share a pixel and, with `min_iou`, where their
    intersection over union is at least that. One predicted component may match several lesions, and
    several may match one; from an IoU above 0.5 a match is one to one by itself.

    Args:
        truth: shape `(rows, columns)`.
        predicted: same shape.
        min_iou: in [0, 1]; 0 takes any overlap.

    Examples:
        >>> truth, predicted = np.zeros((2, 6, 6), bool)
        >>> truth[0:2, 0:2], truth[4:6, 4:6], predicted[0, 0], predicted[3, 0] = True, True, True, True
        >>> match_lesions(truth, predicted)
        LesionCounts(true=2, detected=1, false_positives=1)
        >>> match_lesions(truth, predicted, min_iou=0.5)
        LesionCounts(true=2, detected=0, false_positives=2)
    """
    true_parts, true_count = label(truth, _TOUCHING)
    found_parts, found_count = label(predicted, _TOUCHING)
    both = truth & predicted
    pairs, overlap = np.unique(np.stack([true_parts[both], found_parts[both]]), axis=1, return_counts=True)
    areas = np.bincount(true_parts.reshape(-1))[pairs[0]], np.bincount(found_parts.reshape(-1))[pairs[1]]
    matched = pairs[:, overlap >= min_iou * (areas[0] + areas[1] - overlap)]  # only pairs that touch: few
    return LesionCounts(
        true=int(true_count),
        detected=int(np.unique(matched[0]).size),
        false_positives=int(found_count - np.unique(matched[1]).size),
    )
