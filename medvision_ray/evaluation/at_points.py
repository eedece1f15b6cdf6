"""Sensitivity, specificity, PPV and NPV at a bundle's stored operating points; nothing is chosen here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medvision_ray.evaluation.classification import OneVsRest
from medvision_ray.evaluation.mask_detail import Ratios
from medvision_ray.operating_points import OperatingPoint

RATES = ("sensitivity", "specificity", "ppv", "npv")


def point_metric(rate: str, point: str) -> str:
    """Name of the metric: `sensitivity@f1`."""
    return f"{rate}@{point}"


def at_points(view: OneVsRest, points: Sequence[OperatingPoint]) -> Ratios:
    """The four rates of each class that has a threshold, at each point.

    PPV and NPV hold for the prevalence of the measured images alone.

    Args:
        view: truth and raw probabilities.
        points: of the bundle, chosen on its validation split.
    """
    columns = {}
    for point in points:
        flagged = point.apply(view.scores)
        for k, one in enumerate(point.thresholds):
            if one is None:
                continue
            known, yes, found = view.known[:, k], view.positive[:, k], flagged[:, k]
            right = {
                "sensitivity": (yes & found, yes),
                "specificity": (known & ~yes & ~found, known & ~yes),
                "ppv": (yes & found, known & found),
                "npv": (known & ~yes & ~found, known & ~found),
            }
            for rate in RATES:
                columns[view.classes[k], point_metric(rate, point.name)] = right[rate]
    return Ratios(
        keys=tuple(columns),
        numerators=np.stack([top for top, _ in columns.values()], axis=1).astype(np.float64),
        denominators=np.stack([bottom for _, bottom in columns.values()], axis=1).astype(np.float64),
    )
