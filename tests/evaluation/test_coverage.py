"""Whether 95 % intervals hold the truth 95 % of the time: studies are simulated of which the truth is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medvision_ray.evaluation.calibration_error import expected_calibration_error
from medvision_ray.evaluation.intervals import FEWEST_PATIENTS, bootstrap_intervals
from medvision_ray.evaluation.measure import measure
from medvision_ray.evaluation.paired import compare_samples
from medvision_ray.evaluation.ranking import weighted_ranking
from medvision_ray.evaluation.samples import EvaluationSamples

KEY = ("all", "accuracy")


def study(generator: np.random.Generator, patients: int, shift: float = 1.5) -> EvaluationSamples:
    """Two to six images a patient that share a patient's effect, on the label's side and on the score's.

    A patient is all of one class. Score of an image: shift x label + patient + image, both standard normal.
    """
    images = generator.integers(2, 7, patients)
    patient = np.repeat(np.arange(patients), images)
    labels = (generator.random(patients) < 0.5).astype(int)[patient]
    latent = shift * labels + generator.normal(size=patients)[patient] + generator.normal(size=patient.size)
    score = stats.norm.cdf(latent - shift / 2)
    true = np.full(patient.size, 100.0)
    overlap = np.round(100 * stats.norm.cdf(0.8 + 0.5 * generator.normal(size=patients)[patient]))
    return EvaluationSamples(
        classes=("no", "yes"),
        multi_label=False,
        patients=patient.astype(str),
        labels=labels,
        probabilities=np.stack([1 - score, score], axis=1),
        predicted=(score >= 0.5).astype(int),
        overlap=overlap,
        predicted_area=true,
        true_area=true,
    )


def truth_of(shift: float = 1.5) -> dict[tuple[str, str], float]:
    """Values of an endless study, in closed form but for Dice."""
    right = float(stats.norm.cdf(shift / 2 / np.sqrt(2)))
    rounded = np.round(100 * stats.norm.cdf(0.8 + 0.5 * stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)))
    return {
        ("all", "accuracy"): right,
        ("yes", "recall"): right,
        ("yes", "auroc"): float(stats.norm.cdf(shift / 2)),
        ("all", "dice"): float(rounded.mean()) / 100,
    }


def coverage(studies: int, patients: int, resamples: int) -> tuple[dict[tuple[str, str], float], float]:
    """How often the interval of each metric held the truth, and how often accuracy's did over images for patients."""
    generator = np.random.default_rng(2026)
    truth, held, naive = truth_of(), Counter[tuple[str, str]](), 0
    for number in range(studies):
        samples = study(generator, patients)
        for row in measure(samples, resamples=resamples, seed=number):
            key = (row.class_name, row.metric)
            if key in truth and row.ci_low is not None and row.ci_high is not None:
                held[key] += row.ci_low <= truth[key] <= row.ci_high
        right = (samples.predicted == samples.labels).astype(float)
        apart = bootstrap_intervals(
            lambda weights, right=right: {KEY: weights @ right / weights.sum(axis=1)},
            np.arange(samples.n).astype(str),
            resamples=resamples,
            seed=number,
        )[KEY]
        naive += apart is not None and apart[0] <= truth[KEY] <= apart[1]
    return {key: held[key] / studies for key in truth}, naive / studies


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    found, _ = coverage(studies=60, patients=60, resamples=200)
    for key, share in found.items():
        assert share >= stats.binom.ppf(0.001, 60, 0.93) / 60, (key, share)


def test_resampling_biases_the_calibration_error_upwards_so_it_has_no_interval() -> None:
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(40):
        confidence = generator.random(200)
        correct = generator.random(200) < confidence  # calibrated: the true error is 0
        plain = expected_calibration_error(confidence, correct)
        draws = generator.integers(0, 200, (100, 200))
        resampled = [expected_calibration_error(confidence[rows], correct[rows]) for rows in draws]
        assert np.percentile(resampled, 2.5) > 0  # no interval of these would hold the truth
        above += np.median(resampled) > plain
    assert above >= 36
    rows = measure(study(generator, 60), resamples=50, seed=0)
    assert [row.ci_low for row in rows if row.metric == "ece"] == [None]


@pytest.mark.slow
def test_coverage_over_a_thousand_studies() -> None:
    found, naive = coverage(studies=1000, patients=60, resamples=400)
    print(found, naive)
    for key, share in found.items():  # the percentile bootstrap is known to be a little short at 60 patients
        assert 0.92 <= share <= 0.97, (key, share)
    assert naive < 0.88, "images drawn as if they were independent: the error that drawing patients avoids"


@pytest.mark.slow
def test_coverage_of_paired_differences_over_500_studies() -> None:
    generator = np.random.default_rng(7)
    truth = truth_of(1.5)["all", "accuracy"] - truth_of(1.0)["all", "accuracy"]
    held = 0
    for number in range(500):
        model = study(generator, 60)
        noise = generator.normal(size=model.n)
        weaker = stats.norm.cdf(1.0 * model.labels - 0.5 + np.sqrt(2) * noise)
        other = replace(
            model,
            probabilities=np.stack([1 - weaker, weaker], axis=1),
            predicted=(weaker >= 0.5).astype(int),
        )
        rows = compare_samples(model, other, resamples=400, seed=number).differences
        row = next(row for row in rows if (row.class_name, row.metric) == ("all", "accuracy"))
        held += row.ci_low <= truth <= row.ci_high
    assert 0.92 <= held / 500 <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize("having", [2, 3, 5, 20])
def test_coverage_of_auroc_where_few_patients_have_the_finding(having: int) -> None:
    generator = np.random.default_rng(having)
    positive = np.arange(60) < having
    truth = float(stats.norm.cdf(1 / np.sqrt(2)))
    held, alike = [], []
    for number in range(300):
        latent = positive + generator.normal(size=60)
        both = [stats.norm.cdf(latent + 0.5 * generator.normal(size=60)) for _ in range(2)]
        for wanted, scores, found in ((truth, [latent], held), (0.0, both, alike)):
            interval = auroc_interval(scores, positive, number)
            if interval is not None:
                found.append(interval[0] <= wanted <= interval[1])
    print(f"{having} of 60: AUROC held by {np.mean(held):.3f}, no difference of two alike by {np.mean(alike):.3f}")
    if having >= FEWEST_PATIENTS:
        assert min(np.mean(held), np.mean(alike)) > 0.8
    else:
        assert np.mean(held) < 0.85  # why they get none


def auroc_interval(scores: list[np.ndarray], positive: np.ndarray, seed: int) -> tuple[float, float] | None:
    """The interval that an AUROC, or the difference of two, would have."""
    rankings = [weighted_ranking(each, positive) for each in scores]

    def statistic(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        first, *rest = (ranking(weights)["auroc"] for ranking in rankings)
        return {KEY: first - rest[0] if rest else first}

    return bootstrap_intervals(statistic, np.arange(positive.size).astype(str), resamples=400, seed=seed)[KEY]
