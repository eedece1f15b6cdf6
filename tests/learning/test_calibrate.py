"""Fitting a calibration: against Guo's and scikit-learn's, on models whose flaw is known, and where there is too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from sklearn.calibration import _sigmoid_calibration

from medvision_ray.calibration import PlattScaling, TemperatureScaling, logits
from medvision_ray.config import CalibrationConfig, TrainJob, build_job
from medvision_ray.learning.calibrate import (
    ValidationScores,
    fit_calibration,
    fit_sigmoid,
    fit_temperature,
    patient_folds,
)
from medvision_ray.learning.decisions import fit_decisions

CLASSES = ("a", "b", "c")


def single(n: int = 3000, temperature: float = 2.5, seed: int = 0, images: int = 2) -> ValidationScores:
    """A model that is too sure of itself by `temperature`; `images` images a patient."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(0, 2, (n, len(CLASSES)))
    labels = np.array([generator.choice(len(CLASSES), p=row) for row in softmax(honest, axis=1)])
    return ValidationScores(
        classes=CLASSES,
        multi_label=False,
        probabilities=softmax(honest * temperature, axis=1).astype(np.float32),
        truth=(labels[:, None] == np.arange(len(CLASSES))).astype(np.float64),
        patients=np.array([f"p{number // images}" for number in range(n)]),
    )


def multi(n: int = 4000, seed: int = 0) -> ValidationScores:
    """Finding `a` too sure and too often, `b` upside down, `c` blank in all but four images."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(-1, 2, (n, len(CLASSES)))
    truth = (generator.random(honest.shape) < expit(honest)).astype(np.float64)
    truth[4:, 2] = np.nan
    truth[::7, 0] = np.nan
    raw = expit(np.stack([2 * honest[:, 0] + 1, -honest[:, 1], honest[:, 2]], axis=1))
    patients = np.array([f"p{number // 2}" for number in range(n)])
    return ValidationScores(CLASSES, True, raw.astype(np.float32), truth, patients)


def job(**options: Any) -> TrainJob:
    return build_job(TrainJob, {"output": "o", "labels": {"table": "t"}, **options}, "the test")


def test_the_temperature_is_the_one_of_guos_code() -> None:
    scores = single(500)
    known = torch.tensor(np.log(scores.probabilities.astype(np.float64)))
    labels = torch.tensor(scores.truth.argmax(axis=1))
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(known / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(scores.probabilities, scores.truth) == pytest.approx(temperature.item(), rel=1e-4)


def test_a_known_temperature_is_found_and_unlabelled_images_do_not_count() -> None:
    scores = single()
    found = fit_temperature(scores.probabilities, scores.truth)
    assert found == pytest.approx(2.5, rel=0.1)
    more = np.concatenate([scores.truth, np.full((50, 3), np.nan)])
    probabilities = np.concatenate([scores.probabilities, scores.probabilities[:50]])
    assert fit_temperature(probabilities, more) == found


def test_the_sigmoid_is_the_one_of_scikit_learn() -> None:
    scores = multi(600)
    known = ~np.isnan(scores.truth[:, 0])
    raw, positive = scores.probabilities[known, 0], scores.truth[known, 0] == 1
    # scikit-learn's is 1 / (1 + exp(a * f + b)), fitted to Platt's targets as well.
    a, b = _sigmoid_calibration(logits(raw), positive.astype(int))
    assert fit_sigmoid(raw, positive) == pytest.approx((-a, -b), rel=1e-3)


def test_a_finding_that_is_told_perfectly_gets_platts_smoothed_shares_however_narrow_its_logits() -> None:
    positive = np.arange(100) % 4 == 0
    raw = expit(np.where(positive, 0.02, 0.01)).astype(np.float32)
    pair = fit_sigmoid(raw, positive)
    assert pair is not None
    found = PlattScaling((pair,)).apply(raw[:, None])[:, 0]
    assert found[positive] == pytest.approx(26 / 27, abs=1e-3)
    assert found[~positive] == pytest.approx(1 / 77, abs=1e-3)


def test_a_finding_with_one_probability_throughout_gets_none() -> None:
    assert fit_sigmoid(np.full(40, 0.3, np.float32), np.arange(40) % 2 == 0) is None


def test_calibration_repairs_what_was_wrong_on_new_patients() -> None:
    fitted = fit_calibration(single(), CalibrationConfig())
    new = single(seed=1)
    assert isinstance(fitted.calibration, TemperatureScaling)
    honest = softmax(np.log(new.probabilities.astype(np.float64)) / 2.5, axis=1)
    assert np.abs(fitted.calibration.apply(new.probabilities) - honest).max() < 0.03
    assert fitted.facts == {"method": "temperature", "patients": 1500}


def test_findings_are_calibrated_apart_and_the_others_say_why_not() -> None:
    fitted = fit_calibration(multi(), CalibrationConfig())
    assert isinstance(fitted.calibration, PlattScaling)
    first, *others = fitted.calibration.sigmoids
    assert first == pytest.approx((0.5, -0.5), abs=0.1)
    assert others == [None, None]
    assert fitted.facts["reasons"] == {
        "b": "higher probabilities do not mean that the finding is likelier",
        "c": "2 validation patients, and `calibration.min_patients` is 20",
    }


def test_too_few_patients_are_refused_however_many_images_they_have() -> None:
    few = single(600, images=50)  # 12 patients
    fitted = fit_calibration(few, CalibrationConfig())
    assert fitted.calibration is None
    assert fitted.out_of_fold is None
    assert fitted.facts["method"] == "none"
    assert fitted.facts["reasons"]["a"] == "12 validation patients, and `calibration.min_patients` is 20"
    enough = CalibrationConfig(min_patients=10, only_if_better=False)
    assert fit_calibration(few, enough).calibration is not None


def test_a_rare_class_is_refused() -> None:
    scores = single(200)
    kept = (scores.truth[:, 2] == 0) | (np.cumsum(scores.truth[:, 2]) <= 3)
    fitted = fit_calibration(scores.take(kept), CalibrationConfig())
    assert fitted.facts["reasons"] == {"c": "3 validation patients with it, and `calibration.min_class_patients` is 5"}


def test_perfect_validation_labels_give_no_temperature() -> None:
    scores = single(400)
    told = softmax(scores.truth * 3, axis=1).astype(np.float32)
    perfect = ValidationScores(CLASSES, False, told, scores.truth, scores.patients)
    fitted = fit_calibration(perfect, CalibrationConfig())
    assert fitted.calibration is None
    assert "no temperature between 0.05 and 20" in fitted.facts["reasons"]["all"]


def test_method_none_and_no_classes_fit_nothing() -> None:
    assert fit_calibration(single(), CalibrationConfig(method="none")).facts == {
        "method": "none",
        "reason": "`calibration.method` is none",
    }
    nothing = ValidationScores((), False, np.empty((3, 0), np.float32), np.empty((3, 0)), np.array(["a", "b", "c"]))
    assert fit_calibration(nothing, CalibrationConfig()).calibration is None
    assert fit_decisions(nothing, job()).metrics == {}


def test_folds_keep_patients_together_and_are_the_same_again() -> None:
    patients = single(300, images=3).patients
    folds = patient_folds(patients, 5)
    assert (np.sum(folds, axis=0) == 1).all()
    for fold in folds:
        assert not set(patients[fold]) & set(patients[~fold])
        assert 40 <= fold.sum() <= 80
    assert all((one == other).all() for one, other in zip(folds, patient_folds(patients, 5), strict=True))


def test_an_image_of_a_fold_is_calibrated_by_the_other_folds_alone() -> None:
    scores = single(200)
    before = fit_calibration(scores, CalibrationConfig(only_if_better=False)).out_of_fold
    fold = patient_folds(scores.patients, 5)[0]
    changed = scores.truth.copy()
    changed[fold] = np.roll(changed[fold], 1, axis=1)
    after = fit_calibration(
        ValidationScores(CLASSES, False, scores.probabilities, changed, scores.patients),
        CalibrationConfig(only_if_better=False),
    ).out_of_fold
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(before[fold], after[fold])
    assert not np.allclose(before[~fold], after[~fold])


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_calibration_that_is_not_shown_to_be_better_is_not_kept(multi_label: bool) -> None:
    """A model that is honest already: what a fit finds in 60 patients is noise."""
    honest = single(120, temperature=1.0)
    if multi_label:
        generator = np.random.default_rng(0)
        raw = expit(generator.normal(0, 2, (120, 3)))
        truth = (generator.random(raw.shape) < raw).astype(np.float64)
        honest = ValidationScores(CLASSES, True, raw.astype(np.float32), truth, honest.patients)
    fitted = fit_calibration(honest, CalibrationConfig())
    assert fitted.calibration is None
    assert all("not shown to be better: log loss" in reason for reason in fitted.facts["reasons"].values())
    assert fit_calibration(honest, CalibrationConfig(only_if_better=False)).calibration is not None


def test_errors_and_diagram_before_and_after() -> None:
    found = fit_decisions(single(), job()).metrics
    assert found["val_ece"] > 0.1
    assert found["val_ece_calibrated"] < 0.04
    assert found["val_brier_calibrated"] < found["val_brier"]
    assert found["val_log_loss_calibrated"] < found["val_log_loss"]
    bins = found["reliability"]["raw"]["all"]
    assert len(bins) == 15
    assert sum(part["images"] for part in bins) == 3000
    gaps = [part["images"] * abs(part["correct"] - part["confidence"]) for part in bins if part["images"]]
    assert sum(gaps) / 3000 == pytest.approx(found["val_ece"])
    assert set(found["reliability"]) == {"raw", "calibrated"}


def test_a_finding_without_a_calibration_leaves_the_mean_undefined_and_the_diagram_without_it() -> None:
    found = fit_decisions(multi(), job()).metrics
    assert np.isnan(found["val_ece_calibrated"])
    assert set(found["reliability"]["raw"]) == set(CLASSES)
    assert set(found["reliability"]["calibrated"]) == {"a"}
