"""Choose operating points on the validation split: thresholds a class, with what they did there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray.config import OperatingPointsConfig
from medvision_ray.config.decisions import point_name
from medvision_ray.errors import ConfigError
from medvision_ray.learning.calibrate import ValidationScores
from medvision_ray.operating_points import ClassThreshold, OperatingPoint

Floats = NDArray[np.float64]
_SLACK = 1e-9  # 0.9 * 10 is not 9 in floating point


@dataclass(frozen=True, eq=False)
class _Cuts:
    """What each possible threshold of one class does, shape `(C,)`, from the highest threshold down."""

    thresholds: NDArray[np.float32]
    hits: Floats
    alarms: Floats
    positives: int
    negatives: int

    @property
    def sensitivity(self) -> Floats:
        return self.hits / self.positives

    @property
    def specificity(self) -> Floats:
        return 1 - self.alarms / self.negatives


_Choice = Callable[[_Cuts], "int | None"]


def choose_points(
    scores: ValidationScores, config: OperatingPointsConfig
) -> tuple[tuple[OperatingPoint, ...], dict[str, str]]:
    """Points of the validation split, and why a class has no threshold.

    A threshold lies half way between two probabilities of validation images, so that rounding does not turn one over.

    Args:
        scores: of the validation split.
        config: which points.
    """
    reasons: dict[str, str] = {}
    cuts: list[_Cuts | None] = []
    for k, name in enumerate(scores.classes):
        why = _why_not(scores, k, config)
        if why is not None:
            reasons[name] = why
        cuts.append(_cuts(scores, k) if why is None else None)
    points = [
        OperatingPoint(
            name, rule, tuple(_threshold(scores, k, cut, choice) if cut else None for k, cut in enumerate(cuts))
        )
        for name, (rule, choice) in _choices(config).items()
    ]
    return tuple(point for point in points if any(point.thresholds)), reasons


def decided_thresholds(
    points: tuple[OperatingPoint, ...], config: OperatingPointsConfig, defaults: Sequence[float]
) -> list[float]:
    """The thresholds by which a multi-label bundle names findings; its one of `defaults` for a finding without one."""
    chosen = next((point for point in points if point.name == config.decide_at), None)
    found = chosen.thresholds if chosen else (None,) * len(defaults)
    return [float(default) if one is None else one.threshold for one, default in zip(found, defaults, strict=True)]


def check_positive_class(config: OperatingPointsConfig, classes: tuple[str, ...]) -> None:
    """Before anything is trained: the class is one of the table's.

    Raises:
        ConfigError: it is not.
    """
    if config.positive_class is not None and classes and config.positive_class not in classes:
        raise ConfigError(
            f"Expected `operating_points.positive_class` to be one of the classes ({', '.join(classes)}), but got "
            f"{config.positive_class!r}."
        )


def _why_not(scores: ValidationScores, k: int, config: OperatingPointsConfig) -> str | None:
    name, classes = scores.classes[k], scores.classes
    chosen = config.positive_class or (classes[-1] if len(classes) == 2 else None)
    if not scores.multi_label and chosen is not None and name != chosen:
        return f"the threshold is on {chosen}"
    for value, kind in ((1.0, "with"), (0.0, "without")):
        count = scores.patients_with(k, value)
        if count < config.min_class_patients:
            return (
                f"{count} validation patients {kind} it, and `operating_points.min_class_patients` is "
                f"{config.min_class_patients}"
            )
    return None


def _cuts(scores: ValidationScores, k: int) -> _Cuts:
    known = ~np.isnan(scores.truth[:, k])
    positive = scores.truth[known, k] == 1
    values, place = np.unique(scores.probabilities[known, k].astype(np.float32), return_inverse=True)
    hits = np.bincount(place, weights=positive, minlength=len(values))[::-1].cumsum()
    flagged = np.bincount(place, minlength=len(values))[::-1].cumsum()
    thresholds = _between(np.concatenate([[np.float32(0)], values]))[::-1]
    if values[-1] < 1:  # a threshold over every image
        thresholds = np.concatenate([_between(np.array([values[-1], 1], np.float32)), thresholds])
        hits, flagged = np.concatenate([[0.0], hits]), np.concatenate([[0], flagged])
    return _Cuts(thresholds, hits, flagged - hits, int(positive.sum()), int((~positive).sum()))


def _between(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32 half way between neighbours, never the lower one (`p >= threshold` must leave it out)."""
    low, high = values[:-1], values[1:]
    middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
    return np.where(middle > low, middle, high)


def _choices(config: OperatingPointsConfig) -> dict[str, tuple[str, _Choice]]:
    """Rule and choice of each point, in the order of `config.names`."""
    found: dict[str, tuple[str, _Choice]] = {}
    for value in config.at_specificity:
        rule = f"largest sensitivity with a specificity of at least {value:g}"
        found[point_name("specificity", value)] = rule, _at_specificity(value)
    for value in config.at_sensitivity:
        rule = f"largest specificity with a sensitivity of at least {value:g}"
        found[point_name("sensitivity", value)] = rule, _at_sensitivity(value)
    if config.f1:
        found["f1"] = "largest F1", lambda cuts: _best(2 * cuts.hits / (cuts.positives + cuts.hits + cuts.alarms))
    if config.cost is not None:
        found["cost"] = (
            f"least cost, {config.cost[0]:g} a missed image and {config.cost[1]:g} a false alarm",
            _at_cost(*config.cost),
        )
    return found


def _at_specificity(value: float) -> _Choice:
    return lambda cuts: _best(np.where(cuts.specificity >= value - _SLACK, cuts.sensitivity, -1.0))


def _at_sensitivity(value: float) -> _Choice:
    return lambda cuts: _best(np.where(cuts.sensitivity >= value - _SLACK, cuts.specificity, -1.0))


def _at_cost(missed: float, alarm: float) -> _Choice:
    return lambda cuts: _best(-(missed * (cuts.positives - cuts.hits) + alarm * cuts.alarms), lowest=-np.inf)


def _best(values: Floats, lowest: float = 0.0) -> int | None:
    """The first, so the highest threshold, of the best; None where none reaches `lowest`."""
    place = int(values.argmax())
    return place if values[place] >= lowest else None


def _threshold(scores: ValidationScores, k: int, cuts: _Cuts, choice: _Choice) -> ClassThreshold | None:
    place = choice(cuts)
    if place is None:
        return None
    hits, alarms = int(cuts.hits[place]), int(cuts.alarms[place])
    return ClassThreshold(
        threshold=float(cuts.thresholds[place]),
        sensitivity=float(cuts.sensitivity[place]),
        specificity=float(cuts.specificity[place]),
        true_positives=hits,
        false_positives=alarms,
        false_negatives=cuts.positives - hits,
        true_negatives=cuts.negatives - alarms,
        patients=int(np.unique(scores.patients[~np.isnan(scores.truth[:, k])]).size),
    )
