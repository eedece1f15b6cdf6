"""Fingerprints: PSI and KS against independent arithmetic, what is flagged and what chance alone is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import ks_2samp

from medvision_ray.fingerprint import (
    PSI_SHIFTED,
    Drift,
    FeatureDrift,
    Fingerprint,
    Reference,
    drift_of,
    population_stability,
    reference_of_categories,
    reference_of_numbers,
)
from medvision_ray.imaging.intensity import INPUT_COLUMNS, input_statistics
from medvision_ray.tables.schema import INPUT_STATISTICS


def own(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def numbers(values: object) -> Reference:
    found = list(np.asarray(values, dtype=float))
    reference = reference_of_numbers(found, own(len(found)), "train")
    assert reference is not None
    return reference


def test_input_statistics_are_numpys() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (3, 1, 32, 32)).astype(np.uint8)
    found = input_statistics(pixels)
    assert tuple(found) == INPUT_COLUMNS == tuple(column.name for column in INPUT_STATISTICS)
    low, middle, high = np.percentile(pixels, [5, 50, 95], method="inverted_cdf")
    assert list(found.values()) == pytest.approx([pixels.mean(), pixels.std(), low, middle, high], abs=1e-9)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("total", [1, 19, 20, 100])
def test_percentiles_of_few_pixels_are_numpys(total: int, share: float) -> None:
    pixels = np.arange(total, dtype=np.uint8).reshape(1, 1, 1, total)
    expected = np.percentile(pixels, 100 * share, method="inverted_cdf")
    assert input_statistics(pixels)[f"input_p{round(100 * share):02d}"] == expected


def test_psi_is_the_published_formula() -> None:
    night, training = np.array([30.0, 50, 20]), np.array([100.0, 100, 200])
    a, b = (night + 0.5) / 101.5, (training + 0.5) / 401.5
    assert population_stability(night, training) == pytest.approx(((a - b) * np.log(a / b)).sum())


def test_ks_is_scipys_on_the_full_samples_to_the_grain_of_the_quantiles() -> None:
    generator = np.random.default_rng(1)
    training, night = generator.normal(0, 1, 5000), generator.normal(0.4, 1.2, 700)
    found = drift_of("x", numbers(training), night.tolist(), 700)
    assert found.ks == pytest.approx(ks_2samp(training, night).statistic, abs=1 / 500)


def test_each_bin_holds_a_tenth_and_nothing_lies_outside() -> None:
    reference = numbers(np.random.default_rng(0).normal(size=1000))
    assert reference.counts == (0, *[100] * 10, 0)
    assert len(reference.quantiles) == 501


def test_a_constant_feature_is_steady_and_any_other_value_shifts_it() -> None:
    reference = numbers([224.0] * 500)
    assert drift_of("height", reference, [224.0] * 100, 100).psi < 0.01
    assert drift_of("height", reference, [224.0] * 60 + [512.0] * 40, 100).shifted
    assert drift_of("height", reference, [100.0] * 100, 100).shifted


def test_values_outside_of_the_training_and_missing_ones_are_bins_of_their_own() -> None:
    generator = np.random.default_rng(0)
    reference = numbers(generator.normal(size=2000))
    usual = generator.normal(size=400).tolist()
    assert not drift_of("x", reference, usual, 400).shifted
    assert drift_of("x", reference, usual[:320] + [50.0] * 80, 400).shifted
    assert drift_of("x", reference, usual[:320] + [None] * 80, 400).shifted


def test_no_more_nights_than_one_in_hundreds_are_flagged_by_chance() -> None:
    """500 simulated nights of the training's own distribution, as few as 50 images: the bound allows 1 in 1,000."""
    generator = np.random.default_rng(3)
    flagged = 0
    for _ in range(25):
        reference = numbers(generator.gamma(2.0, size=400))
        flagged += sum(drift_of("x", reference, generator.gamma(2.0, size=50), 50).shifted for _ in range(20))
    assert flagged <= 3


def test_images_of_few_patients_are_not_taken_for_independent() -> None:
    """Every image of a patient alike: without counting patients most such nights would be flagged."""
    generator = np.random.default_rng(4)
    patients = generator.normal(size=200)
    reference = reference_of_numbers(np.repeat(patients, 10), np.repeat(own(200), 10), "train")
    assert reference is not None
    assert (reference.images, reference.patients) == (2000, 200)
    nights = [np.repeat(generator.normal(size=8), 20) for _ in range(200)]
    by_patient = sum(drift_of("x", reference, night, 8).shifted for night in nights)
    by_image = sum(drift_of("x", reference, night, 160).shifted for night in nights)
    assert by_patient <= 4
    assert by_image > 100


def test_categories_new_and_vanished_shift() -> None:
    values = ["GE"] * 300 + ["Siemens"] * 200
    reference = reference_of_categories(values, own(500), "train")
    assert reference is not None
    assert reference.categories == ("GE", "Siemens")
    steady = drift_of("manufacturer", reference, ["GE"] * 62 + ["Siemens"] * 38, 100)
    assert steady.ks is None
    assert not steady.shifted
    assert drift_of("manufacturer", reference, ["GE"] * 30 + ["Philips"] * 70, 100).shifted
    assert drift_of("manufacturer", reference, [None] * 100, 100).shifted


def test_what_no_image_says_is_no_feature() -> None:
    assert reference_of_numbers([None, float("nan")], own(2), "train") is None
    assert reference_of_categories([None, ""], own(2), "train") is None


def test_a_fingerprint_survives_json() -> None:
    codes = reference_of_categories(["MR", None], own(2), "train")
    assert codes is not None
    fingerprint = Fingerprint({"input_mean": numbers([0.1, 0.2, 0.7]), "modality": codes})
    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.as_json()))) == fingerprint
    for broken in ([], {"version": 2, "features": {}}, {"version": 1}, {"version": 1, "features": {"x": {"a": 1}}}):
        with pytest.raises(ValueError, match=r"^$"):
            Fingerprint.from_json(broken)


def test_the_line_for_people_names_the_largest_shifts() -> None:
    features = tuple(FeatureDrift(f"f{i}", 3.0 - i / 10, 0.5, True, 100, 100) for i in range(7))
    line = Drift(True, shifted=tuple(item.feature for item in features), features=features).line()
    assert "f0 (PSI 3.00, KS 0.50)" in line
    assert "and 2 more" in line
    calm = (FeatureDrift("input_sd", PSI_SHIFTED - 0.05, None, False, 100, 100),)
    assert "0.1 or more: input_sd" in Drift(True, features=calm).line()
    assert Drift(False, "why").line() == "Drift not judged: why."
