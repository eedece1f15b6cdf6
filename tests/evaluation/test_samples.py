"""EvaluationSamples refuses what can't be measured, and says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.samples import EvaluationSamples

SINGLE: dict[str, Any] = {
    "classes": ("normal", "pneumonia"),
    "multi_label": False,
    "patients": np.array(["a", "b", "c"]),
    "labels": np.array([0, 1, -1]),
    "probabilities": np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]),
    "predicted": np.array([0, 1, 0]),
}
MULTI: dict[str, Any] = {
    "classes": ("effusion", "nodule"),
    "multi_label": True,
    "patients": np.array(["a", "b", "c"]),
    "targets": np.array([[0, 1], [np.nan, 0], [1, 1.0]]),
    "probabilities": np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.5]]),
    "thresholds": np.array([0.5, 0.4]),
}
MASKS: dict[str, Any] = {
    "overlap": np.array([3.0, 0.0, np.nan]),
    "predicted_area": np.array([5.0, 2.0, 9.0]),
    "true_area": np.array([4.0, 0.0, np.nan]),
}


def test_truth_of_single_label_samples_is_one_column_a_class_and_nan_where_unlabelled() -> None:
    np.testing.assert_array_equal(EvaluationSamples(**SINGLE).truth(), [[1, 0], [0, 1], [np.nan, np.nan]])


def test_truth_of_multi_label_samples_keeps_blanks() -> None:
    np.testing.assert_array_equal(EvaluationSamples(**MULTI).truth(), MULTI["targets"])


def test_masks_without_a_classification_head_are_accepted() -> None:
    samples = EvaluationSamples(**{**SINGLE, "probabilities": None, "predicted": None}, **MASKS)
    assert samples.n == 3


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (SINGLE, {"classes": ()}, "distinct, non-empty names"),
        (SINGLE, {"classes": ("normal", "normal")}, "distinct, non-empty names"),
        (SINGLE, {"classes": ("normal", "macro")}, r"which the metrics table uses itself, but got \['macro'\]"),
        (SINGLE, {"patients": np.array([], dtype=str)}, "at least one image"),
        (SINGLE, {"patients": np.array([1, 2, 3])}, "string array of shape"),
        (SINGLE, {"patients": np.array(["a", "nan", ""])}, "2 of 3 do not"),
        (SINGLE, {"labels": None}, r"`labels` of shape \(3,\), but got None"),
        (
            SINGLE,
            {"labels": np.array([0, 1])},
            r"`labels` to be an integer array of shape \(3,\), but got int64",
        ),
        (SINGLE, {"labels": np.array([0.0, 1.0, 1.0])}, "integer array"),
        (SINGLE, {"labels": np.array([0, 1, 2])}, "`labels` to be the index of a class"),
        (SINGLE, {"labels": np.array([0, 1, -2])}, "the first being -2"),
        (SINGLE, {"predicted": None}, "`predicted` of shape"),
        (SINGLE, {"predicted": np.array([0, 1, -1])}, "`predicted` to be the index of a class"),
        (SINGLE, {"probabilities": None}, "`predicted` only with `probabilities`"),
        (SINGLE, {"probabilities": np.full((3, 2), 0.6)}, "sum is off by 0.2"),
        (SINGLE, {"probabilities": np.array([[1.5, -0.5]] * 3)}, "6 values are not"),
        (SINGLE, {"probabilities": np.array([[np.nan, 1.0]] * 3)}, "3 values are not"),
        (SINGLE, {"probabilities": np.full((3, 1), 1.0)}, r"shape \(3, 2\), but got float64 of shape \(3, 1\)"),
        (SINGLE, {"targets": np.zeros((3, 2))}, "`targets` only with multi_label=True"),
        (SINGLE, {"thresholds": np.zeros(2)}, "`thresholds` only with multi_label=True"),
        (MULTI, {"targets": None}, "`targets` of shape"),
        (MULTI, {"targets": np.full((3, 2), -1.0)}, r"0, 1 or NaN \(blank\), but got -1.0"),
        (MULTI, {"labels": np.array([0, 1, 1])}, "`labels` only with multi_label=False"),
        (MULTI, {"thresholds": None}, "`thresholds` of shape"),
        (MULTI, {"thresholds": np.array([0.5, 1.5])}, "`thresholds` to be a probability"),
        (MULTI, {"probabilities": None}, "`thresholds` only with `probabilities`"),
        (SINGLE, {**MASKS, "predicted_area": None}, "`predicted_area` of shape"),
        (SINGLE, {**MASKS, "overlap": np.array([5.0, 0.0, 0.0])}, "`overlap` to be at most"),
        (SINGLE, {**MASKS, "overlap": np.array([np.nan, 0.0, 0.0])}, "`overlap` to be a number of pixels"),
        (SINGLE, {**MASKS, "true_area": np.array([4.0, -1.0, 0.0])}, "`true_area` to be a number of pixels"),
    ],
)
def test_what_cannot_be_measured_is_refused(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(MedVisionError, match=message):
        EvaluationSamples(**{**base, **change})


def test_no_message_quotes_a_patient() -> None:
    with pytest.raises(MedVisionError) as caught:
        EvaluationSamples(**{**SINGLE, "patients": np.array(["DOE^JANE", "DOE^JOHN", ""])})
    assert "DOE" not in str(caught.value)


def test_bfloat16_softmax_rounded_class_by_class_is_accepted() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(200, 14, generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(logits, 1).bfloat16().float().numpy()
    samples = EvaluationSamples(
        classes=tuple(f"c{k}" for k in range(14)),
        multi_label=False,
        patients=np.arange(200).astype(str),
        labels=np.zeros(200, dtype=np.int64),
        probabilities=probabilities,
        predicted=probabilities.argmax(1),
    )
    assert samples.n == 200
