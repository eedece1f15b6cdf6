"""Class offsets: fitted by likelihood, chosen on validation, and only where that is shown to pay on other patients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import softmax

from medvision_ray.config import CalibrateJob, TrainJob, build_job
from medvision_ray.learning.calibrate import ValidationScores, one_against_rest
from medvision_ray.learning.class_offsets import ClassWeighing, choose_class_offsets, fit_offsets
from medvision_ray.learning.decisions import fit_decisions
from medvision_ray.operating_points import named_class

CLASSES = ("cavity", "consolidation", "nodule")
SKEW = np.array([0.0, 0.8, -1.5])
"""What the network adds to the true log odds."""


def skewed(patients: int, *, skew: np.ndarray = SKEW, images: int = 4, seed: int = 0) -> ValidationScores:
    """Images drawn from the probabilities that a fair network would state; this one favours classes by `skew`."""
    rng = np.random.default_rng(seed)
    fair = rng.normal(0, 1.5, (patients * images, 3))
    labels = np.array([rng.choice(3, p=row) for row in softmax(fair, axis=1)])
    stated = softmax(fair + skew, axis=1).astype(np.float32)
    names = np.repeat([f"p{number}" for number in range(patients)], images)
    return ValidationScores(CLASSES, False, stated, one_against_rest(labels, 3), names)


def test_the_fit_takes_the_skew_back() -> None:
    scores = skewed(4000)
    labels = scores.truth.argmax(axis=1)
    found = np.array(fit_offsets(scores.probabilities, labels, np.ones(len(labels))))
    assert found.max() == 0
    np.testing.assert_allclose(found - found[0], -SKEW, atol=0.1)
    # Where the likelihood is largest, the mean of what is stated is the share of each class (its derivatives are 0).
    stated = softmax(np.log(scores.probabilities.astype(np.float64)) + found, axis=1).mean(axis=0)
    np.testing.assert_allclose(stated, np.bincount(labels) / len(labels), atol=1e-4)


def test_offsets_that_are_better_on_other_patients_are_taken() -> None:
    scores = skewed(60)
    found = choose_class_offsets(scores, min_class_patients=5)
    assert "reason" not in found.facts
    assert (found.facts["images"], found.facts["patients"]) == (240, 60)
    assert found.facts["best"] == dict(zip(CLASSES, found.offsets, strict=True))
    gain, low, high = found.facts["gain"]
    assert 0 < low < gain < high
    labels = scores.truth.argmax(axis=1)
    before, after = ((named_class(scores.probabilities, offsets) == labels).mean() for offsets in ((), found.offsets))
    assert after - before == pytest.approx(gain, abs=0.05)  # the gain is of patients that it was not fitted to


def test_a_fair_network_keeps_naming_the_likeliest_class() -> None:
    taken = [choose_class_offsets(skewed(60, skew=np.zeros(3), seed=seed), min_class_patients=5) for seed in range(20)]
    assert sum(bool(one.offsets) for one in taken) <= 1  # an interval of 95 % is above 0 once in 40
    assert "not shown" in taken[0].facts["reason"]


def test_images_of_unknown_class_are_left_out_and_rare_classes_leave_no_choice() -> None:
    scores = skewed(60)
    blank = replace(
        scores,
        probabilities=np.concatenate([scores.probabilities, scores.probabilities[:9]]),
        truth=np.concatenate([scores.truth, np.full((9, 3), np.nan)]),
        patients=np.concatenate([scores.patients, np.repeat("p0", 9)]),
    )
    assert choose_class_offsets(blank, min_class_patients=5) == choose_class_offsets(scores, min_class_patients=5)
    found = choose_class_offsets(scores, min_class_patients=61)
    assert found.offsets == ()
    assert "patients with cavity" in found.facts["reason"]
    few = choose_class_offsets(skewed(4, images=40), min_class_patients=1)
    assert (few.offsets, "fewer than 5" in few.facts["reason"]) == ((), True)


def test_what_a_model_has_already_is_what_others_are_held_against() -> None:
    scores = skewed(60)
    best = choose_class_offsets(scores, min_class_patients=5).offsets
    again = choose_class_offsets(scores, min_class_patients=5, before=best)
    assert again.offsets == best
    assert "not shown" in again.facts["reason"]


def test_offsets_stay_within_their_bound_however_much_the_data_ask_for() -> None:
    certain = np.tile(np.array([[0.999, 0.001]], np.float32), (50, 1))
    assert fit_offsets(certain, np.ones(50, np.int64), np.ones(50)) == (-3.0, 0.0)


def test_a_balanced_fit_does_not_bring_the_shares_of_the_classes_back() -> None:
    """A network that was trained as if all classes were equally many is fair then, however many there are of each."""
    rng = np.random.default_rng(3)
    labels = rng.choice(3, size=12_000, p=(0.7, 0.2, 0.1))
    seen = rng.normal(0, 1, (12_000, 3)) + 1.5 * np.eye(3)[labels]  # evidence, the same for a patient of each class
    stated = softmax(1.5 * seen, axis=1)  # Bayes for equal shares: a Gaussian's log ratio is linear with this slope
    balanced = np.array(fit_offsets(stated, labels, ClassWeighing(balanced=True).of_images(labels, 3)))
    np.testing.assert_allclose(balanced - balanced[0], 0, atol=0.12)
    plain = np.array(fit_offsets(stated, labels, ClassWeighing().of_images(labels, 3)))
    np.testing.assert_allclose(plain - plain[0], np.log([1, 0.2 / 0.7, 0.1 / 0.7]), atol=0.12)
    given = fit_offsets(stated, labels, ClassWeighing(given=(1 / 0.7, 1 / 0.2, 1 / 0.1)).of_images(labels, 3))
    np.testing.assert_allclose(np.array(given) - given[0], 0, atol=0.12)


def test_the_gain_of_a_balanced_fit_is_in_mean_recall() -> None:
    scores = skewed(300)
    labels = scores.truth.argmax(axis=1)
    found = choose_class_offsets(scores, min_class_patients=5, weighing=ClassWeighing(balanced=True))
    assert found.facts["measure"] == "mean recall"
    before, after = (
        np.mean([(named_class(scores.probabilities, offsets) == labels)[labels == k].mean() for k in range(3)])
        for offsets in ((), found.offsets)
    )
    assert found.facts["gain"][0] == pytest.approx(after - before, abs=0.02)
    plain = choose_class_offsets(scores, min_class_patients=5)
    assert plain.facts["measure"] == "accuracy"
    assert plain.facts["gain"] != found.facts["gain"]


@pytest.mark.parametrize(
    ("training", "weighing", "measure"),
    [
        ({}, ClassWeighing(balanced=True), "mean recall"),
        ({"loss": {"class_weights": "none"}}, ClassWeighing(), "accuracy"),
        ({"loss": {"class_weights": "none"}, "sampling": "balanced"}, ClassWeighing(balanced=True), "mean recall"),
        ({"loss": {"class_weights": [1, 2, 3]}}, ClassWeighing(given=(1, 2, 3)), "weighted accuracy"),
        (
            {"loss": {"class_weights": [1, 2, 3]}, "sampling": "balanced"},
            ClassWeighing(balanced=True, given=(1, 2, 3)),
            "weighted accuracy",
        ),
    ],
)
def test_classes_weigh_as_loss_and_sampling_have_them(
    training: dict[str, Any], weighing: ClassWeighing, measure: str
) -> None:
    job = build_job(TrainJob, {"output": "o", "labels": {"table": "t.csv"}, **training}, "the test")
    assert ClassWeighing.of(job) == weighing
    assert weighing.measure == measure
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    sums = np.bincount(labels, weighing.of_images(labels, 3))
    expected = np.array([1, 1, 1] if weighing.balanced else [60, 30, 10]) * np.array(weighing.given or [1, 1, 1])
    np.testing.assert_allclose(sums / sums.sum(), expected / expected.sum())


@pytest.mark.parametrize("job", [TrainJob, CalibrateJob])
def test_a_training_fits_them_where_it_is_asked_to_and_a_site_unless_it_says_none(job: Any) -> None:
    def fitted(**points: Any) -> Any:
        fields = {"output": "o", "labels": {"table": "t.csv"}, "operating_points": points}
        rest = {"bundle": "b"} if job is CalibrateJob else {}
        return fit_decisions(skewed(60), build_job(job, {**fields, **rest}, "the test"))

    asked = fitted(class_offsets="auto")
    assert len(asked.class_offsets) == 3
    assert asked.facts["class_offsets"]["measure"] == ("accuracy" if job is CalibrateJob else "mean recall")
    assert fitted() == (asked if job is CalibrateJob else fitted(class_offsets="none"))
    assert fitted(class_offsets="none").class_offsets == ()
    assert "class_offsets" not in fitted(class_offsets="none").facts
    with pytest.raises(Exception, match="class_offsets") as caught:
        fitted(class_offsets="some")
    assert not isinstance(caught.value, ValidationError)  # told in the words of the configuration


def test_findings_have_thresholds_and_no_offsets() -> None:
    findings = replace(skewed(60), multi_label=True)
    job = build_job(TrainJob, {"output": "o", "labels": {"table": "t.csv"}}, "the test")
    found = fit_decisions(findings, job)
    assert (found.class_offsets, "class_offsets" in found.facts) == ((), False)


def test_ties_and_no_offsets_name_the_first_of_the_likeliest() -> None:
    probabilities = np.array([[0.4, 0.4, 0.2], [0.0, 0.1, 0.9]], np.float32)
    assert named_class(probabilities, ()).tolist() == [0, 2]
    assert named_class(probabilities, (-0.1, 0.0, -3.0)).tolist() == [1, 1]
    assert int(named_class(probabilities[1], (0.0, 0.0, 0.0))) == 2
