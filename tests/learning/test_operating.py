"""Operating points: the best of all thresholds by trying them all, what they say of themselves, and who has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from medvision_ray.config import OperatingPointsConfig, TrainJob, build_job
from medvision_ray.errors import ConfigError
from medvision_ray.learning.calibrate import ValidationScores
from medvision_ray.learning.decisions import fit_decisions
from medvision_ray.learning.operating import check_positive_class, choose_points, decided_thresholds
from medvision_ray.operating_points import OperatingPoint

ALL = OperatingPointsConfig(at_specificity=(0.9,), at_sensitivity=(0.8,), cost=(5.0, 1.0), min_class_patients=1)


def finding(scores: list[float], positive: list[bool]) -> ValidationScores:
    return ValidationScores(
        classes=("a",),
        multi_label=True,
        probabilities=np.array(scores, np.float32)[:, None],
        truth=np.array(positive, np.float64)[:, None],
        patients=np.array([str(number) for number in range(len(scores))]),
    )


def many(n: int = 400, classes: tuple[str, ...] = ("healthy", "ill"), seed: int = 0) -> ValidationScores:
    """Single-label images, two a patient."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(classes), n)
    raw = generator.dirichlet(np.ones(len(classes)), n) + 0.6 * np.eye(len(classes))[labels]
    return ValidationScores(
        classes=classes,
        multi_label=False,
        probabilities=(raw / raw.sum(axis=1, keepdims=True)).astype(np.float32),
        truth=(labels[:, None] == np.arange(len(classes))).astype(np.float64),
        patients=np.array([f"p{number // 2}" for number in range(n)]),
    )


def by_name(points: tuple[OperatingPoint, ...]) -> dict[str, OperatingPoint]:
    return {point.name: point for point in points}


@pytest.mark.parametrize("seed", range(60))
def test_no_threshold_is_better_and_the_counts_are_those_of_deciding(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(2, 30))
    raw = generator.integers(0, 9, n) / 8  # ties, 0 and 1 among them
    positive = generator.permutation(np.arange(n) < generator.integers(1, n))
    scores = finding(raw.tolist(), positive.tolist())
    points = by_name(choose_points(scores, ALL)[0])

    def rates(flagged: Any) -> tuple[float, float, float, float]:
        sensitivity, specificity = flagged[positive].mean(), 1 - flagged[~positive].mean()
        cost = 5 * (positive & ~flagged).sum() + (~positive & flagged).sum()
        f1 = 2 * (positive & flagged).sum() / (positive.sum() + flagged.sum())
        return sensitivity, specificity, f1, float(cost)

    tried = [rates(raw >= threshold) for threshold in np.arange(17) / 16]  # all that tell these scores apart
    for point in points.values():
        (one,) = point.thresholds
        assert one is not None
        flagged = point.apply(scores.probabilities)[:, 0]
        assert (one.true_positives, one.false_positives) == ((positive & flagged).sum(), (~positive & flagged).sum())
        assert one.true_positives + one.false_negatives == positive.sum()
        assert one.false_positives + one.true_negatives == (~positive).sum()
        assert rates(flagged)[:2] == pytest.approx((one.sensitivity, one.specificity))
    got = {name: rates(point.apply(scores.probabilities)[:, 0]) for name, point in points.items()}
    assert got["f1"][2] == pytest.approx(max(rate[2] for rate in tried))
    assert got["cost"][3] == min(rate[3] for rate in tried)
    screening = [rate[1] for rate in tried if rate[0] >= 0.8 - 1e-9]
    assert got["sensitivity_80"][1] == pytest.approx(max(screening))
    strict = [rate[0] for rate in tried if rate[1] >= 0.9 - 1e-9]
    if strict:  # a negative of probability 1 is flagged by every threshold
        assert got["specificity_90"][0] == pytest.approx(max(strict))
    else:
        assert "specificity_90" not in got


def test_sensitivity_at_a_specificity_is_scikit_learns_curve() -> None:
    scores = many()
    false_rate, true_rate, _ = roc_curve(scores.truth[:, 1], scores.probabilities[:, 1], drop_intermediate=False)
    point = by_name(choose_points(scores, OperatingPointsConfig())[0])["specificity_95"]
    assert point.thresholds[1] is not None
    assert point.thresholds[1].sensitivity == pytest.approx(true_rate[false_rate <= 0.05 + 1e-9].max())
    assert point.thresholds[1].specificity >= 0.95
    assert point.thresholds[1].patients == 200


def test_a_threshold_lies_between_probabilities_and_survives_rounding() -> None:
    scores = finding([0.1, 0.2, 0.6, 0.7], [False, False, True, True])
    (one,) = by_name(choose_points(scores, ALL)[0])["f1"].thresholds
    assert one is not None
    assert one.threshold == pytest.approx(0.4)
    assert float(np.float32(one.threshold)) == one.threshold
    low = np.float32(0.5)
    neighbours = finding([float(low), float(np.nextafter(low, np.float32(1)))], [False, True])
    (one,) = by_name(choose_points(neighbours, ALL)[0])["f1"].thresholds
    assert one is not None
    assert (one.sensitivity, one.specificity) == (1.0, 1.0)


def test_of_two_classes_the_last_or_the_named_one_has_the_threshold() -> None:
    points, reasons = choose_points(many(), OperatingPointsConfig())
    assert [[one is None for one in point.thresholds] for point in points] == [[True, False]] * 3
    assert reasons == {"healthy": "the threshold is on ill"}
    points, _ = choose_points(many(), OperatingPointsConfig(positive_class="healthy"))
    assert [[one is None for one in point.thresholds] for point in points] == [[False, True]] * 3


def test_of_three_classes_each_has_one_against_the_rest() -> None:
    points, reasons = choose_points(many(classes=("a", "b", "c")), OperatingPointsConfig())
    assert all(one is not None for point in points for one in point.thresholds)
    assert reasons == {}


def test_a_rare_class_has_no_threshold_and_says_why() -> None:
    scores = many(classes=("a", "b", "c"))
    kept = (scores.truth[:, 2] == 0) | (np.cumsum(scores.truth[:, 2]) <= 3)
    points, reasons = choose_points(scores.take(kept), OperatingPointsConfig())
    assert [point.thresholds[2] for point in points] == [None] * 3
    assert reasons == {"c": "3 validation patients with it, and `operating_points.min_class_patients` is 5"}
    none, reasons = choose_points(scores.take(np.arange(6)), OperatingPointsConfig())
    assert none == ()
    assert len(reasons) == 3


def test_findings_are_decided_at_the_point_that_was_asked_for() -> None:
    scores = many(classes=("a", "b", "c"))
    multi = ValidationScores(scores.classes, True, scores.probabilities, scores.truth, scores.patients)
    settings = {"output": "o", "labels": {"table": "t", "findings": ["a", "b", "c"]}}
    plain = fit_decisions(multi, build_job(TrainJob, settings, "the test"))
    assert plain.thresholds == [0.5] * 3
    assert plain.facts["thresholds_from"] == 0.5
    asked = {**settings, "operating_points": {"decide_at": "f1"}}
    found = fit_decisions(multi, build_job(TrainJob, asked, "the test"))
    expected = by_name(found.operating_points)["f1"]
    assert found.thresholds == [one.threshold for one in expected.thresholds if one is not None]
    assert found.thresholds != plain.thresholds
    assert found.facts["thresholds_from"] == "f1"


def test_a_finding_without_a_threshold_is_decided_at_the_default() -> None:
    config = OperatingPointsConfig(decide_at="f1", min_class_patients=1)
    scores = many(classes=("a", "b", "c"))
    truth = scores.truth.copy()
    truth[:, 1] = np.nan
    points, _ = choose_points(
        ValidationScores(scores.classes, True, scores.probabilities, truth, scores.patients), config
    )
    found = decided_thresholds(points, config, [0.5] * 3)
    assert found[1] == 0.5
    assert 0.5 not in (found[0], found[2])


def test_a_positive_class_that_is_none_is_refused_before_training() -> None:
    config = OperatingPointsConfig(positive_class="sick")
    with pytest.raises(ConfigError, match=r"one of the classes \(healthy, ill\), but got 'sick'"):
        check_positive_class(config, ("healthy", "ill"))
    check_positive_class(config, ())  # no classification head


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operating_points": {"decide_at": "f1"}}, "is for findings"),
        ({"operating_points": {"decide_at": "f2"}}, "must name a point"),
        ({"operating_points": {"at_specificity": [0.9, 0.9]}}, "different values"),
        ({"operating_points": {"at_specificity": [1.0]}}, "less than 1"),
        ({"loss": {"classification": "asymmetric"}}, "needs `labels.findings`"),
        ({"loss": {"classification": "focal", "label_smoothing": 0.1}}, "goes with `classification: cross_entropy`"),
        ({"sampling": "balanced"}, "would balance twice"),
        ({"labels": {"table": "t", "findings": ["a"]}, "operating_points": {"positive_class": "a"}}, "single-label"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_job(TrainJob, {"output": "o", "labels": {"table": "t"}, **options}, "the test")


def test_names_of_points() -> None:
    config = OperatingPointsConfig(at_specificity=(0.975,), at_sensitivity=(0.9,), cost=(10.0, 1.0))
    assert config.names == ("specificity_97_5", "sensitivity_90", "f1", "cost")
