"""measure(): the rows of the metrics table."""

from __future__ import annotations

import doctest
import importlib
import time
from dataclasses import fields

import numpy as np
import pytest
import sklearn.metrics as reference

from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.intervals import patient_weights
from medvision_ray.evaluation.measure import MetricRow, measure
from medvision_ray.evaluation.samples import EvaluationSamples

CLASSES = ("covid", "normal", "pneumonia")


def make(n: int, *, seed: int = 0, images_per_patient: int = 2) -> EvaluationSamples:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    logits = generator.normal(size=(n, 3))
    logits[np.arange(n), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = generator.integers(0, 50, n).astype(float)
    predicted = generator.integers(0, 50, n).astype(float)
    return EvaluationSamples(
        classes=CLASSES,
        multi_label=False,
        patients=(np.arange(n) // images_per_patient).astype(str),
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        predicted=probabilities.argmax(1),
        overlap=np.floor(np.minimum(true, predicted) * generator.random(n)),
        predicted_area=predicted,
        true_area=true,
    )


def by_key(rows: list[MetricRow]) -> dict[tuple[str, str], MetricRow]:
    table = {(row.class_name, row.metric): row for row in rows}
    assert len(table) == len(rows)
    return table


def test_rows_have_the_columns_of_the_metrics_table() -> None:
    names = [field.name for field in fields(MetricRow)]
    assert names == [
        "subgroup", "class_name", "metric", "value", "ci_low", "ci_high", "n_images", "n_patients", "subgroup_value",
    ]  # fmt: skip


def test_every_value_that_has_an_interval_lies_in_it() -> None:
    rows = [row for row in measure(make(200), resamples=300, seed=0) if row.ci_low is not None]
    assert {row.metric for row in rows} == {
        "accuracy", "balanced_accuracy", "brier", "log_loss", "precision", "recall", "specificity", "f1", "auroc",
        "average_precision", "dice", "iou", "cohen_kappa", "sensitivity_at_90_specificity",
        "sensitivity_at_95_specificity",
    }  # fmt: skip
    for row in rows:
        assert row.ci_low < row.value < row.ci_high, row


def test_intervals_are_those_of_scikit_learn_on_the_repeated_images_of_the_drawn_patients() -> None:
    samples = make(60, images_per_patient=3)
    rows = by_key(measure(samples, resamples=150, seed=4))
    auroc, f1 = [], []
    for weights in np.concatenate(list(patient_weights(samples.patients, resamples=150, seed=4))):
        drawn = np.repeat(np.arange(60), weights.astype(int))
        labels = samples.labels[drawn]
        auroc.append(reference.roc_auc_score(labels == 0, samples.probabilities[drawn, 0]))
        f1.append(reference.f1_score(labels, samples.predicted[drawn], average="macro"))
    for key, values in ((("covid", "auroc"), auroc), (("macro", "f1"), f1)):
        expected = tuple(np.percentile(values, [2.5, 97.5]))
        assert (rows[key].ci_low, rows[key].ci_high) == pytest.approx(expected, abs=1e-12)


def test_equal_seeds_give_equal_rows() -> None:
    samples = make(80)
    assert measure(samples, resamples=100, seed=1) == measure(samples, resamples=100, seed=1)
    assert measure(samples, resamples=100, seed=1) != measure(samples, resamples=100, seed=2)


def test_the_order_of_images_does_not_matter() -> None:
    samples = make(80)
    order = np.random.default_rng(0).permutation(80)
    names = ("patients", "labels", "probabilities", "predicted", "overlap", "predicted_area", "true_area")
    shuffled = EvaluationSamples(CLASSES, False, **{name: getattr(samples, name)[order] for name in names})
    for one, other in zip(measure(samples, resamples=50, seed=0), measure(shuffled, resamples=50, seed=0), strict=True):
        assert (one.class_name, one.metric, one.n_images) == (other.class_name, other.metric, other.n_images)
        assert (one.value, one.ci_low, one.ci_high) == pytest.approx(
            (other.value, other.ci_low, other.ci_high), abs=1e-12
        )


def test_confusion_rows_are_scikit_learns_matrix_with_the_true_class_as_class() -> None:
    samples = make(100)
    rows = by_key(measure(samples, resamples=0, seed=0))
    matrix = [[rows[true, f"confusion:{predicted}"].value for predicted in CLASSES] for true in CLASSES]
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(samples.labels, samples.predicted))
    assert rows["covid", "confusion:normal"].n_images == (samples.labels == 0).sum()


def test_multi_label_counts_are_scikit_learns_matrices_over_images_that_are_not_blank() -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (50, 2)).astype(float)
    targets[:10, 1] = np.nan
    probabilities = generator.random((50, 2))
    samples = EvaluationSamples(
        ("effusion", "nodule"),
        True,
        np.arange(50).astype(str),
        targets=targets,
        probabilities=probabilities,
        thresholds=np.array([0.5, 0.2]),
    )
    rows = by_key(measure(samples, resamples=0, seed=0))
    matrix = reference.confusion_matrix(targets[10:, 1] == 1, probabilities[10:, 1] >= 0.2)
    names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    assert [rows["nodule", name].value for name in names] == matrix.reshape(-1).tolist()
    for metric in ("auroc", "true_positives"):
        assert (rows["nodule", metric].n_images, rows["effusion", metric].n_images) == (40, 50)


def test_an_undefined_metric_is_none_and_never_nan() -> None:
    samples = EvaluationSamples(
        CLASSES,
        False,
        np.array(["a", "b", "c"]),
        np.array([1, 1, 2]),
        None,
        np.array([[0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]]),
        np.array([1, 2, 2]),
    )
    table = by_key(measure(samples, resamples=100, seed=0))
    assert table["covid", "auroc"].value is None
    assert (table["covid", "recall"].ci_low, table["covid", "recall"].ci_high) == (None, None)
    for row in table.values():
        assert not any(number is not None and np.isnan(number) for number in (row.value, row.ci_low, row.ci_high))


def test_a_class_with_one_patient_gets_a_value_but_no_interval() -> None:
    samples = make(40)
    labels = np.where(samples.labels == 0, 1, samples.labels)
    labels[:2] = 0  # both images of the first patient
    predicted = samples.predicted.copy()
    predicted[:2] = 0, 1
    rare = EvaluationSamples(CLASSES, False, samples.patients, labels, None, samples.probabilities, predicted)
    row = by_key(measure(rare, resamples=200, seed=0))["covid", "recall"]
    assert (row.value, row.ci_low, row.ci_high) == (0.5, None, None)


def test_one_patient_gives_values_without_intervals() -> None:
    samples = make(30, images_per_patient=30)
    rows = measure(samples, resamples=100, seed=0)
    assert all(row.ci_low is None and row.n_patients <= 1 for row in rows)
    assert by_key(rows)["all", "accuracy"].value is not None


def test_patients_and_images_are_counted_apart() -> None:
    row = by_key(measure(make(90, images_per_patient=3), resamples=0, seed=0))["all", "accuracy"]
    assert (row.n_images, row.n_patients) == (90, 30)


def test_rows_come_in_the_order_all_macro_classes() -> None:
    names = [row.class_name for row in measure(make(30), resamples=0, seed=0)]
    assert list(dict.fromkeys(names)) == ["all", "macro", *CLASSES]


def test_nothing_to_measure_is_an_error_that_says_where_to_look() -> None:
    samples = EvaluationSamples(("x", "y"), False, np.array(["a"]), np.array([0]))
    with pytest.raises(MedVisionError, match="none of 1 images has either"):
        measure(samples, resamples=0, seed=0)


def test_a_thousand_resamples_of_five_thousand_images_take_under_ten_seconds() -> None:
    samples = make(5000)
    start = time.process_time()
    measure(samples, resamples=1000, seed=0)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "module",
    [
        "samples",
        "intervals",
        "ranking",
        "calibration_error",
        "segmentation",
        "surfaces",
        "lesions",
        "mask_pairs",
        "paired_tests",
        "measure",
    ],
)
def test_examples_in_docstrings_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"medvision_ray.evaluation.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
