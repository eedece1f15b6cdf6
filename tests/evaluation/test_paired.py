"""Two models on the same images: DeLong, McNemar and paired differences against definitions, permutations and scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy import stats

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import patient_weights
from medvision_ray.evaluation.paired import compare_samples
from medvision_ray.evaluation.paired_tests import delong_test, mcnemar_test
from medvision_ray.evaluation.samples import EvaluationSamples


def two_scores(n: int, *, seed: int, gain: float = 0.0, steps: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two models with ties, the first better by `gain`, and who is positive."""
    generator = np.random.default_rng(seed)
    positive = generator.random(n) < 0.4
    shared = generator.normal(size=n)
    scores = [
        np.round((positive * (1 + better) + shared + generator.normal(size=n)) * steps) / steps for better in (gain, 0)
    ]
    return scores[0], scores[1], positive


def delong_by_definition(scores: list[np.ndarray], positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and covariance from the kernel over every pair, as equations 5 to 8 of the 1988 paper state them."""
    over = []
    for values in scores:
        x, y = values[positive][:, None], values[~positive][None]
        over.append((x > y) + 0.5 * (x == y))
    m, n = over[0].shape
    aurocs = np.array([kernel.mean() for kernel in over])
    v10 = np.stack([kernel.mean(axis=1) for kernel in over])
    v01 = np.stack([kernel.mean(axis=0) for kernel in over])
    return aurocs, np.cov(v10) / m + np.cov(v01) / n


@pytest.mark.parametrize("seed", range(5))
def test_with_one_image_a_patient_it_is_delongs_test(seed: int) -> None:
    model, baseline, positive = two_scores(70, seed=seed, gain=0.3)
    aurocs, covariance = delong_by_definition([model, baseline], positive)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    test = delong_test(model, baseline, positive, np.arange(70).astype(str))
    assert test is not None
    assert (test.auroc, test.baseline) == pytest.approx(tuple(aurocs), abs=1e-12)
    assert test.auroc == pytest.approx(reference.roc_auc_score(positive, model), abs=1e-12)
    assert test.standard_error == pytest.approx(error, abs=1e-12)
    assert test.p == pytest.approx(2 * stats.norm.sf(abs(aurocs[0] - aurocs[1]) / error), abs=1e-12)


def test_a_permutation_of_the_models_gives_nearly_the_same_p() -> None:
    generator = np.random.default_rng(0)
    for seed in (1, 2, 3):
        model, baseline, positive = two_scores(150, seed=seed, gain=0.25, steps=10_000)
        model, baseline = stats.rankdata(model), stats.rankdata(baseline)  # exchangeable: the same scale
        test = delong_test(model, baseline, positive, np.arange(150).astype(str))
        assert test is not None
        observed = abs(test.auroc - test.baseline)
        swapped = []
        for _ in range(400):
            swap = generator.random(150) < 0.5
            one, other = np.where(swap, baseline, model), np.where(swap, model, baseline)
            values = [stats.rankdata(part)[positive].mean() / (~positive).sum() for part in (one, other)]
            swapped.append(abs(values[0] - values[1]))
        assert test.p == pytest.approx(np.mean(np.array(swapped) >= observed), abs=0.08)


def test_repeating_each_image_of_a_patient_adds_no_certainty() -> None:
    model, baseline, positive = two_scores(60, seed=1, gain=0.3)
    patients = np.arange(60).astype(str)
    once = delong_test(model, baseline, positive, patients)
    thrice = delong_test(*(np.repeat(part, 3) for part in (model, baseline, positive, patients)))
    assert once is not None
    assert thrice is not None
    assert thrice.standard_error == pytest.approx(once.standard_error, rel=1e-9)
    naive = delong_test(*(np.repeat(part, 3) for part in (model, baseline, positive)), np.arange(180).astype(str))
    assert naive is not None
    assert naive.standard_error < 0.62 * once.standard_error


def test_patients_with_images_of_both_classes_agree_with_the_bootstrap() -> None:
    generator = np.random.default_rng(2)
    patients = np.repeat(np.arange(80), 4)
    positive = generator.random(320) < 0.5
    model, baseline = (
        positive + generator.normal(size=80)[patients] * spread + generator.normal(size=320) for spread in (1.0, 0.3)
    )
    test = delong_test(model, baseline, positive, patients.astype(str))
    assert test is not None
    differences = []
    for weights in np.concatenate(list(patient_weights(patients.astype(str), resamples=300, seed=0))):
        one, other = (reference.roc_auc_score(positive, part, sample_weight=weights) for part in (model, baseline))
        differences.append(one - other)
    assert test.standard_error == pytest.approx(np.std(differences), rel=0.15)


def test_models_that_rank_alike_have_no_p() -> None:
    model, _, positive = two_scores(40, seed=0)
    test = delong_test(model, 2 * model + 1, positive, np.arange(40).astype(str))
    assert test is not None
    assert (test.standard_error, test.z, test.p) == (0, None, None)
    assert delong_test(model, model, np.ones(40, dtype=bool), np.arange(40).astype(str)) is None
    assert delong_test(model, model, positive, np.where(positive, "a", "b")) is None


def test_mcnemar_is_the_binomial_test_of_the_images_on_which_the_models_differ() -> None:
    generator = np.random.default_rng(0)
    model, baseline = generator.random(200) < 0.8, generator.random(200) < 0.7
    test = mcnemar_test(model, baseline)
    b, c = int((model & ~baseline).sum()), int((~model & baseline).sum())
    tail = sum(stats.binom.pmf(k, b + c, 0.5) for k in range(min(b, c) + 1))
    assert (test.only_model, test.only_baseline) == (b, c)
    assert test.p == pytest.approx(min(1.0, 2 * tail), abs=1e-12)
    assert mcnemar_test(model, model).p == 1


def make(seed: int, n: int = 90, *, quality: float = 1.0) -> EvaluationSamples:
    """Samples of one model; truth and patients do not depend on the quality."""
    truth = np.random.default_rng(seed)
    labels, true = truth.integers(0, 3, n), truth.integers(1, 50, n).astype(float)
    generator = np.random.default_rng([seed, int(1000 * quality)])
    logits = generator.normal(size=(n, 3))
    logits[np.arange(n), labels] += quality
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    overlap = np.floor(true * generator.random(n) * min(quality, 1))
    return EvaluationSamples(
        classes=("a", "b", "c"),
        multi_label=False,
        patients=(np.arange(n) // 3).astype(str),
        labels=labels,
        probabilities=probabilities,
        predicted=probabilities.argmax(1),
        overlap=overlap,
        predicted_area=overlap + 2,
        true_area=true,
    )


def test_differences_are_those_of_each_draw_of_patients() -> None:
    model, baseline = make(0, quality=1.5), make(0, quality=0.8)
    found = {
        (row.class_name, row.metric): row for row in compare_samples(model, baseline, resamples=200, seed=3).differences
    }
    accuracy, dice = [], []
    right = [(part.predicted == part.labels).astype(float) for part in (model, baseline)]
    each = [2 * part.overlap / (part.predicted_area + part.true_area) for part in (model, baseline)]
    for weights in np.concatenate(list(patient_weights(model.patients, resamples=200, seed=3))):
        accuracy.append(weights @ (right[0] - right[1]) / weights.sum())
        dice.append(weights @ (each[0] - each[1]) / weights.sum())
    for metric, values, exact in (
        ("accuracy", accuracy, right[0].mean() - right[1].mean()),
        ("dice", dice, each[0].mean() - each[1].mean()),
    ):
        row = found["all", metric]
        assert row.difference == pytest.approx(exact)
        assert row.difference == pytest.approx(row.value - row.baseline)
        assert (row.ci_low, row.ci_high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_pairing_makes_the_interval_narrower_than_two_apart() -> None:
    model = make(1, 150, quality=1.0)
    probabilities = model.probabilities.copy()
    probabilities[::10] = probabilities[::10][:, [1, 2, 0]]
    other = replace(model, probabilities=probabilities, predicted=probabilities.argmax(1))
    rows = {
        (row.class_name, row.metric): row for row in compare_samples(other, model, resamples=300, seed=0).differences
    }
    row = rows["all", "accuracy"]
    right = (model.predicted == model.labels).astype(float)
    alone = [
        weights @ right / weights.sum()
        for weights in np.concatenate(list(patient_weights(model.patients, resamples=300, seed=0)))
    ]
    assert row.ci_high - row.ci_low < 0.7 * np.ptp(np.percentile(alone, [2.5, 97.5]))


def test_one_model_that_only_draws_is_compared_by_its_masks() -> None:
    model = make(2)
    drawing = EvaluationSamples(
        classes=("lesion",),
        multi_label=False,
        patients=model.patients,
        labels=np.full(model.n, -1),
        overlap=model.overlap,
        predicted_area=model.predicted_area + 1,
        true_area=model.true_area,
    )
    found = compare_samples(model, drawing, resamples=50, seed=0)
    assert {(row.class_name, row.metric) for row in found.differences} == {("all", "dice"), ("all", "iou")}
    assert (found.auroc_tests, found.accuracy_tests) == ({}, {})


def test_findings_are_tested_one_by_one_over_the_images_where_they_are_known() -> None:
    generator = np.random.default_rng(0)
    targets = (generator.random((60, 2)) < 0.5).astype(float)
    targets[:20, 1] = np.nan
    patients = np.arange(60).astype(str)
    scores = [np.clip(np.nan_to_num(targets) * gain + generator.random((60, 2)) * 0.6, 0, 1) for gain in (0.3, 0.1)]
    model, baseline = (
        EvaluationSamples(("x", "y"), True, patients, targets=targets, probabilities=part, thresholds=np.full(2, 0.5))
        for part in scores
    )
    found = compare_samples(model, baseline, resamples=0, seed=0)
    right = [(part[20:, 1] >= 0.5) == (targets[20:, 1] == 1) for part in scores]
    assert found.accuracy_tests["y"] == mcnemar_test(*right)
    expected = delong_test(scores[0][20:, 1], scores[1][20:, 1], targets[20:, 1] == 1, patients[20:])
    assert found.auroc_tests["y"] == expected


def test_other_images_or_another_truth_are_refused() -> None:
    model = make(0)
    with pytest.raises(MedVisionError, match="same images in the same order"):
        compare_samples(model, make(0, 60), resamples=0, seed=0)
    with pytest.raises(MedVisionError, match="same labels"):
        compare_samples(model, replace(model, labels=(model.labels + 1) % 3), resamples=0, seed=0)
    with pytest.raises(MedVisionError, match="same true masks"):
        compare_samples(model, replace(model, true_area=model.true_area + 1), resamples=0, seed=0)
    with pytest.raises(MedVisionError, match="same classes in the same order"):
        compare_samples(model, replace(model, classes=("a", "c", "b")), resamples=0, seed=0)
