"""Tests of two models on the same images: DeLong for AUROC, over patients, and exact McNemar for right and wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, rankdata

from medvision_ray.evaluation.intervals import FEWEST_PATIENTS

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class AurocTest:
    """Two AUROCs on the same images.

    Attributes:
        auroc: of the model.
        baseline: of the one it is compared with.
        standard_error: of their difference.
        z: difference over standard error.
        p: two-sided; None where the standard error is 0, as for two models that rank alike.
    """

    auroc: float
    baseline: float
    standard_error: float
    z: float | None
    p: float | None


@dataclass(frozen=True)
class McNemarTest:
    """Who was right where the other was wrong.

    Attributes:
        only_model: images that only the model got right.
        only_baseline: images that only the other one got right.
        p: two-sided, exact (McNemar 1947 with the binomial distribution); 1 where they never differ.
    """

    only_model: int
    only_baseline: int
    p: float


def delong_test(scores: Floats, baseline: Floats, positive: Bools, patients: NDArray[np.str_]) -> AurocTest | None:
    """Test the difference of two AUROCs on the same images, which may be several of a patient.

    The covariance is that of DeLong, DeLong and Clarke-Pearson (1988), with its structural components
    summed over each patient as in Obuchowski (1997): with one image a patient it is DeLong's exactly,
    and with more it does not take the images of a patient for independent.

    Args:
        scores: shape `(n,)`, of the model; higher means more likely positive.
        baseline: shape `(n,)`, of the other one.
        positive: shape `(n,)`.
        patients: shape `(n,)`.

    Returns:
        None where fewer than five patients (`intervals.FEWEST_PATIENTS`) have a positive image, or a negative one.

    Examples:
        >>> scores, baseline = np.array([[0.9, 0.8, 0.7, 0.3, 0.2, 0.75], [0.6, 0.4, 0.9, 0.5, 0.1, 0.7]]).repeat(2, axis=1)
        >>> positive = np.arange(12) < 6
        >>> test = delong_test(scores, baseline, positive, np.arange(12).astype(str))
        >>> round(test.auroc, 4), round(test.baseline, 4)
        (0.8889, 0.6667)
    """
    index = np.unique(patients, return_inverse=True)[1].reshape(-1)
    count = int(index.max()) + 1 if index.size else 0
    positives, negatives = (np.bincount(index[rows], minlength=count) for rows in (positive, ~positive))
    if min((positives > 0).sum(), (negatives > 0).sum()) < FEWEST_PATIENTS:
        return None
    components = [_components(values, positive) for values in (scores, baseline)]
    aurocs = np.array([float(of_positives.mean()) for of_positives, _ in components])
    # Shape (2, patients): what a patient's images add beyond their expected share.
    of_positive = np.stack([np.bincount(index[positive], part, count) for part, _ in components])
    of_negative = np.stack([np.bincount(index[~positive], part, count) for _, part in components])
    of_positive -= aurocs[:, None] * positives
    of_negative -= aurocs[:, None] * negatives
    many, few = int(positives.sum()), int(negatives.sum())
    with_positive, with_negative = int((positives > 0).sum()), int((negatives > 0).sum())
    both = of_positive @ of_negative.T
    covariance = (
        with_positive / (with_positive - 1) * (of_positive @ of_positive.T) / many**2
        + with_negative / (with_negative - 1) * (of_negative @ of_negative.T) / few**2
        + count / (count - 1) * (both + both.T) / (many * few)
    )
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = math.sqrt(max(variance, 0.0))
    difference = float(aurocs[0] - aurocs[1])
    z = difference / error if error > 1e-12 else None
    p = None if z is None else float(2 * norm.sf(abs(z)))
    return AurocTest(float(aurocs[0]), float(aurocs[1]), error, z, p)


def mcnemar_test(correct: Bools, baseline: Bools) -> McNemarTest:
    """Test whether two models are right equally often on the same images.

    Images count as independent: where a patient has several, p is too small, and the interval of the
    difference over patients is the one to go by.

    Args:
        correct: shape `(n,)`, the model was right.
        baseline: shape `(n,)`, the other one was.

    Examples:
        >>> mcnemar_test(np.array([True, True, True, False]), np.array([False, False, True, False]))
        McNemarTest(only_model=2, only_baseline=0, p=0.5)
    """
    only_model, only_baseline = int((correct & ~baseline).sum()), int((baseline & ~correct).sum())
    differing = only_model + only_baseline
    p = float(binomtest(only_model, differing, 0.5).pvalue) if differing else 1.0
    return McNemarTest(only_model, only_baseline, p)


def _components(scores: Floats, positive: Bools) -> tuple[Floats, Floats]:
    """Structural components: of each positive the share of negatives below it, of each negative that of positives above."""
    ranks = rankdata(scores)
    of_positives = (ranks[positive] - rankdata(scores[positive])) / (~positive).sum()
    of_negatives = 1 - (ranks[~positive] - rankdata(scores[~positive])) / positive.sum()
    return of_positives, of_negatives
