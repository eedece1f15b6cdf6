"""The fields of `bundle.yaml`: what each may be, and which files of an ensemble it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, get_args

from medvision_ray.bundle_files import BUNDLE_YAML
from medvision_ray.calibration import Calibration, read_calibration
from medvision_ray.config.sections import NAME
from medvision_ray.errors import BundleError
from medvision_ray.operating_points import OperatingPoint, read_operating_points

Vote = Literal["soft", "majority"]
VOTES: tuple[Vote, ...] = get_args(Vote)


def check_fields(place: str, document: dict[str, Any]) -> None:
    """Refuse fields of the wrong kind, or that do not fit each other.

    Raises:
        BundleError: with every rule that is broken.
    """
    classes, thresholds, eps = document["classes"], document["thresholds"], document["batch_norm_eps"]
    needed = len(classes) if document["multi_label"] is True and isinstance(classes, list) else 0
    rules = {
        "name: letters, digits, '.', '_', '-', at most 64": isinstance(document["name"], str)
        and NAME.fullmatch(document["name"]),
        "classes: a list of different names": isinstance(classes, list)
        and all(isinstance(item, str) and item for item in classes)
        and len(set(classes)) == len(classes),
        "multi_label: true or false": isinstance(document["multi_label"], bool),
        f"thresholds: {needed} probabilities (one a class where multi_label, else none)": isinstance(thresholds, list)
        and len(thresholds) == needed
        and all(_is_probability(value) for value in thresholds),
        "mask_threshold: a probability": _is_probability(document["mask_threshold"]),
        "batch_norm_eps: null or a number between 0 and 1": eps is None or (_is_probability(eps) and eps > 0),
        "trained: a mapping": isinstance(document["trained"], dict),
        "calibration: a temperature (single-label), or a sigmoid or null a class (multi_label)": "calibration"
        not in document
        or calibration_of(document) is not None,
        "operating_points: different names, each with a threshold or null a class": "operating_points" not in document
        or operating_points_of(document) is not None,
        "class_offsets: a number a class (not where multi_label)": "class_offsets" not in document
        or _are_offsets(document),
        f"vote: {' or '.join(VOTES)}": "vote" not in document or document["vote"] in VOTES,
        "members: at least two": "members" not in document or len(member_files(document)) > 1,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise BundleError(f"Expected these fields of the bundle at {place}, but got others: {'; '.join(broken)}.")


def calibration_of(document: Mapping[str, Any]) -> Calibration | None:
    """The calibration of a bundle; None where it has none, or none that fits its classes."""
    return read_calibration(document.get("calibration"), _n_classes(document), document["multi_label"] is True)


def operating_points_of(document: Mapping[str, Any]) -> tuple[OperatingPoint, ...] | None:
    """The operating points of a bundle; None where it has none, or none that fit its classes."""
    return read_operating_points(document.get("operating_points"), _n_classes(document))


def _n_classes(document: Mapping[str, Any]) -> int:
    return len(document["classes"]) if isinstance(document["classes"], list) else 0


def _are_offsets(document: Mapping[str, Any]) -> bool:
    offsets = document["class_offsets"]
    if document["multi_label"] is not False or not isinstance(offsets, list):
        return False
    return len(offsets) == _n_classes(document) and all(isinstance(one, float) and isfinite(one) for one in offsets)


def _is_probability(value: Any) -> bool:
    return isinstance(value, float) and 0.0 <= value <= 1.0


def member_files(document: Mapping[str, Any]) -> list[str]:
    """`members/0/bundle.yaml` and so on; none for a single model."""
    members = document.get("members", [])
    return [member_part(index, BUNDLE_YAML) for index in range(len(members) if isinstance(members, list) else 0)]


def member_part(index: int, part: str) -> str:
    """Where a file of an ensemble's member lies in the ensemble."""
    return f"members/{index}/{part}"
