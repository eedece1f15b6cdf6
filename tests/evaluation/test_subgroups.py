"""Groups of images: their values, counts, and that small ones are counted and not measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as reference

from medvision_ray.errors import LabelError
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.subgroups import measure_subgroups, subgroup_values


def make(n: int = 120) -> tuple[pd.DataFrame, EvaluationSamples]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, n)
    score = np.clip(0.4 * labels + 0.6 * generator.random(n), 0, 1)
    area = generator.choice([0.0, 10, 100, 900, np.nan], n)
    samples = EvaluationSamples(
        classes=("no", "yes"),
        multi_label=False,
        patients=(np.arange(n) // 2).astype(str),
        labels=labels,
        probabilities=np.stack([1 - score, score], axis=1),
        predicted=(score >= 0.5).astype(int),
        overlap=np.where(np.isnan(area), np.nan, 0),
        predicted_area=np.where(np.isnan(area), np.nan, 3),
        true_area=area,
    )
    scored = pd.DataFrame({"height": np.full(n, 100), "width": np.full(n, 100), "modality": "MR"})
    scored["patient_sex"] = np.array(["F", "M", None], dtype=object)[(np.arange(n) // 2) % 3]
    scored["column:site"] = np.where(np.arange(n) < n - 8, "north", " south ")
    return scored, samples


def test_each_image_is_in_one_group_of_each_variable_and_unknown_is_a_group() -> None:
    scored, samples = make()
    found = subgroup_values(scored, samples, ("patient_sex", "modality", "mask_size"), ("site",))
    assert set(found) == {"patient_sex", "mask_size", "site"}  # one modality throughout: the whole, no group
    assert set(found["patient_sex"]) == {"F", "M", "unknown"}
    assert set(found["site"]) == {"north", "south"}
    known = ~np.isnan(samples.true_area)
    sizes = dict(zip(samples.true_area[known].tolist(), found["mask_size"][known].tolist(), strict=True))
    assert sizes == {
        0.0: "empty", 10.0: "under 0.5 %", 100.0: "0.5 to 2 %", 900.0: "over 2 %",
    }  # fmt: skip
    assert set(found["mask_size"][np.isnan(samples.true_area)]) == {"unknown"}


def test_rows_of_a_group_are_its_images_metrics_and_groups_add_up() -> None:
    scored, samples = make()
    values = subgroup_values(scored, samples, ("patient_sex",), ("site",))
    rows = list(measure_subgroups(samples, values, min_patients=10, resamples=100, seed=0))
    women = values["patient_sex"] == "F"
    found = {(row.subgroup, row.subgroup_value, row.class_name, row.metric): row for row in rows}
    assert len(found) == len(rows)
    accuracy = found["patient_sex", "F", "all", "accuracy"]
    assert accuracy.value == reference.accuracy_score(samples.labels[women], samples.predicted[women])
    assert (accuracy.n_images, accuracy.n_patients) == (women.sum(), 20)
    assert accuracy.ci_low < accuracy.value < accuracy.ci_high
    auroc = reference.roc_auc_score(samples.labels[women], samples.probabilities[women, 1])
    assert found["patient_sex", "F", "yes", "auroc"].value == pytest.approx(auroc)
    for variable in values:
        counts = [row.value for row in rows if (row.subgroup, row.metric) == (variable, "images")]
        assert sum(counts) == samples.n


def test_a_group_of_few_patients_is_counted_and_not_measured() -> None:
    scored, samples = make()
    values = subgroup_values(scored, samples, (), ("site",))
    rows = list(measure_subgroups(samples, values, min_patients=10, resamples=0, seed=0))
    south = [row for row in rows if row.subgroup_value == "south"]
    assert [(row.metric, row.value, row.n_images, row.n_patients) for row in south] == [("images", 8, 8, 4)]
    again = list(measure_subgroups(samples, values, min_patients=4, resamples=0, seed=0))
    assert {row.metric for row in again if row.subgroup_value == "south"} >= {"accuracy", "images"}


def test_a_group_without_truth_is_counted_and_not_measured() -> None:
    patients = np.arange(30).astype(str)
    labels = np.where(np.arange(30) < 15, np.arange(30) % 2, -1)
    halves = np.full((30, 2), 0.5)
    samples = EvaluationSamples(("x", "y"), False, patients, labels, None, halves, np.zeros(30, dtype=int))
    values = {"site": np.where(np.arange(30) < 15, "one", "two")}
    rows = list(measure_subgroups(samples, values, min_patients=5, resamples=0, seed=0))
    assert [row.metric for row in rows if row.subgroup_value == "two"] == ["images"]


def test_a_column_of_identifiers_is_no_group() -> None:
    scored, samples = make()
    scored["column:site"] = [f"accession {number}" for number in range(samples.n)]
    with pytest.raises(LabelError, match="at most 50 values in column `site`") as caught:
        subgroup_values(scored, samples, (), ("site",))
    assert "accession" not in str(caught.value)
