"""The probability from which a pixel counts as lesion, chosen on the validation split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle
from medvision_ray.evaluation.intervals import mean_interval
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.calibrate import patient_folds
from medvision_ray.learning.feed import Examples, Integers, plain_batches
from medvision_ray.learning.validation import THRESHOLD
from medvision_ray.scoring.predictor import Predictor

Floats = NDArray[np.float64]

CANDIDATES = np.arange(2, 19) / 20
"""0.1 to 0.9 in steps of 0.05."""
_FOLDS = 5
_RESAMPLES = 1000
_MOST_IMAGES = 2000
_BATCH = 32


@dataclass(frozen=True)
class ChosenThreshold:
    """The outcome.

    Attributes:
        value: 0.5 unless another is shown to be better.
        facts: for the bundle's `trained`: `images`, `patients`, `best`, and `gain` with its 95 % interval; `reason` where
            it is 0.5.
    """

    value: float
    facts: dict[str, Any]


def choose_mask_threshold(
    bundle: Bundle, examples: Examples, rows: Integers, patients: NDArray[np.str_]
) -> ChosenThreshold:
    """The candidate with the best mean score over validation images, if it is better on patients it was not chosen on.

    Args:
        bundle: with a segmentation decoder; scored as a night would, flips included.
        examples: the prepared images and masks.
        rows: of the val split; those with a mask are looked at, and of more than 2,000 a seeded draw.
        patients: of `rows`.
    """
    known = examples.has_mask(rows)
    rows, patients = rows[known], patients[known]
    if len(rows) > _MOST_IMAGES:
        drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST_IMAGES])
        rows, patients = rows[drawn], patients[drawn]
    return choose(score_candidates(bundle, examples, rows), patients)


def choose(scores: Floats, patients: NDArray[np.str_]) -> ChosenThreshold:
    """Choose from each image's score at each candidate, `(n, T)`; `patients` are `(n,)`.

    What choosing gains over 0.5 is measured out of fold by patient, as a calibration's gain is.
    """
    half = int(np.argmin(np.abs(CANDIDATES - THRESHOLD)))
    facts: dict[str, Any] = {"images": len(scores), "patients": len(set(patients.tolist()))}
    if facts["patients"] < _FOLDS:
        return ChosenThreshold(
            THRESHOLD, {**facts, "reason": f"fewer than {_FOLDS} validation patients with a known mask"}
        )
    best = _best(scores)
    gains = np.zeros(len(scores))
    for fold in patient_folds(patients, _FOLDS):
        if fold.any():
            gains[fold] = scores[fold, _best(scores[~fold])] - scores[fold, half]
    interval = mean_interval(gains, patients, resamples=_RESAMPLES, seed=0)
    facts["best"] = float(CANDIDATES[best])
    facts["gain"] = [_rounded(value) for value in (gains.mean(), *(interval or ()))]
    if best == half:
        return ChosenThreshold(THRESHOLD, {**facts, "reason": "no other is better"})
    if interval is None or interval[0] <= 0:
        return ChosenThreshold(
            THRESHOLD, {**facts, "reason": "not shown to be better on patients that it was not chosen on"}
        )
    return ChosenThreshold(float(CANDIDATES[best]), facts)


def score_candidates(bundle: Bundle, examples: Examples, rows: Integers) -> Floats:
    """`scores_by_threshold` of images that all have a mask, which may be empty, `(n, T)`."""
    predictor = Predictor(bundle)
    found = [np.zeros((0, len(CANDIDATES)))]
    for part in plain_batches(rows, batch_size=_BATCH):
        batch = examples.batch(part)
        masks = predictor.predict(batch.images.cpu().numpy()).masks
        assert masks is not None  # the bundle has a decoder
        found.append(scores_by_threshold(masks, batch.masks.cpu().numpy() > 0))
    return np.concatenate(found)


def scores_by_threshold(masks: NDArray[np.float32], truth: NDArray[np.bool_]) -> Floats:
    """Dice of each image at each of `CANDIDATES`, shape `(N, T)`.

    Where the true mask is empty it is 1 if nothing is drawn and else 0, so that lesions drawn in healthy images cost as much.

    Args:
        masks: lesion probabilities on the model's grid, shape `(N, H, W)`.
        truth: of the same shape.
    """
    images = len(masks)
    # How many candidates a pixel's probability reaches; the pixels that reach the k-th are those with at least k + 1.
    reached = np.searchsorted(CANDIDATES.astype(np.float32), masks.reshape(images, -1), side="right")
    bins = len(CANDIDATES) + 1
    place = reached + bins * np.arange(images)[:, None]

    def areas(chosen: NDArray[np.intp]) -> Floats:
        counts = np.bincount(chosen, minlength=images * bins).reshape(images, bins)
        return counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:].astype(np.float64)

    flat = truth.reshape(images, -1)
    predicted, overlap = areas(place.ravel()), areas(place[flat])
    true = np.broadcast_to(flat.sum(axis=1, dtype=np.float64)[:, None], predicted.shape)
    return np.where(true > 0, dice_per_image(overlap, predicted, true), predicted == 0)


def _best(scores: Floats) -> int:
    """Index of the best candidate; of equal ones the nearest to 0.5."""
    means = scores.mean(axis=0)
    best = np.flatnonzero(means >= means.max() - 1e-12)
    return int(best[np.argmin(np.abs(CANDIDATES[best] - THRESHOLD))])


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
