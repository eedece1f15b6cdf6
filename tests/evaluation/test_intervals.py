"""The patient bootstrap: what it draws, how wide it is, and when it stays silent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import (
    FEWEST_PATIENTS,
    Statistic,
    bootstrap_intervals,
    divide,
    patient_weights,
    percentile_interval,
    plain_means,
    weighted_means,
)
from medvision_ray.evaluation.measure import measure
from medvision_ray.evaluation.paired import compare_samples
from medvision_ray.evaluation.samples import EvaluationSamples

KEY = ("all", "mean")


def mean_of(values: np.ndarray) -> Statistic:
    return lambda weights: {KEY: divide(weights @ values, weights.sum(axis=1))}


def width(values: np.ndarray, patients: np.ndarray, resamples: int = 500) -> float:
    interval = bootstrap_intervals(mean_of(values), patients, resamples=resamples, seed=0)[KEY]
    assert interval is not None
    return interval[1] - interval[0]


def test_all_images_of_a_patient_get_the_same_weight_and_each_resample_draws_as_many_patients_as_there_are() -> None:
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    weights = np.concatenate(list(patient_weights(patients, resamples=50, seed=3)))
    assert weights.shape == (50, 6)
    for name in "abc":
        assert (np.ptp(weights[:, patients == name], axis=1) == 0).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert len({tuple(row) for row in weights}) > 5


def test_every_patient_is_drawn_with_the_same_chance() -> None:
    patients = np.repeat(np.arange(5).astype(str), [1, 2, 3, 4, 50])
    first = np.unique(patients, return_index=True)[1]
    weights = np.concatenate(list(patient_weights(patients, resamples=4000, seed=0)))[:, first]
    assert stats.chisquare(weights.sum(axis=0)).pvalue > 0.01


def test_chunks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = np.arange(40).astype(str)
    whole = np.concatenate(list(patient_weights(patients, resamples=30, seed=1)))
    monkeypatch.setattr("medvision_ray.evaluation.intervals._CHUNK_WEIGHTS", 7 * 40)
    chunks = list(patient_weights(patients, resamples=30, seed=1))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_the_interval_of_a_mean_agrees_with_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = bootstrap_intervals(mean_of(values), np.arange(80).astype(str), resamples=20_000, seed=0)[KEY]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_equal_seeds_give_equal_intervals_and_another_seed_another() -> None:
    values, patients = np.random.default_rng(0).random(50), np.arange(50).astype(str)
    first, second, third = (
        bootstrap_intervals(mean_of(values), patients, resamples=100, seed=seed)[KEY] for seed in (7, 7, 8)
    )
    assert first == second != third


def test_images_that_repeat_their_patient_give_wider_intervals_than_independent_ones() -> None:
    per_patient = np.random.default_rng(0).random(40)
    values, patients = np.repeat(per_patient, 10), np.repeat(np.arange(40).astype(str), 10)
    # Ten copies of each patient carry no more than one: the standard error grows by sqrt(10).
    assert width(values, patients) == pytest.approx(np.sqrt(10) * width(values, np.arange(400).astype(str)), rel=0.15)


def test_accuracy_intervals_of_clustered_images_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = naive = 0
    for trial in range(200):
        skill = generator.beta(4, 2, size=60)  # a patient's images are right with the patient's own chance
        sizes = generator.integers(1, 9, size=60)
        patients = np.repeat(np.arange(60), sizes).astype(str)
        right = (generator.random(sizes.sum()) < np.repeat(skill, sizes)).astype(float)
        low, high = bootstrap_intervals(mean_of(right), patients, resamples=300, seed=trial)[KEY]
        covered += low <= 4 / 6 <= high
        alone = np.arange(right.size).astype(str)
        low, high = bootstrap_intervals(mean_of(right), alone, resamples=300, seed=trial)[KEY]
        naive += low <= 4 / 6 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert naive < covered


def test_one_patient_gives_no_interval() -> None:
    assert bootstrap_intervals(mean_of(np.arange(5.0)), np.full(5, "a"), resamples=100, seed=0) == {}


def test_no_resamples_give_no_interval() -> None:
    assert bootstrap_intervals(mean_of(np.arange(5.0)), np.arange(5).astype(str), resamples=0, seed=0) == {}


def test_a_negative_number_of_resamples_is_refused() -> None:
    with pytest.raises(MedVisionError, match="0 or more, but got -1"):
        bootstrap_intervals(mean_of(np.arange(5.0)), np.arange(5).astype(str), resamples=-1, seed=0)


def test_a_value_that_never_varies_gets_no_interval_of_width_zero() -> None:
    assert bootstrap_intervals(mean_of(np.ones(9)), np.arange(9).astype(str), resamples=100, seed=0)[KEY] is None


def test_undefined_resamples_are_left_out_up_to_half() -> None:
    half = np.concatenate([np.arange(101.0), np.full(101, np.nan)])
    assert percentile_interval(half) == pytest.approx((2.5, 97.5))
    assert percentile_interval(np.append(half, np.nan)) is None
    assert percentile_interval(np.full(10, np.nan)) is None


def test_means_are_over_members_only_and_undefined_without_one() -> None:
    values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, np.nan]])
    members = np.array([[True, False], [True, False], [False, False]])
    np.testing.assert_array_equal(plain_means(values, members), [2, np.nan])
    weights = np.array([[1.0, 1, 1], [3, 1, 9], [0, 0, 1]])
    np.testing.assert_array_equal(weighted_means(weights, values, members), [[2, np.nan], [1.5, np.nan], [np.nan] * 2])


def finding(having: int, lacking: int) -> EvaluationSamples:
    """A patient an image, some of whom have the finding; scores overlap."""
    generator = np.random.default_rng(having)
    truth = np.arange(having + lacking) < having
    score = stats.norm.cdf(truth + generator.normal(size=truth.size))
    return EvaluationSamples(
        classes=("nodule",),
        multi_label=True,
        patients=np.arange(truth.size).astype(str),
        targets=truth[:, None].astype(float),
        probabilities=score[:, None],
        thresholds=np.array([0.5]),
    )


@pytest.mark.parametrize(("having", "lacking"), [(FEWEST_PATIENTS - 1, 60), (60, FEWEST_PATIENTS - 1)])
def test_a_class_that_few_patients_have_or_lack_has_no_interval_nor_a_test(having: int, lacking: int) -> None:
    few, enough = (
        {row.metric: row for row in measure(finding(a, b), resamples=100, seed=0) if row.class_name == "nodule"}
        for a, b in ((having, lacking), (max(having, FEWEST_PATIENTS), max(lacking, FEWEST_PATIENTS)))
    )
    for metric in ("auroc", "average_precision", "f1", "balanced_accuracy", "cohen_kappa"):
        assert (few[metric].value is None, few[metric].ci_low, enough[metric].ci_low is None) == (False, None, False)
    assert few["accuracy"].ci_low is not None  # rests on all of them
    alone = "specificity" if having < lacking else "recall"  # rests on those who are many
    assert few[alone].ci_low is not None
    assert few["recall" if alone == "specificity" else "specificity"].ci_low is None
    macro = next(
        row
        for row in measure(finding(having, lacking), resamples=100, seed=0)
        if row.class_name == "macro" and row.metric == "auroc"
    )
    assert (macro.value, macro.ci_low) == (few["auroc"].value, None)
    model = finding(having, lacking)
    other = replace(model, probabilities=model.probabilities[::-1])
    compared = compare_samples(model, other, resamples=100, seed=0)
    assert compared.auroc_tests == {}
    auroc = next(row for row in compared.differences if (row.class_name, row.metric) == ("nodule", "auroc"))
    assert (auroc.difference is None, auroc.ci_low) == (False, None)


def test_fewer_patients_than_five_have_no_interval_at_all() -> None:
    values, patients = np.arange(8.0), np.array(list("aabbccdd"))
    assert bootstrap_intervals(mean_of(values), patients, resamples=100, seed=0) == {}
    carried = bootstrap_intervals(mean_of(values), np.arange(8).astype(str), resamples=100, seed=0, carriers={KEY: 4})
    assert carried == {KEY: None}
