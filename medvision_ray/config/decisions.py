"""What a training fits to its validation split besides the weights: the calibration, and points to decide at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medvision_ray.config.sections import Positive, Section

_Open = Annotated[float, Field(gt=0, lt=1)]


class CalibrationConfig(Section):
    """Calibrated probabilities, fitted to the validation split after training."""

    method: Literal["auto", "none"] = "auto"
    """`auto`: one temperature (single-label; Guo 2017), Platt's sigmoid for each finding (multi-label; Platt 1999); `none`."""
    min_patients: Positive = 20
    """With fewer validation patients there is no calibration; a finding counts those where it is not blank."""
    min_class_patients: Positive = 5
    """Nor with fewer of them with, or without, each class (single-label), or the finding that it is for (multi-label)."""
    only_if_better: bool = True
    """Keep it only where it lowers the log loss of validation patients it was not fitted to, 95 % interval over patients above 0."""


class OperatingPointsConfig(Section):
    """Thresholds chosen on the validation split, stored in the bundle and never fitted again (docs/training.md)."""

    at_specificity: tuple[_Open, ...] = (0.9, 0.95)
    """Points with the largest sensitivity that has at least this specificity: `specificity_90`, `specificity_95`."""
    at_sensitivity: tuple[_Open, ...] = ()
    """Points with the largest specificity that has at least this sensitivity: `sensitivity_95`, for screening."""
    f1: bool = True
    """The point `f1`, with the largest F1."""
    cost: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """The point `cost`, with the least cost: of a missed image and of a false alarm, such as [10, 1]; at validation's prevalence."""
    positive_class: str | None = None
    """Single-label: the class that has a threshold; null is the last of two classes, or each of more against the rest."""
    min_class_patients: Positive = 5
    """A class with fewer validation patients with, or without, it has no threshold."""
    decide_at: str | None = None
    """Multi-label: the point, such as `f1`, whose thresholds decide which findings a row names; null decides at 0.5."""

    class_offsets: Literal["auto", "none"] = "none"
    """Single-label: `auto` adds a number a class to ln p before the largest is named, if that is shown to be better on validation."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points, in order."""
        fixed = (("specificity", self.at_specificity), ("sensitivity", self.at_sensitivity))
        found = [point_name(kind, value) for kind, values in fixed for value in values]
        return (*found, *(["f1"] if self.f1 else []), *(["cost"] if self.cost else []))

    @model_validator(mode="after")
    def _consistent(self) -> OperatingPointsConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError("`at_specificity` and `at_sensitivity` must hold different values")
        if self.decide_at is not None and self.decide_at not in self.names:
            raise ValueError(f"`decide_at` must name a point ({', '.join(self.names)}), but it is {self.decide_at!r}")
        return self


def point_name(kind: str, value: float) -> str:
    """`specificity_95` of `specificity` and 0.95, `specificity_97_5` of 0.975."""
    return f"{kind}_{100 * value:g}".replace(".", "_")


class SitePointsConfig(OperatingPointsConfig):
    """The same, fitted to a site's own patients."""

    class_offsets: Literal["auto", "none"] = "auto"
    """Single-label: `auto` replaces the bundle's offsets where others are shown to be better here; `none` takes them away."""
