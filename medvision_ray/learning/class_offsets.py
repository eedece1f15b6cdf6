"""Single-label: what is added to each class's ln p before the largest one is named, chosen on the validation split.

A network that favours a class on patients it has not seen does so at validation too, and one number a class takes it back
(the bias of bias-corrected temperature scaling, Alexandari et al. 2020). Probabilities stay as they are. Classes weigh as
they do in the training: without weights the offsets would bring back the shares of the classes that a balanced loss takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from medvision_ray.calibration import log_probabilities
from medvision_ray.config import CalibrateJob, TrainJob
from medvision_ray.evaluation.intervals import mean_interval
from medvision_ray.learning.calibrate import ValidationScores, patient_folds
from medvision_ray.operating_points import named_class

Floats = NDArray[np.float64]

_FOLDS = 5
_RESAMPLES = 1000
_LARGEST = 3.0
"""Bound of the difference of two offsets from the first class's: odds times 20. Beyond, a class would hardly be named."""


@dataclass(frozen=True)
class ClassWeighing:
    """What an image of each class counts, in the fit and in the gain.

    Attributes:
        balanced: classes count alike, however many images of each there are.
        given: a factor a class besides; empty is 1 each.
    """

    balanced: bool = False
    given: tuple[float, ...] = ()

    @staticmethod
    def of(job: TrainJob | CalibrateJob) -> ClassWeighing:
        """As the training's loss and sampling weigh them; a site's own patients count as they come."""
        if isinstance(job, CalibrateJob):
            return ClassWeighing()
        weights = job.loss.class_weights
        return ClassWeighing("balanced" in (job.sampling, weights), () if isinstance(weights, str) else weights)

    @property
    def measure(self) -> str:
        """What accuracy is called when it is weighed so."""
        return "weighted accuracy" if self.given else "mean recall" if self.balanced else "accuracy"

    def of_images(self, labels: NDArray[np.integer], classes: int) -> Floats:
        """Shape `(n,)`, 1 on average."""
        of_class = np.asarray(self.given or (1.0,) * classes, np.float64)
        if self.balanced:
            of_class = of_class / np.maximum(np.bincount(labels, minlength=classes), 1)
        weights = of_class[labels]
        return np.asarray(weights / weights.mean(), np.float64)


@dataclass(frozen=True)
class ChosenOffsets:
    """The outcome.

    Attributes:
        offsets: one a class, the largest 0; empty where the likeliest class is named.
        facts: for the bundle's `trained`: `images`, `patients`, `best` by class, `measure` (of `ClassWeighing`), and the `gain`
            in it with its 95 % interval; `reason` where nothing changes.
    """

    offsets: tuple[float, ...]
    facts: dict[str, Any]


def choose_class_offsets(
    scores: ValidationScores,
    *,
    min_class_patients: int,
    weighing: ClassWeighing = ClassWeighing(),
    before: Sequence[float] = (),
) -> ChosenOffsets:
    """Those with the least negative log-likelihood, if they name classes better on patients they were not fitted to.

    Args:
        scores: of the validation split, single-label.
        min_class_patients: with fewer patients with a class there is no choice.
        weighing: of the classes, in the fit and in the gain.
        before: offsets that the model has already: what is compared with, and kept where nothing is shown to be better.
    """
    used = scores.take(np.flatnonzero(~np.isnan(scores.truth).any(axis=1)))
    kept = tuple(before)
    facts: dict[str, Any] = {"images": len(used.truth), "patients": len(set(used.patients.tolist()))}
    for k, name in enumerate(scores.classes):
        count = used.patients_with(k, 1.0)
        if count < min_class_patients:
            reason = (
                f"{count} validation patients with {name}, and `operating_points.min_class_patients` is "
                f"{min_class_patients}"
            )
            return ChosenOffsets(kept, {**facts, "reason": reason})
    if len(scores.classes) < 2:
        return ChosenOffsets(kept, {**facts, "reason": "one class, so there is none to name in place of it"})
    if facts["patients"] < _FOLDS:
        return ChosenOffsets(kept, {**facts, "reason": f"fewer than {_FOLDS} validation patients"})
    labels = used.truth.argmax(axis=1)
    weights = weighing.of_images(labels, len(scores.classes))
    right_before = named_class(used.probabilities, kept) == labels
    gains = np.zeros(len(labels))
    for fold in patient_folds(used.patients, _FOLDS):
        offsets = fit_offsets(used.probabilities[~fold], labels[~fold], weights[~fold])
        right = named_class(used.probabilities[fold], offsets) == labels[fold]
        gains[fold] = weights[fold] * (right.astype(float) - right_before[fold])
    interval = mean_interval(gains, used.patients, resamples=_RESAMPLES, seed=0)
    best = fit_offsets(used.probabilities, labels, weights)
    facts["measure"] = weighing.measure
    facts["best"] = dict(zip(scores.classes, best, strict=True))
    facts["gain"] = [_rounded(value) for value in (gains.mean(), *(interval or ()))]
    if interval is None or interval[0] <= 0:
        return ChosenOffsets(kept, {**facts, "reason": "not shown to be better on patients that it was not fitted to"})
    return ChosenOffsets(best, facts)


def fit_offsets(
    probabilities: NDArray[np.floating[Any]], labels: NDArray[np.integer], weights: Floats
) -> tuple[float, ...]:
    """Offsets b with the least weighted mean of -ln softmax(ln p + b)[label]; the largest is 0.

    Args:
        probabilities: raw, shape `(n, K)`.
        labels: index of the true class, shape `(n,)`.
        weights: of the images, shape `(n,)`.
    """
    logs = log_probabilities(probabilities)
    images, classes = logs.shape
    share = np.bincount(labels, weights, minlength=classes) / images

    def loss(free: Floats) -> tuple[float, Floats]:
        shifted = logs + np.concatenate([[0.0], free])
        likelihood = shifted[np.arange(images), labels] - logsumexp(shifted, axis=1)
        stated = weights @ softmax(shifted, axis=1) / images
        return -float(weights @ likelihood) / images, stated[1:] - share[1:]

    bounds = [(-_LARGEST, _LARGEST)] * (classes - 1)
    found = np.concatenate([[0.0], minimize(loss, np.zeros(classes - 1), jac=True, bounds=bounds, method="L-BFGS-B").x])
    return tuple(_rounded(value) for value in found - found.max())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
