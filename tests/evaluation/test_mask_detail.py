"""Rows of outlines and lesions: units apart, worst cases counted, ratios over patients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import patient_weights
from medvision_ray.evaluation.mask_detail import MaskDetail
from medvision_ray.evaluation.measure import MetricRow, measure
from medvision_ray.evaluation.samples import EvaluationSamples

# image: 0 found (mm), 1 nothing drawn (mm), 2 drawn elsewhere (px), 3 truly empty and drawn (mm), 4 no true mask
SAMPLES = EvaluationSamples(
    classes=("glioma", "normal"),
    multi_label=False,
    patients=np.array(["a", "a", "b", "c", "d"]),
    labels=np.array([0, 0, 0, 1, 0]),
    overlap=np.array([30.0, 0, 0, 0, np.nan]),
    predicted_area=np.array([40.0, 0, 25, 7, np.nan]),
    true_area=np.array([60.0, 20, 25, 0, np.nan]),
    detail=MaskDetail(
        in_mm=np.array([True, True, False, True, True]),
        hd95=np.array([4.0, 100.0, 30.0, np.nan, np.nan]),
        surface_dice=np.array([0.8, 0.0, 0.1, np.nan, np.nan]),
        lesions=np.array([3.0, 1, 2, 0, np.nan]),
        detected=np.array([2.0, 0, 0, 0, np.nan]),
        false_positives=np.array([1.0, 0, 2, 4, np.nan]),
        tolerance_mm=1.5,
    ),
)


def rows_of(samples: EvaluationSamples, resamples: int = 0) -> dict[tuple[str, str], MetricRow]:
    return {(row.class_name, row.metric): row for row in measure(samples, resamples=resamples, seed=0)}


def test_distances_in_mm_and_in_pixels_are_different_metrics() -> None:
    rows = rows_of(SAMPLES)
    assert rows["all", "hd95_mm"].value == pytest.approx((4 + 100) / 2)
    assert rows["all", "surface_dice_1.5mm"].value == pytest.approx(0.4)
    assert (rows["all", "hd95_px"].value, rows["all", "surface_dice_2px"].value) == (30, 0.1)
    assert (rows["all", "hd95_mm"].n_images, rows["all", "hd95_mm"].n_patients) == (2, 1)
    assert rows["normal", "hd95_mm"].value is None


def test_a_unit_that_no_image_has_is_no_row() -> None:
    assert SAMPLES.detail is not None
    detail = replace(SAMPLES.detail, in_mm=np.zeros(5, dtype=bool))
    rows = rows_of(replace(SAMPLES, detail=detail))
    assert not [metric for _, metric in rows if metric.endswith("mm")]
    assert rows["all", "hd95_px"].value == pytest.approx((4 + 100 + 30) / 3)


def test_a_structure_of_which_nothing_was_drawn_is_counted_beside_its_worst_case() -> None:
    row = rows_of(SAMPLES)["all", "undrawn_masks"]
    assert (row.value, row.n_images) == (1, 3)
    assert rows_of(SAMPLES)["all", "missed_masks"].value == 2


def test_lesions_are_pooled_and_false_positives_are_over_empty_masks_too() -> None:
    rows = rows_of(SAMPLES)
    assert rows["all", "lesion_sensitivity"].value == pytest.approx(2 / 6)
    assert rows["all", "lesion_sensitivity"].n_images == 3
    assert rows["all", "false_positives_per_image"].value == pytest.approx(7 / 4)
    assert rows["normal", "false_positives_per_image"].value == 4
    counts = [rows["all", name].value for name in ("lesions", "detected_lesions", "false_positive_lesions")]
    assert counts == [6, 2, 7]


def test_intervals_are_those_of_the_drawn_patients_taken_one_by_one() -> None:
    generator = np.random.default_rng(0)
    n = 60
    lesions = generator.integers(0, 4, n).astype(float)
    marked = lesions > 0
    samples = EvaluationSamples(
        classes=("tumour",),
        multi_label=False,
        patients=(np.arange(n) // 3).astype(str),
        labels=np.zeros(n, dtype=int),
        overlap=np.zeros(n),
        predicted_area=np.full(n, 5.0),
        true_area=10 * lesions,
        detail=MaskDetail(
            in_mm=np.ones(n, dtype=bool),
            hd95=np.where(marked, generator.gamma(2.0, 5.0, n), np.nan),
            surface_dice=np.where(marked, generator.random(n), np.nan),
            lesions=lesions,
            detected=generator.binomial(lesions.astype(int), 0.7).astype(float),
            false_positives=generator.poisson(0.5, n).astype(float),
        ),
    )
    detail = samples.detail
    assert detail is not None
    rows = rows_of(samples, resamples=200)
    expected: dict[str, list[float]] = {"hd95_mm": [], "lesion_sensitivity": [], "false_positives_per_image": []}
    for weights in np.concatenate(list(patient_weights(samples.patients[marked], resamples=200, seed=0))):
        drawn = np.repeat(np.flatnonzero(marked), weights.astype(int))
        expected["hd95_mm"].append(detail.hd95[drawn].mean())
        expected["lesion_sensitivity"].append(detail.detected[drawn].sum() / detail.lesions[drawn].sum())
    for weights in np.concatenate(list(patient_weights(samples.patients, resamples=200, seed=0))):
        expected["false_positives_per_image"].append(
            detail.false_positives[np.repeat(np.arange(n), weights.astype(int))].mean()
        )
    for metric, values in expected.items():
        row = rows["all", metric]
        assert (row.ci_low, row.ci_high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
        assert row.ci_low < row.value < row.ci_high


def test_a_detail_of_other_images_is_refused() -> None:
    with pytest.raises(MedVisionError, match="mask detail of 5 images, but got one of 2"):
        replace(SAMPLES, detail=SAMPLES.detail.take(np.array([True, True, False, False, False])))
    with pytest.raises(MedVisionError, match="only with `true_area`"):
        replace(SAMPLES, overlap=None, predicted_area=None, true_area=None)
