"""Points to decide at: thresholds on raw probabilities, chosen on validation and kept in the bundle. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.calibration import log_probabilities

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class ClassThreshold:
    """One class's threshold, and what it did on the validation split that it was chosen on.

    Attributes:
        threshold: the class counts as present from this raw probability on.
        sensitivity: on validation; new patients will be told less well.
        specificity: on validation.
        true_positives: validation images.
        false_positives: validation images.
        false_negatives: validation images.
        true_negatives: validation images.
        patients: of these images.
    """

    threshold: float
    sensitivity: float
    specificity: float
    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    patients: int


@dataclass(frozen=True)
class OperatingPoint:
    """A named way to decide, each class by itself against the rest.

    Attributes:
        name: such as `f1` or `specificity_95`; part of the metrics' names.
        rule: what was looked for, in words.
        thresholds: one a class of the bundle, in their order; None for a class that has none: too rare on
            validation, or the other one of two classes, which is decided where the first is not.
    """

    name: str
    rule: str
    thresholds: tuple[ClassThreshold | None, ...]

    @property
    def values(self) -> NDArray[np.float32]:
        """The thresholds, shape `(K,)`; NaN for none."""
        return np.array([np.nan if one is None else one.threshold for one in self.thresholds], np.float32)

    def apply(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Which classes count as present.

        Args:
            probabilities: raw, shape `(N, K)`; compared in float32, as prediction rows hold them.

        Returns:
            Shape `(N, K)`; False throughout for a class without a threshold.
        """
        return np.asarray(probabilities, np.float32) >= self.values

    def by_class(self, classes: Sequence[str]) -> dict[str, Any]:
        """The rule, and the facts of each class that has a threshold, for people."""
        found = zip(classes, self.thresholds, strict=True)
        return {"rule": self.rule, "classes": {name: asdict(one) for name, one in found if one is not None}}

    def document(self) -> dict[str, Any]:
        """As it stands in `bundle.yaml`."""
        thresholds = [None if one is None else asdict(one) for one in self.thresholds]
        return {"name": self.name, "rule": self.rule, "thresholds": thresholds}


def read_operating_points(document: Any, n_classes: int) -> tuple[OperatingPoint, ...] | None:
    """The points that `document` describes, or None where it describes none that fit the bundle's classes."""
    if not isinstance(document, list) or not document:
        return None
    points = [_read_point(item, n_classes) for item in document]
    found = tuple(point for point in points if point is not None)
    names = {point.name for point in found}
    return found if len(names) == len(document) else None


def _read_point(item: Any, n_classes: int) -> OperatingPoint | None:
    if not isinstance(item, dict) or set(item) != {"name", "rule", "thresholds"}:
        return None
    name, rule, thresholds = item["name"], item["rule"], item["thresholds"]
    named = isinstance(name, str) and _NAME.fullmatch(name) and isinstance(rule, str)
    if not named or not isinstance(thresholds, list) or len(thresholds) != n_classes:
        return None
    read = tuple(_read_threshold(one) for one in thresholds)
    missing = [one is None for one in read]
    if missing != [one is None for one in thresholds] or all(missing):
        return None
    return OperatingPoint(name, rule, read)


def _read_threshold(one: Any) -> ClassThreshold | None:
    if not isinstance(one, dict) or set(one) != {item.name for item in fields(ClassThreshold)}:
        return None
    shares = [one[name] for name in ("threshold", "sensitivity", "specificity")]
    counts = [value for name, value in one.items() if name not in ("threshold", "sensitivity", "specificity")]
    probabilities = all(isinstance(value, float) and 0.0 <= value <= 1.0 for value in shares)
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in counts)
    return ClassThreshold(**one) if probabilities and whole else None


def named_class(probabilities: NDArray[np.floating[Any]], offsets: Sequence[float]) -> NDArray[np.intp]:
    """Single-label: index of the class that is named, the one with the largest ln p + offset.

    Args:
        probabilities: raw, shape `(..., K)`.
        offsets: one a class, or none: the likeliest class is named.
    """
    if not len(offsets):
        return np.asarray(probabilities.argmax(axis=-1))
    return np.asarray((log_probabilities(probabilities) + np.asarray(offsets)).argmax(axis=-1))
