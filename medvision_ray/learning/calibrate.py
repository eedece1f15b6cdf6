"""Fit a calibration to the validation split: one temperature, or Platt's sigmoid for each finding, or none and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from medvision_ray.calibration import Calibration, PlattScaling, TemperatureScaling, log_probabilities, logits
from medvision_ray.config import CalibrationConfig
from medvision_ray.evaluation.intervals import mean_interval

Floats = NDArray[np.float64]

_TEMPERATURES = (0.05, 20.0)
_FOLDS = 5
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """What a calibration and operating points are made from; images of the validation split only.

    Attributes:
        classes: names of the K classes or findings.
        multi_label: classes are findings that may occur together.
        probabilities: raw, float32 as scoring writes them, shape `(n, K)`.
        truth: 1, 0 or NaN (not known), one class against the rest, shape `(n, K)`.
        patients: shape `(n,)`.
    """

    classes: tuple[str, ...]
    multi_label: bool
    probabilities: NDArray[np.float32]
    truth: Floats
    patients: NDArray[np.str_]

    def take(self, rows: NDArray[Any]) -> ValidationScores:
        """Some images."""
        return ValidationScores(
            self.classes, self.multi_label, self.probabilities[rows], self.truth[rows], self.patients[rows]
        )

    def patients_with(self, k: int, value: float) -> int:
        """Patients with an image whose class `k` is 1 or 0."""
        return int(np.unique(self.patients[self.truth[:, k] == value]).size)


@dataclass(frozen=True, eq=False)
class FittedCalibration:
    """The outcome.

    Attributes:
        calibration: None where there is too little to fit it to, or nothing to fit.
        out_of_fold: calibrated probabilities of the same images, each by a fit to other patients' images, so that what
            is measured on them does not flatter; `(n, K)`, NaN where that could not be fitted. None without a calibration.
        facts: `method`, `patients`, and `reason` or `reasons` (of a class or finding) why not, for the bundle's `trained`.
    """

    calibration: Calibration | None
    out_of_fold: Floats | None
    facts: dict[str, Any]


def one_against_rest(labels: NDArray[np.integer], n_classes: int) -> Floats:
    """The `truth` of single-label images, shape `(n, K)`.

    Args:
        labels: index of the class, below 0 where it is not known, shape `(n,)`.
    """
    return np.where(labels[:, None] >= 0, labels[:, None] == np.arange(n_classes), np.nan)


def fit_calibration(scores: ValidationScores, config: CalibrationConfig) -> FittedCalibration:
    """Fit what `config` asks for to the validation split.

    Single-label: the temperature with the least negative log-likelihood (Guo et al. 2017). Multi-label: Platt's sigmoid,
    fitted to his smoothed targets (Platt 1999, section 2.2), for each finding by itself.

    Args:
        scores: of the validation split.
        config: method, and how many patients it takes.
    """
    if config.method == "none" or not scores.classes:
        reason = "`calibration.method` is none" if scores.classes else "the model has no classification head"
        return FittedCalibration(None, None, {"method": "none", "reason": reason})
    labelled = scores.patients[~np.isnan(scores.truth).all(axis=1)]
    facts: dict[str, Any] = {"patients": int(np.unique(labelled).size)}
    reasons = {name: why for k, name in enumerate(scores.classes) if (why := _too_few(scores, k, config)) is not None}
    fitted = _fit_findings(scores, reasons) if scores.multi_label else _fit_classes(scores, reasons)
    out_of_fold = None if fitted is None else _out_of_fold(scores, fitted)
    if fitted is not None and out_of_fold is not None and config.only_if_better:
        fitted = _shown_better(scores, fitted, out_of_fold, reasons)
    if reasons:
        facts["reasons"] = reasons
    if fitted is None:
        return FittedCalibration(None, None, {"method": "none", **facts})
    return FittedCalibration(fitted, out_of_fold, {"method": fitted.document()["method"], **facts})


def fit_temperature(probabilities: NDArray[np.floating[Any]], truth: Floats) -> float | None:
    """The temperature with the least negative log-likelihood; None where the best is beyond 0.05 or 20.

    Where every image is told right, lower is better without end, so there is none either.

    Args:
        probabilities: raw, shape `(n, K)`.
        truth: 1 for the true class, NaN where not known, shape `(n, K)`.
    """
    known = ~np.isnan(truth).any(axis=1)
    if not known.any():
        return None
    scores, labels = log_probabilities(probabilities[known]), truth[known].argmax(axis=1)
    if (scores.argmax(axis=1) == labels).all():
        return None

    def loss(log_temperature: float) -> float:
        scaled = scores * math.exp(-log_temperature)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]).mean())

    low, high = (math.log(limit) for limit in _TEMPERATURES)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8}).x)
    at_a_limit = min(found - low, high - found) < 1e-3
    return None if at_a_limit else _rounded(math.exp(found))


def fit_sigmoid(probabilities: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> tuple[float, float] | None:
    """Platt's `(a, b)` of sigmoid(a * logit + b); None where a is not above 0.

    Args:
        probabilities: raw, of one finding, shape `(n,)`.
        positive: the finding is there, shape `(n,)`.
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    targets = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    raw = logits(probabilities)
    centre, spread = float(raw.mean()), float(raw.std())
    if not spread > 0:
        return None
    scores = (raw - centre) / spread  # on the scale that the optimiser expects

    def loss(pair: Floats) -> tuple[float, Floats]:
        line = pair[0] * scores + pair[1]
        error = np.exp(-np.logaddexp(0.0, -line)) - targets
        return float((np.logaddexp(0.0, line) - targets * line).mean()), np.array(
            [(error * scores).mean(), error.mean()]
        )

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    a = _rounded(float(found[0]) / spread)
    b = _rounded(float(found[1]) - float(found[0]) * centre / spread)
    return (a, b) if math.isfinite(a) and math.isfinite(b) and a > 0 else None


def _fit_classes(scores: ValidationScores, reasons: dict[str, str]) -> TemperatureScaling | None:
    """One temperature, unless `reasons` says that a class is too rare; adds the reason where none is best."""
    if reasons:
        return None
    temperature = fit_temperature(scores.probabilities, scores.truth)
    if temperature is None:
        low, high = _TEMPERATURES
        reasons["all"] = (
            f"no temperature between {low:g} and {high:g} is the likeliest: the validation labels are told too well, or not"
        )
        return None
    return TemperatureScaling(temperature)


def _fit_findings(scores: ValidationScores, reasons: dict[str, str]) -> PlattScaling | None:
    """Each finding that `reasons` does not rule out; adds the reasons of those that cannot be fitted."""
    sigmoids: list[tuple[float, float] | None] = []
    for k, name in enumerate(scores.classes):
        pair = None
        if name not in reasons:
            pair = _fit_finding(scores, k)
            if pair is None:
                reasons[name] = "higher probabilities do not mean that the finding is likelier"
        sigmoids.append(pair)
    return PlattScaling(tuple(sigmoids)) if any(sigmoids) else None


def _fit_finding(scores: ValidationScores, k: int) -> tuple[float, float] | None:
    known = ~np.isnan(scores.truth[:, k])
    return fit_sigmoid(scores.probabilities[known, k], scores.truth[known, k] == 1)


def _too_few(scores: ValidationScores, k: int, config: CalibrationConfig) -> str | None:
    """Why class `k` is too rare on the validation split; None where it is not."""
    known = np.unique(scores.patients[~np.isnan(scores.truth[:, k])]).size
    if known < config.min_patients:
        return f"{known} validation patients, and `calibration.min_patients` is {config.min_patients}"
    for value, kind in ((1.0, "with"), (0.0, "without")):
        count = scores.patients_with(k, value)
        if count < config.min_class_patients:
            return (
                f"{count} validation patients {kind} it, and `calibration.min_class_patients` is "
                f"{config.min_class_patients}"
            )
    return None


def _out_of_fold(scores: ValidationScores, fitted: Calibration) -> Floats:
    """Each image calibrated by a fit to the other folds' patients."""
    found = np.full(scores.probabilities.shape, np.nan)
    for fold in patient_folds(scores.patients, _FOLDS):
        inside, outside = scores.take(fold), scores.take(~fold)
        if isinstance(fitted, TemperatureScaling):
            temperature = fit_temperature(outside.probabilities, outside.truth)
            if temperature is not None:
                found[fold] = TemperatureScaling(temperature).apply(inside.probabilities)
            continue
        pairs = tuple(None if pair is None else _fit_finding(outside, k) for k, pair in enumerate(fitted.sigmoids))
        found[fold] = PlattScaling(pairs).apply(inside.probabilities)
    return found


def _shown_better(
    scores: ValidationScores, fitted: Calibration, out_of_fold: Floats, reasons: dict[str, str]
) -> Calibration | None:
    """What of a calibration is better on patients that it was not fitted to; takes the rest out of `out_of_fold`.

    The validation split chose the epoch, so the model is surer of itself there than on new patients: a small gain is none.
    """
    if isinstance(fitted, TemperatureScaling):
        known = ~np.isnan(scores.truth).any(axis=1)
        true = scores.truth[known].argmax(axis=1)[:, None]
        raw, calibrated = (
            -np.take_along_axis(log_probabilities(values[known]), true, axis=1)[:, 0]
            for values in (scores.probabilities, out_of_fold)
        )
        why = _no_gain(raw - calibrated, scores.patients[known])
        if why is not None:
            reasons["all"] = why
        return fitted if why is None else None
    sigmoids = list(fitted.sigmoids)
    for k, name in enumerate(scores.classes):
        known = ~np.isnan(scores.truth[:, k])
        if sigmoids[k] is None:
            continue
        there = scores.truth[known, k] == 1
        raw, calibrated = (
            np.logaddexp(0.0, np.where(there, -1, 1) * logits(values[known, k]))
            for values in (scores.probabilities, out_of_fold)
        )
        why = _no_gain(raw - calibrated, scores.patients[known])
        if why is not None:
            reasons[name], sigmoids[k] = why, None
            out_of_fold[:, k] = np.nan
    return PlattScaling(tuple(sigmoids)) if any(sigmoids) else None


def _no_gain(gains: Floats, patients: NDArray[np.str_]) -> str | None:
    """Why a mean gain, `(n,)` an image, is not shown to be above 0; None where it is."""
    interval = None if np.isnan(gains).any() else mean_interval(gains, patients, resamples=_RESAMPLES, seed=0)
    if interval is not None and interval[0] > 0:
        return None
    shown = f"{gains.mean():.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "not defined"
    return f"not shown to be better: log loss on validation patients it was not fitted to falls by {shown}"


def patient_folds(patients: NDArray[np.str_], folds: int) -> Sequence[NDArray[np.bool_]]:
    """Masks of shape `(n,)` that share the images out by patient, the same for the same patients."""
    index = np.unique(patients, return_inverse=True)[1].reshape(-1)
    order = np.random.default_rng(0).permutation(int(index.max()) + 1)
    return [order[index] % folds == fold for fold in range(folds)]


def _rounded(value: float) -> float:
    """Six digits: what differs beyond is the optimiser's, and a bundle's identity should not depend on it."""
    return float(f"{value:.6g}")
