"""What a training fits to its validation split besides the weights: the calibration, and points to decide at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
