"""How many patients a metric rests on: of few, no resampling tells how far off it is.

A bootstrap draws again from the patients that it has. With two patients who have a finding it moves between two values, and
its percentiles hold the true AUROC in about two of three studies; two models that are alike then seem to differ in one
of four (`tests/evaluation/test_coverage.py`). So a metric of fewer than `intervals.FEWEST_PATIENTS` has no interval.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from medvision_ray.evaluation.classification import OneVsRest
from medvision_ray.evaluation.intervals import Key
from medvision_ray.evaluation.mask_detail import Ratios
from medvision_ray.evaluation.segmentation import MaskView, overlap_members

Bools = NDArray[np.bool_]

_OVER_KNOWN = ("accuracy", "brier", "log_loss", "brier_calibrated", "log_loss_calibrated")


def patients_of(patients: NDArray[np.str_], members: Bools) -> NDArray[np.int64]:
    """How many patients have an image in each of M groups.

    Args:
        patients: shape `(n,)`, whose image each is.
        members: shape `(n, M)`.

    Returns:
        Shape `(M,)`.
    """
    return np.array([np.unique(patients[member]).size for member in members.T], dtype=np.int64)


def class_carriers(view: OneVsRest, keys: Iterable[Key]) -> dict[Key, int]:
    """Of metrics of `plain_metrics`.

    Recall rests on the patients with an image of the class, specificity on those with one of another; what sets a class against
    the rest, on the fewer of both; `macro`, and balanced accuracy of single-label data, on the class that has the fewest.
    """
    having = patients_of(view.patients, view.positive)
    lacking = patients_of(view.patients, view.known & ~view.positive)
    known = patients_of(view.patients, view.known)
    fewer = np.minimum(having, lacking)
    index = {name: k for k, name in enumerate(view.classes)}
    found: dict[Key, int] = {}
    for name, metric in keys:
        rests_on = {"recall": having, "specificity": lacking}.get(metric, known if metric in _OVER_KNOWN else fewer)
        if name in index:
            found[name, metric] = int(rests_on[index[name]])
        elif name == "all" and metric != "balanced_accuracy":
            found[name, metric] = int(np.unique(view.patients).size)
        else:
            of_present = (having if name == "all" else rests_on)[view.present]
            found[name, metric] = int(of_present.min()) if of_present.size else 0
    return found


def overlap_carriers(view: MaskView) -> dict[Key, int]:
    """Of each metric of `plain_overlaps`: the patients with a true mask in the group."""
    keys, members = overlap_members(view)
    return dict(zip(keys, patients_of(view.patients, members).tolist(), strict=True))


def ratio_carriers(ratios: Ratios, patients: NDArray[np.str_]) -> dict[Key, int]:
    """Of each ratio: the patients of the images that take part in it."""
    counts = patients_of(patients, ratios.denominators > 0)
    return dict(zip(ratios.keys, counts.tolist(), strict=True))
