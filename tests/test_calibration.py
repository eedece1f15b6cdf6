"""Applying a calibration: against softmax and sigmoid of logits, at the ends of float32, and back from bundle.yaml."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from medvision_ray.calibration import PlattScaling, TemperatureScaling, read_calibration


def test_a_temperature_divides_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, 3))
    got = TemperatureScaling(1.7).apply(softmax(logits, axis=1).astype(np.float32))
    np.testing.assert_allclose(got, softmax(logits / 1.7, axis=1), rtol=1e-4)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-12)


def test_a_temperature_of_1_changes_nothing_and_none_changes_the_order() -> None:
    raw = softmax(np.random.default_rng(1).normal(0, 3, (200, 4)), axis=1).astype(np.float32)
    np.testing.assert_allclose(TemperatureScaling(1.0).apply(raw), raw, rtol=1e-6)
    for temperature in (0.3, 5.0):
        got = TemperatureScaling(temperature).apply(raw)
        assert (got.argsort(axis=1) == raw.argsort(axis=1)).all()


def test_platt_is_a_sigmoid_of_each_findings_logit() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (50, 2))
    got = PlattScaling(((0.5, 1.0), (2.0, -1.0))).apply(expit(logits).astype(np.float32))
    np.testing.assert_allclose(got, expit(logits * [0.5, 2.0] + [1.0, -1.0]), rtol=1e-4)


def test_a_finding_without_a_sigmoid_has_no_calibrated_probability() -> None:
    got = PlattScaling((None, (1.0, 0.0))).apply(np.full((3, 2), 0.25, np.float32))
    assert np.isnan(got[:, 0]).all()
    np.testing.assert_allclose(got[:, 1], 0.25)


@pytest.mark.parametrize("value", [0.0, 1.0, np.float32(1e-40)])
def test_the_ends_of_float32_stay_finite(value: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        one = TemperatureScaling(0.05).apply(np.array([[value, 1 - value]], np.float32))
        other = PlattScaling(((50.0, -3.0),)).apply(np.array([[value]], np.float32))
    assert np.isfinite(one).all()
    assert np.isfinite(other).all()
    assert one.argmax() == int(value < 0.5)


def test_what_is_written_is_read_again() -> None:
    for one, multi_label in ((TemperatureScaling(1.5), False), (PlattScaling(((1.0, -0.5), None)), True)):
        assert read_calibration(one.document(), 2, multi_label) == one
        assert read_calibration(one.document(), 2, not multi_label) is None


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"method": "temperature"},
        {"method": "temperature", "temperature": 0.0},
        {"method": "temperature", "temperature": float("inf")},
        {"method": "temperature", "temperature": "1"},
        {"method": "temperature", "temperature": 1.0, "more": 1},
    ],
)
def test_no_temperature_is_none(document: Any) -> None:
    assert read_calibration(document, 2, multi_label=False) is None


@pytest.mark.parametrize(
    "sigmoids", [None, [], [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [1.0, 0.0]], ["a", None]]
)
def test_no_sigmoids_are_none(sigmoids: Any) -> None:
    assert read_calibration({"method": "platt", "sigmoids": sigmoids}, 2, multi_label=True) is None


def test_logits_of_tiny_probabilities_keep_their_distance() -> None:
    logits = np.array([[0.0, -60.0, -80.0]])
    got = TemperatureScaling(20.0).apply(softmax(logits, axis=1).astype(np.float32))
    np.testing.assert_allclose(np.log(got), log_softmax(logits / 20.0, axis=1), rtol=1e-5)
