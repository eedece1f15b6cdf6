"""EvaluationSamples: what is measured, one entry an image, checked before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.mask_detail import MaskDetail
from medvision_ray.operating_points import OperatingPoint

RESERVED_CLASS_NAMES = ("all", "macro")
"""Values of the metrics table's class column that are no class; no class may be called so."""

_PER_IMAGE = (
    "patients",
    "labels",
    "targets",
    "probabilities",
    "predicted",
    "calibrated",
    "overlap",
    "predicted_area",
    "true_area",
)
_NO_PATIENT = ("", "nan", "None", "NaN", "NaT", "<NA>")
_SUM_TOLERANCE = 0.01  # softmax in bfloat16, rounded class by class, is off by up to 0.002


@dataclass(frozen=True, eq=False)
class EvaluationSamples:
    """Truth and prediction of `n` images over `K` classes.

    Single-label data give `labels`; multi-label data give `targets`. A model without a
    classification head has no `probabilities`; one without a decoder has no areas.

    Attributes:
        classes: names of the K classes (single-label) or findings (multi-label), in the order of
            every K axis.
        multi_label: findings are independent of each other and any number of them may be true.
        patients: shape `(n,)`, strings; images of the same string are resampled together. An
            image of an unknown patient must get a string of its own.
        labels: shape `(n,)`, integers, index of the true class, -1 where unlabelled;
            single-label only.
        targets: shape `(n, K)`, 0, 1 or NaN (blank); multi-label only.
        probabilities: shape `(n, K)` in [0, 1]; single-label rows sum to 1.
        predicted: shape `(n,)`, integers, index of the decided class; single-label with
            `probabilities` only.
        thresholds: shape `(K,)`; a finding is decided present where its probability is at least
            this; multi-label with `probabilities` only.
        calibrated: shape `(n, K)`, calibrated probabilities in [0, 1]; NaN in the column of a finding that has none;
            only with `probabilities`.
        operating_points: thresholds on `probabilities`, one a class, that were chosen on other images; only with them.
        overlap: shape `(n,)`, pixels in both masks; anything where `true_area` is NaN.
        predicted_area: shape `(n,)`, pixels of the predicted mask; anything where `true_area` is NaN.
        true_area: shape `(n,)`, pixels of the true mask on the same grid; NaN where no true mask
            is known, 0 where it is known to be empty.
        detail: outlines and lesions of the same masks; only with the areas.

    Raises:
        MedVisionError: an array is missing, of the wrong shape or type, or out of range.

    Examples:
        >>> samples = EvaluationSamples(
        ...     classes=("normal", "pneumonia"),
        ...     multi_label=False,
        ...     patients=np.array(["a", "a", "b"]),
        ...     labels=np.array([0, 1, -1]),
        ...     probabilities=np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]),
        ...     predicted=np.array([0, 0, 1]),
        ... )
        >>> samples.n
        3
        >>> samples.truth()
        array([[ 1.,  0.],
               [ 0.,  1.],
               [nan, nan]])
    """

    classes: tuple[str, ...]
    multi_label: bool
    patients: NDArray[np.str_]
    labels: NDArray[np.integer[Any]] | None = None
    targets: NDArray[np.floating[Any]] | None = None
    probabilities: NDArray[np.floating[Any]] | None = None
    predicted: NDArray[np.integer[Any]] | None = None
    thresholds: NDArray[np.floating[Any]] | None = None
    calibrated: NDArray[np.floating[Any]] | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    overlap: NDArray[np.floating[Any]] | None = None
    predicted_area: NDArray[np.floating[Any]] | None = None
    true_area: NDArray[np.floating[Any]] | None = None
    detail: MaskDetail | None = None

    def __post_init__(self) -> None:
        _check_classes(self.classes)
        _check_patients(self.patients)
        if self.multi_label:
            self._check_multi_label()
        else:
            self._check_single_label()
        self._check_calibrated()
        self._check_masks()

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.patients.shape[0])

    def take(self, rows: NDArray[np.bool_]) -> EvaluationSamples:
        """The samples of some images, at least one."""
        kept: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows] for name in _PER_IMAGE
        }
        return replace(self, **kept, detail=None if self.detail is None else self.detail.take(rows))

    def truth(self) -> NDArray[np.float64]:
        """Truth one class against the rest, shape `(n, K)`: 1 true, 0 not, NaN not known."""
        if self.targets is not None:
            return np.asarray(self.targets, dtype=np.float64)
        if self.labels is None:  # unreachable after __post_init__; narrows the type
            raise MedVisionError("Expected `labels` or `targets`, but both are None.")
        truth = np.asarray(self.labels[:, None] == np.arange(len(self.classes)), dtype=np.float64)
        truth[self.labels < 0] = np.nan
        return truth

    def _check_single_label(self) -> None:
        k = len(self.classes)
        _only_with("multi_label=True", targets=self.targets, thresholds=self.thresholds)
        labels = _array("labels", self.labels, (self.n,), "iu")
        _check_range("labels", labels, -1, k - 1, "the index of a class, or -1 where unlabelled")
        if self.probabilities is None:
            _only_with("`probabilities`", predicted=self.predicted)
            return
        probabilities = _array("probabilities", self.probabilities, (self.n, k), "f")
        _check_range("probabilities", probabilities, 0, 1, "a probability")
        worst = float(np.abs(probabilities.sum(axis=1, dtype=np.float64) - 1).max())
        if worst > _SUM_TOLERANCE:
            raise MedVisionError(
                f"Expected the single-label probabilities of each image to sum to 1, but a sum is off by {worst:.3g}. "
                "Give softmax output, or set multi_label=True for independent findings."
            )
        predicted = _array("predicted", self.predicted, (self.n,), "iu")
        _check_range("predicted", predicted, 0, k - 1, "the index of a class")

    def _check_multi_label(self) -> None:
        k = len(self.classes)
        _only_with("multi_label=False", labels=self.labels, predicted=self.predicted)
        targets = _array("targets", self.targets, (self.n, k), "f")
        odd = targets[~(np.isnan(targets) | (targets == 0) | (targets == 1))]
        if odd.size:
            raise MedVisionError(f"Expected `targets` to hold 0, 1 or NaN (blank), but got {odd[0]}.")
        if self.probabilities is None:
            _only_with("`probabilities`", thresholds=self.thresholds)
            return
        probabilities = _array("probabilities", self.probabilities, (self.n, k), "f")
        _check_range("probabilities", probabilities, 0, 1, "a probability")
        thresholds = _array("thresholds", self.thresholds, (k,), "f")
        _check_range("thresholds", thresholds, 0, 1, "a probability")

    def _check_calibrated(self) -> None:
        if any(len(point.thresholds) != len(self.classes) for point in self.operating_points):
            raise MedVisionError(f"Expected operating points of {len(self.classes)} classes, but got others.")
        if self.calibrated is None:
            return
        if self.probabilities is None:
            _only_with("`probabilities`", calibrated=self.calibrated)
        calibrated = _array("calibrated", self.calibrated, (self.n, len(self.classes)), "f")
        _check_range("calibrated", calibrated[~np.isnan(calibrated)], 0, 1, "a probability")

    def _check_masks(self) -> None:
        given = [self.overlap is not None, self.predicted_area is not None, self.true_area is not None]
        if not any(given):
            if self.detail is not None:
                raise MedVisionError("Expected `detail` only with `true_area`, but got it without.")
            return
        if self.detail is not None and len(self.detail) != self.n:
            raise MedVisionError(f"Expected a mask detail of {self.n} images, but got one of {len(self.detail)}.")
        overlap = _array("overlap", self.overlap, (self.n,), "f")
        predicted = _array("predicted_area", self.predicted_area, (self.n,), "f")
        true = _array("true_area", self.true_area, (self.n,), "f")
        known = ~np.isnan(true)
        for name, area in (("true_area", true), ("predicted_area", predicted), ("overlap", overlap)):
            if not np.all(np.isfinite(area[known]) & (area[known] >= 0)):
                raise MedVisionError(
                    f"Expected `{name}` to be a number of pixels, 0 or more, wherever `true_area` is known, but it is "
                    "negative, infinite or NaN for an image. Where there is no true mask, `true_area` must be NaN."
                )
        if np.any(overlap[known] > np.minimum(predicted[known], true[known])):
            raise MedVisionError(
                "Expected `overlap` to be at most `predicted_area` and `true_area`, but it is larger for an image. "
                "Count all three on the same pixel grid."
            )


def _check_classes(classes: tuple[str, ...]) -> None:
    if not classes or len(set(classes)) != len(classes) or "" in classes:
        raise MedVisionError(f"Expected `classes` to be distinct, non-empty names, but got {classes}.")
    if taken := sorted(set(classes) & set(RESERVED_CLASS_NAMES)):
        raise MedVisionError(
            f"Expected class names other than {RESERVED_CLASS_NAMES}, which the metrics table uses itself, "
            f"but got {taken}. Rename the class in the label table."
        )


def _check_patients(patients: NDArray[np.str_]) -> None:
    if patients.ndim != 1 or patients.dtype.kind != "U":
        raise MedVisionError(
            f"Expected `patients` to be a string array of shape (n,), but got {patients.dtype} of shape {patients.shape}."
        )
    if patients.shape[0] == 0:
        raise MedVisionError("Expected at least one image to measure, but got none.")
    if unknown := int(np.isin(patients, _NO_PATIENT).sum()):
        raise MedVisionError(
            f"Expected every image to name its patient, but {unknown} of {patients.shape[0]} do not. "
            "Give an image of an unknown patient a string of its own, for instance its image_id."
        )


def _array(name: str, array: NDArray[Any] | None, shape: tuple[int, ...], kinds: str) -> NDArray[Any]:
    """The array itself, once it is known to be there and to have this shape and kind of type."""
    kind = "a floating-point" if kinds == "f" else "an integer"
    if array is None:
        raise MedVisionError(f"Expected `{name}` of shape {shape}, but got None.")
    if array.shape != shape or array.dtype.kind not in kinds:
        raise MedVisionError(
            f"Expected `{name}` to be {kind} array of shape {shape}, but got {array.dtype} of shape {array.shape}."
        )
    return array


def _check_range(name: str, array: NDArray[Any], low: float, high: float, meaning: str) -> None:
    wrong = array[~((array >= low) & (array <= high))]  # written so that NaN is wrong
    if wrong.size:
        raise MedVisionError(
            f"Expected `{name}` to be {meaning}, from {low:g} to {high:g}, but {wrong.size} values are not, "
            f"the first being {wrong[0]}."
        )


def _only_with(condition: str, **arrays: NDArray[Any] | None) -> None:
    for name, array in arrays.items():
        if array is not None:
            raise MedVisionError(f"Expected `{name}` only with {condition}, but got it without.")
