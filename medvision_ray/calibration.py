"""Calibrated probabilities out of raw ones: temperature scaling, or Platt's sigmoid for each finding. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SMALLEST = float(np.finfo(np.float32).tiny)  # probabilities are float32: below is 0
_LARGEST = 1.0 - 2.0**-24  # the float32 below 1


@dataclass(frozen=True)
class TemperatureScaling:
    """Single-label: softmax of logits over one temperature (Guo et al. 2017, section 4.2). The likeliest class stays.

    Attributes:
        temperature: above 1 for a model that is too sure of itself.
    """

    temperature: float

    def apply(self, probabilities: NDArray[np.floating[Any]]) -> Floats:
        """Calibrated probabilities.

        Args:
            probabilities: raw softmax outputs, shape `(N, K)`; their logarithms are logits up to a constant.

        Returns:
            Shape `(N, K)`; rows sum to 1.
        """
        scaled = log_probabilities(probabilities) / self.temperature
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def document(self) -> dict[str, Any]:
        """As it stands in `bundle.yaml`."""
        return {"method": "temperature", "temperature": self.temperature}


@dataclass(frozen=True)
class PlattScaling:
    """Multi-label: sigmoid(a * logit + b) for each finding (Platt 1999). The order of a finding's images stays.

    Attributes:
        sigmoids: `(a, b)` a finding, a above 0; None for a finding that could not be calibrated.
    """

    sigmoids: tuple[tuple[float, float] | None, ...]

    def apply(self, probabilities: NDArray[np.floating[Any]]) -> Floats:
        """Calibrated probabilities.

        Args:
            probabilities: raw sigmoid outputs, shape `(N, K)`.

        Returns:
            Shape `(N, K)`; NaN in the column of a finding that could not be calibrated.
        """
        slopes, offsets = np.array([pair or (math.nan, math.nan) for pair in self.sigmoids]).T
        scores = slopes * logits(probabilities) + offsets
        with np.errstate(invalid="ignore"):  # NaN is meant
            # Not 1 / (1 + exp(-x)): that overflows for confident negatives.
            return np.asarray(np.exp(-np.logaddexp(0.0, -scores)))

    def document(self) -> dict[str, Any]:
        """As it stands in `bundle.yaml`."""
        return {"method": "platt", "sigmoids": [None if pair is None else list(pair) for pair in self.sigmoids]}


Calibration = TemperatureScaling | PlattScaling


def log_probabilities(probabilities: NDArray[np.floating[Any]]) -> Floats:
    """Natural logarithms in float64; 0 counts as the smallest normal float32."""
    return np.asarray(np.log(np.asarray(probabilities, np.float64).clip(_SMALLEST, 1.0)))


def logits(probabilities: NDArray[np.floating[Any]]) -> Floats:
    """Logits in float64; 0 and 1 count as the nearest float32 inside."""
    inside = np.asarray(probabilities, np.float64).clip(_SMALLEST, _LARGEST)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def read_calibration(document: Any, n_classes: int, multi_label: bool) -> Calibration | None:
    """The calibration that `document` describes, or None where it describes none that fits the bundle's classes."""
    if not isinstance(document, dict):
        return None
    if set(document) == {"method", "temperature"} and document["method"] == "temperature" and not multi_label:
        temperature = document["temperature"]
        return TemperatureScaling(temperature) if _is_finite(temperature) and temperature > 0 and n_classes else None
    if set(document) == {"method", "sigmoids"} and document["method"] == "platt" and multi_label:
        sigmoids = document["sigmoids"]
        if isinstance(sigmoids, list) and len(sigmoids) == n_classes and all(map(_is_sigmoid, sigmoids)):
            return PlattScaling(tuple(None if pair is None else (pair[0], pair[1]) for pair in sigmoids))
    return None


def _is_sigmoid(pair: Any) -> bool:
    if pair is None:
        return True
    return isinstance(pair, list) and len(pair) == 2 and all(map(_is_finite, pair)) and pair[0] > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
