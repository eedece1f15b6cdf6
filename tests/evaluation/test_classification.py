"""Classification metrics against scikit-learn and torchmetrics, plain and weighted."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision_ray.calibration import PlattScaling, TemperatureScaling
from medvision_ray.evaluation.calibration_error import expected_calibration_error
from medvision_ray.evaluation.classification import (
    OneVsRest,
    calibration_errors,
    one_vs_rest,
    plain_metrics,
    weighted_metrics,
)
from medvision_ray.evaluation.ranking import weighted_ranking, weighted_ranks
from medvision_ray.evaluation.samples import EvaluationSamples

CLASSES = ("covid", "normal", "pneumonia")


def single(n: int = 300, *, seed: int = 0, steps: int = 20, absent: int | None = None) -> EvaluationSamples:
    """Single-label samples; `steps` coarse probabilities make ties, `absent` is a class without true images."""
    generator = np.random.default_rng(seed)
    labels = generator.choice([k for k in range(3) if k != absent], n)
    logits = generator.normal(size=(n, 3))
    logits[np.arange(n), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    coarse = np.floor(probabilities * steps) / steps
    coarse[:, 2] = 1 - coarse[:, 0] - coarse[:, 1]
    return EvaluationSamples(
        classes=CLASSES,
        multi_label=False,
        patients=generator.integers(0, n // 2, n).astype(str),
        labels=labels,
        probabilities=coarse.clip(0, 1),
        predicted=coarse.argmax(1),
    )


def multi(n: int = 300, *, seed: int = 0, steps: int = 20) -> EvaluationSamples:
    """Multi-label samples with ties and a fifth of the labels blank."""
    generator = np.random.default_rng(seed)
    chance = generator.random((n, 3))
    targets = (generator.random((n, 3)) < chance).astype(float)
    targets[generator.random((n, 3)) < 0.2] = np.nan
    return EvaluationSamples(
        classes=CLASSES,
        multi_label=True,
        patients=generator.integers(0, n // 2, n).astype(str),
        targets=targets,
        probabilities=np.round(chance * steps) / steps,
        thresholds=np.array([0.3, 0.5, 0.75]),
    )


def view_of(samples: EvaluationSamples) -> OneVsRest:
    view = one_vs_rest(samples)
    assert view is not None
    return view


def reference_of_one_class(positive, decided, scores, weights=None) -> dict[str, float]:
    """scikit-learn's values of a yes-or-no question; NaN where it divides by zero."""
    options = {"zero_division": np.nan, "sample_weight": weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "precision": reference.precision_score(positive, decided, **options),
            "recall": reference.recall_score(positive, decided, **options),
            "specificity": reference.recall_score(~positive, ~decided, **options),
            "f1": reference.f1_score(positive, decided, **options),
            "auroc": reference.roc_auc_score(positive, scores, sample_weight=weights),
            "average_precision": reference.average_precision_score(positive, scores, sample_weight=weights),
            **{f"sensitivity_at_{int(100 * s)}_specificity": sensitivity_at(positive, scores, s) for s in (0.90, 0.95)},
        }


def sensitivity_at(positive, scores, specificity: float) -> float:
    """The definition: the best sensitivity of any threshold, counted one by one."""
    best = 0.0
    for threshold in [*np.unique(scores), np.inf]:
        decided = scores >= threshold
        if (~decided[~positive]).mean() >= specificity - 1e-12:
            best = max(best, decided[positive].mean())
    return best


@pytest.mark.parametrize("seed", [0, 1])
def test_single_label_metrics_agree_with_scikit_learn(seed: int) -> None:
    samples = single(seed=seed)
    ours = plain_metrics(view_of(samples))
    labels, predicted, scores = samples.labels, samples.predicted, samples.probabilities
    per_class = [reference_of_one_class(labels == k, predicted == k, scores[:, k]) for k in range(3)]
    expected = {
        (name, metric): value for name, row in zip(CLASSES, per_class, strict=True) for metric, value in row.items()
    }
    expected |= {("macro", metric): np.mean([row[metric] for row in per_class]) for metric in per_class[0]}
    expected["all", "accuracy"] = reference.accuracy_score(labels, predicted)
    expected["all", "balanced_accuracy"] = reference.balanced_accuracy_score(labels, predicted)
    expected["all", "cohen_kappa"] = reference.cohen_kappa_score(labels, predicted)
    expected["all", "brier"] = reference.brier_score_loss(labels, scores, scale_by_half=False)
    clipped = scores.clip(np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
    expected["all", "log_loss"] = -np.log(clipped[np.arange(samples.n), labels]).mean()
    assert ours == pytest.approx(expected, abs=1e-12)


def test_macro_values_agree_with_scikit_learns_own_averages() -> None:
    samples = single(seed=3)
    ours = plain_metrics(view_of(samples))
    labels, predicted, scores = samples.labels, samples.predicted, samples.probabilities
    for metric, function in (
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
        ("f1", reference.f1_score),
    ):
        assert ours["macro", metric] == pytest.approx(function(labels, predicted, average="macro"), abs=1e-12)
    assert ours["macro", "auroc"] == pytest.approx(
        reference.roc_auc_score(labels, scores, multi_class="ovr"), abs=1e-12
    )


def test_log_loss_agrees_with_scikit_learn_where_no_probability_is_clipped() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([2.0, 2.0, 2.0], 200)
    labels = generator.integers(0, 3, 200)
    samples = EvaluationSamples(
        CLASSES, False, np.arange(200).astype(str), labels, None, probabilities, probabilities.argmax(1)
    )
    ours = plain_metrics(view_of(samples))
    assert ours["all", "log_loss"] == pytest.approx(
        reference.log_loss(labels, probabilities, labels=[0, 1, 2]), abs=1e-12
    )


def test_multi_label_metrics_agree_with_scikit_learn_over_the_images_that_are_not_blank() -> None:
    samples = multi()
    ours = plain_metrics(view_of(samples))
    for k, name in enumerate(CLASSES):
        known = ~np.isnan(samples.targets[:, k])
        positive, scores = samples.targets[known, k] == 1, samples.probabilities[known, k]
        decided = scores >= samples.thresholds[k]
        expected = reference_of_one_class(positive, decided, scores)
        expected["accuracy"] = reference.accuracy_score(positive, decided)
        expected["balanced_accuracy"] = reference.balanced_accuracy_score(positive, decided)
        expected["cohen_kappa"] = reference.cohen_kappa_score(positive, decided)
        expected["brier"] = reference.brier_score_loss(positive, scores)
        clipped = scores.clip(np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
        expected["log_loss"] = reference.log_loss(positive, clipped)
        assert {metric: ours[name, metric] for metric in expected} == pytest.approx(expected, abs=1e-12)
    for metric in expected:
        assert ours["macro", metric] == pytest.approx(np.mean([ours[name, metric] for name in CLASSES]), abs=1e-12)
    assert not [key for key in ours if key[0] == "all"]


def test_metrics_agree_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    samples = single(seed=5)
    ours = plain_metrics(view_of(samples))
    scores, labels = torch.tensor(samples.probabilities), torch.tensor(samples.labels)
    predicted = torch.tensor(samples.predicted)
    for metric, theirs in (
        ("auroc", functional.multiclass_auroc(scores, labels, 3, average=None)),
        ("average_precision", functional.multiclass_average_precision(scores, labels, 3, average=None)),
        ("specificity", functional.multiclass_specificity(predicted, labels, 3, average=None)),
        ("f1", functional.multiclass_f1_score(predicted, labels, 3, average=None)),
        (
            "sensitivity_at_90_specificity",
            functional.multiclass_sensitivity_at_specificity(scores, labels, 3, min_specificity=0.90)[0],
        ),
    ):
        assert [ours[name, metric] for name in CLASSES] == pytest.approx(theirs.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "samples", [single(), multi(), single(absent=0), single(n=7)], ids=["single", "multi", "absent", "few"]
)
def test_weighted_metrics_at_unit_weights_are_the_plain_metrics(samples: EvaluationSamples) -> None:
    view = view_of(samples)
    weighted = weighted_metrics(view)(np.ones((1, view.patients.size)))
    assert {key: value[0] for key, value in weighted.items()} == pytest.approx(
        plain_metrics(view), abs=1e-12, nan_ok=True
    )


@pytest.mark.parametrize("samples", [single(60), multi(60)], ids=["single", "multi"])
def test_weights_count_as_repeated_images(samples: EvaluationSamples) -> None:
    view = view_of(samples)
    weights = np.random.default_rng(1).integers(0, 4, (5, view.patients.size))
    weighted = weighted_metrics(view)(weights.astype(float))
    for row, counts in enumerate(weights):
        repeated = np.repeat(np.arange(view.patients.size), counts)
        again = OneVsRest(
            view.classes,
            view.exclusive,
            view.patients[repeated],
            view.known[repeated],
            view.positive[repeated],
            view.decided[repeated],
            view.scores[repeated],
        )
        expected = plain_metrics(again)
        assert {key: value[row] for key, value in weighted.items()} == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25))
@settings(max_examples=200)
def test_weighted_ranks_agree_with_scikit_learn_under_ties_and_zero_weights(
    images: list[tuple[int, bool, int]],
) -> None:
    scores = np.array([score / 4 for score, _, _ in images])
    positive = np.array([truth for _, truth, _ in images])
    weights = np.array([float(weight) for _, _, weight in images])
    auroc, precision = (values[0] for values in weighted_ranks(scores, positive)(weights[None]))
    positives, negatives = weights[positive].sum(), weights[~positive].sum()
    if positives and negatives:
        assert auroc == pytest.approx(reference.roc_auc_score(positive, scores, sample_weight=weights), abs=1e-12)
    else:
        assert np.isnan(auroc)
    if positives:
        expected = reference.average_precision_score(positive, scores, sample_weight=weights)
        assert precision == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(precision)


def test_a_class_without_true_images_has_no_recall_and_is_left_out_of_macro() -> None:
    samples = single(absent=0)
    ours = plain_metrics(view_of(samples))
    for metric in ("recall", "auroc", "average_precision"):
        assert np.isnan(ours["covid", metric])
        assert ours["macro", metric] == pytest.approx((ours["normal", metric] + ours["pneumonia", metric]) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.balanced_accuracy_score(samples.labels, samples.predicted)
    assert ours["all", "balanced_accuracy"] == pytest.approx(expected)


def test_never_deciding_for_a_class_leaves_macro_precision_undefined_instead_of_better() -> None:
    probabilities = np.array([[0.0, 0.9, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]])
    samples = EvaluationSamples(
        CLASSES, False, np.array(["a", "b", "c"]), np.array([0, 1, 2]), None, probabilities, probabilities.argmax(1)
    )
    ours = plain_metrics(view_of(samples))
    assert np.isnan(ours["covid", "precision"])
    assert np.isnan(ours["macro", "precision"])
    assert (ours["covid", "recall"], ours["covid", "f1"]) == (0, 0)


def test_only_labelled_images_are_measured() -> None:
    samples = single(n=40)
    labels = samples.labels.copy()
    labels[20:] = -1
    partly = EvaluationSamples(CLASSES, False, samples.patients, labels, None, samples.probabilities, samples.predicted)
    first = EvaluationSamples(
        CLASSES,
        False,
        samples.patients[:20],
        samples.labels[:20],
        None,
        samples.probabilities[:20],
        samples.predicted[:20],
    )
    assert plain_metrics(view_of(partly)) == plain_metrics(view_of(first))


def test_a_probability_at_its_threshold_is_decided_present_in_float32_too() -> None:
    samples = EvaluationSamples(
        ("nodule",),
        True,
        np.array(["a", "b"]),
        targets=np.array([[1.0], [0.0]]),
        probabilities=np.array([[0.7], [0.6]], dtype=np.float32),
        thresholds=np.array([0.7]),
    )
    assert view_of(samples).decided.tolist() == [[True], [False]]


def test_without_a_label_or_a_head_there_is_nothing_to_classify() -> None:
    nobody = np.array(["a", "b"])
    assert one_vs_rest(EvaluationSamples(("x", "y"), False, nobody, np.array([0, 1]))) is None
    halves = np.full((2, 2), 0.5)
    unlabelled = EvaluationSamples(("x", "y"), False, nobody, np.array([-1, -1]), None, halves, np.array([0, 0]))
    assert one_vs_rest(unlabelled) is None


def test_calibration_error_agrees_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = np.random.default_rng(4)
    scores = generator.dirichlet([1.0, 1.0, 1.0], 400)
    labels = generator.integers(0, 3, 400)
    samples = EvaluationSamples(CLASSES, False, np.arange(400).astype(str), labels, None, scores, scores.argmax(1))
    theirs = functional.multiclass_calibration_error(torch.tensor(scores), torch.tensor(labels), 3, n_bins=15)
    assert calibration_errors(view_of(samples)) == {("all", "ece"): pytest.approx(float(theirs), abs=1e-6)}

    targets = (generator.random((400, 3)) < 0.4).astype(float)
    targets[:50, 1] = np.nan
    findings = EvaluationSamples(
        CLASSES, True, samples.patients, targets=targets, probabilities=scores, thresholds=np.full(3, 0.5)
    )
    ours = calibration_errors(view_of(findings))
    for k, name in enumerate(CLASSES):
        known = ~np.isnan(targets[:, k])
        theirs = functional.binary_calibration_error(
            torch.tensor(scores[known, k]), torch.tensor(targets[known, k]).long(), n_bins=15
        )
        assert ours[name, "ece"] == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("samples", [single(), multi()], ids=["single", "multi"])
def test_calibrated_metrics_are_those_of_a_model_with_these_probabilities(samples: EvaluationSamples) -> None:
    scaling = PlattScaling(((2.0, 0.5),) * 3) if samples.multi_label else TemperatureScaling(0.6)
    calibrated = scaling.apply(samples.probabilities)
    view = view_of(replace(samples, calibrated=calibrated))
    other = replace(view, scores=view.calibrated, calibrated=None)  # the same decisions
    expected = plain_metrics(other) | calibration_errors(other)
    ours = plain_metrics(view) | calibration_errors(view)
    rules = [key for key in ours if key[1].endswith("_calibrated")]
    assert len(rules) == (12 if samples.multi_label else 3)
    for class_name, metric in rules:
        assert ours[class_name, metric] == pytest.approx(expected[class_name, metric.removesuffix("_calibrated")])
    weighted = weighted_metrics(view)(np.ones((1, view.patients.size)))
    for key in set(rules) & set(weighted):
        assert weighted[key][0] == pytest.approx(ours[key], abs=1e-12)


def test_a_finding_without_calibration_has_no_calibrated_metric_and_no_macro() -> None:
    samples = multi()
    calibrated = PlattScaling((None, (1.0, 0.0), (1.0, 0.0))).apply(samples.probabilities)
    view = view_of(replace(samples, calibrated=calibrated))
    ours = plain_metrics(view) | calibration_errors(view)
    first, second = view.classes[:2]
    for metric in ("brier", "ece", "log_loss"):
        assert math.isnan(ours[first, f"{metric}_calibrated"])
        assert math.isnan(ours["macro", f"{metric}_calibrated"])
        assert ours[second, f"{metric}_calibrated"] == pytest.approx(ours[second, metric], rel=1e-5)


def test_a_certain_model_falls_into_the_last_bin() -> None:
    assert expected_calibration_error(np.array([1.0, 1.0, 0.0]), np.array([True, False, False])) == pytest.approx(1 / 3)
    assert np.isnan(expected_calibration_error(np.array([]), np.array([], dtype=bool)))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 12)), min_size=1, max_size=20))
@settings(max_examples=150)
def test_sensitivity_at_a_specificity_under_ties_and_weights_is_that_of_the_repeated_images(
    images: list[tuple[int, bool, int]],
) -> None:
    scores = np.array([score / 4 for score, _, _ in images])
    positive = np.array([truth for _, truth, _ in images])
    weights = np.array([weight for _, _, weight in images])
    ours = weighted_ranking(scores, positive)(weights[None].astype(float))
    again, truth = np.repeat(scores, weights), np.repeat(positive, weights)
    for specificity in (0.90, 0.95):
        found = ours[f"sensitivity_at_{int(100 * specificity)}_specificity"][0]
        if truth.any() and not truth.all():
            assert found == pytest.approx(sensitivity_at(truth, again, specificity), abs=1e-12)
        else:
            assert np.isnan(found)


def test_a_finding_that_is_blank_everywhere_has_no_value() -> None:
    targets = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, np.nan]])
    samples = EvaluationSamples(
        ("x", "y"),
        True,
        np.array(["a", "b", "c"]),
        targets=targets,
        probabilities=np.full((3, 2), 0.5),
        thresholds=np.full(2, 0.5),
    )
    view = view_of(samples)
    plain, weighted = plain_metrics(view), weighted_metrics(view)(np.ones((1, 3)))
    for metric in ("auroc", "sensitivity_at_90_specificity", "cohen_kappa"):
        assert np.isnan(plain["y", metric])
        assert np.isnan(weighted["y", metric][0])
    assert np.isnan(calibration_errors(view)["y", "ece"])
