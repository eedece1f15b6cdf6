"""Rates at stored points: against scikit-learn, on images that the points were not chosen on, with intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.measure import MetricRow, measure
from medvision_ray.evaluation.paired import compare_samples
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.operating_points import ClassThreshold, OperatingPoint

CLASSES = ("edema", "mass", "nodule")


def threshold(value: float) -> ClassThreshold:
    return ClassThreshold(value, 0.9, 0.9, 9, 1, 1, 9, 20)


POINT = OperatingPoint("f1", "largest F1", (threshold(0.3), None, threshold(0.7)))


def samples(shift: float = 0.0, point: OperatingPoint = POINT, seed: int = 0) -> EvaluationSamples:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, (200, 3)).astype(float)
    raw = (0.5 * generator.random((200, 3)) + 0.4 * truth + shift).clip(0, 1).astype(np.float32)
    truth[generator.random((200, 3)) < 0.2] = np.nan
    return EvaluationSamples(
        classes=CLASSES,
        multi_label=True,
        patients=np.array([str(number // 2) for number in range(200)]),
        targets=truth,
        probabilities=raw,
        thresholds=np.full(3, 0.5, np.float32),
        operating_points=(point,),
    )


def rows_at(found: list[MetricRow]) -> dict[tuple[str, str], MetricRow]:
    return {(row.class_name, row.metric): row for row in found if "@" in row.metric}


def test_rates_agree_with_scikit_learn_over_what_is_known() -> None:
    given = samples()
    rows = rows_at(measure(given, resamples=100, seed=0))
    assert len(rows) == 8  # `mass` has no threshold
    for name, value in (("edema", 0.3), ("nodule", 0.7)):
        k = CLASSES.index(name)
        known = ~np.isnan(given.targets[:, k])
        flagged = given.probabilities[known, k] >= np.float32(value)
        (tn, fp), (fn, tp) = confusion_matrix(given.targets[known, k], flagged)
        expected = {
            "sensitivity": (tp, tp + fn),
            "specificity": (tn, tn + fp),
            "ppv": (tp, tp + fp),
            "npv": (tn, tn + fn),
        }
        for rate, (top, bottom) in expected.items():
            row = rows[name, f"{rate}@f1"]
            assert row.value == pytest.approx(top / bottom)
            assert row.n_images == bottom
            if 0 < top < bottom:
                assert row.ci_low is not None
                assert row.ci_low < row.value < row.ci_high


def test_the_positive_class_of_two() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 100)
    ill = (0.6 * generator.random(100) + 0.3 * labels).astype(np.float32)
    given = EvaluationSamples(
        classes=("healthy", "ill"),
        multi_label=False,
        patients=np.arange(100).astype(str),
        labels=labels,
        probabilities=np.stack([1 - ill, ill], axis=1),
        predicted=(ill > 0.5).astype(int),
        operating_points=(OperatingPoint("specificity_95", "", (None, threshold(0.625))),),
    )
    rows = rows_at(measure(given, resamples=0, seed=0))
    assert {name for name, _ in rows} == {"ill"}
    assert rows["ill", "sensitivity@specificity_95"].value == pytest.approx((ill >= 0.625)[labels == 1].mean())
    assert rows["ill", "specificity@specificity_95"].value == pytest.approx((ill < 0.625)[labels == 0].mean())


def test_a_rate_of_nothing_is_null() -> None:
    never = OperatingPoint("f1", "", (threshold(1.0), None, None))
    rows = rows_at(measure(samples(point=never), resamples=0, seed=0))
    assert rows["edema", "ppv@f1"].value is None
    assert rows["edema", "ppv@f1"].n_images == 0
    assert rows["edema", "sensitivity@f1"].value == 0.0


def test_two_models_are_compared_each_at_its_own_points() -> None:
    other = OperatingPoint("f1", "", (threshold(0.4), threshold(0.5), None))
    found = compare_samples(samples(), samples(0.1, other), resamples=50, seed=0)
    rows = {(row.class_name, row.metric): row for row in found.differences if "@" in row.metric}
    assert {name for name, _ in rows} == {"edema"}  # the class that both have a threshold of
    assert rows["edema", "sensitivity@f1"].difference == pytest.approx(0.0)


def test_points_of_other_classes_are_refused() -> None:
    with pytest.raises(MedVisionError, match="operating points of 3 classes"):
        samples(point=OperatingPoint("f1", "", (threshold(0.5),)))
