"""The figures: valid SVG for any number of classes, curves and counts as scikit-learn has them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, confusion_matrix, roc_auc_score

from medvision_ray.reporting import figures, figures_of_groups, figures_of_runs
from medvision_ray.reporting.figures import Scored
from medvision_ray.reporting.overlays import Example, draw, draw_heat, overlay

HOSTILE = ["_hidden", "$\\frac{", "<b>&", "a\x00b\n--> c", "x" * 200]


def shown_text(svg: bytes) -> str:
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))


def scores(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    return rng.integers(0, classes, n), rng.dirichlet(np.ones(classes), n)


@pytest.mark.parametrize("classes", range(2, 11))
def test_figures_name_every_class(classes: int) -> None:
    labels, probabilities = scores(80, classes)
    names = [f"finding {index}" for index in range(classes)]
    for svg in (
        figures.confusion_matrix(labels, probabilities.argmax(axis=1), names),
        figures.roc_curves(Scored(labels, probabilities, names)),
        figures.precision_recall_curves(Scored(labels, probabilities, names)),
    ):
        assert all(name in shown_text(svg) for name in names)


def test_hostile_class_names_are_plain_text() -> None:
    labels, probabilities = scores(60, len(HOSTILE))
    for svg in (
        figures.confusion_matrix(labels, probabilities.argmax(axis=1), HOSTILE),
        figures.roc_curves(Scored(labels, probabilities, HOSTILE)),
    ):
        text = shown_text(svg)
        assert all(name in text for name in ("_hidden", "$\\frac{", "<b>&", "a?b?--> c", "x" * 31 + "…"))
        assert "x" * 33 not in text


def test_absent_class_and_single_class_labels_are_undefined() -> None:
    _, probabilities = scores(20, 3)
    absent = figures.curves(Scored(np.arange(20) % 2, probabilities, ("a", "b", "c")), kind="roc")
    assert [math.isnan(curve.area) for curve in absent] == [False, False, True]
    single = np.zeros(20, dtype=int)
    for plot in (figures.roc_curves, figures.precision_recall_curves):
        assert shown_text(plot(Scored(single, probabilities, ("a", "b", "c")))).count("undefined") == 3
    assert "–" in shown_text(figures.confusion_matrix(single, probabilities.argmax(axis=1), ("a", "b", "c")))


def test_curves_enclose_the_areas_of_scikit_learn() -> None:
    labels, probabilities = scores(100, 3)
    blank = np.where(np.arange(100) % 9 == 0, -1, labels)
    for index, curve in enumerate(figures.curves(Scored(blank, probabilities, ("a", "b", "c")), kind="roc")):
        expected = roc_auc_score(blank[blank >= 0] == index, probabilities[blank >= 0, index])
        assert curve.area == pytest.approx(expected)
        assert auc(curve.x, curve.y) == pytest.approx(expected)
    for curve in figures.curves(Scored(blank, probabilities, ("a", "b", "c")), kind="precision_recall"):
        steps = -np.sum(np.diff(curve.x) * curve.y[:-1])
        assert steps == pytest.approx(curve.area)


def test_findings_leave_blanks_out() -> None:
    labels = np.array([[0, 1], [1, np.nan], [1, 1], [0, 0], [np.nan, 0]])
    probabilities = np.array([[0.1, 0.9], [0.8, 0.0], [0.3, 0.2], [0.4, 0.3], [1.0, 0.1]])
    first, second = figures.curves(Scored(labels, probabilities, ("a", "b")), kind="roc")
    assert first.area == pytest.approx(0.75)
    assert second.area == pytest.approx(0.75)


def test_confusion_counts_are_those_of_scikit_learn() -> None:
    labels, probabilities = scores(50, 4)
    predicted = probabilities.argmax(axis=1)
    labels[:5] = -1
    expected = confusion_matrix(labels[5:], predicted[5:], labels=range(4))
    np.testing.assert_array_equal(figures.count_confusion(labels, predicted, 4), expected)


def test_training_curves_leave_out_what_was_not_measured() -> None:
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], "val_accuracy": [0.1, 0.5, 0.6], "val_dice": [np.nan] * 3}
    )
    with_dice = history.assign(val_dice=[0.1, 0.2, 0.3])
    assert "Dice" not in shown_text(figures_of_runs.training_curves(history))
    assert "Dice" in shown_text(figures_of_runs.training_curves(with_dice))
    shown_text(figures_of_runs.training_curves(history.head(1)))


def test_bars_show_their_names_and_counts() -> None:
    text = shown_text(figures_of_runs.bars(["truncated", "empty_file"], [1234, 1], title="t", xlabel="objects"))
    assert "truncated" in text
    assert "1,234" in text


def test_figures_are_the_same_bytes_each_time_and_follow_the_theme() -> None:
    labels, probabilities = scores(30, 3)
    first, again = (figures.roc_curves(Scored(labels, probabilities, ("a", "b", "c"))) for _ in range(2))
    assert first == again
    assert b"prefers-color-scheme:dark" in first
    assert b"currentColor" in first


def test_overlay_marks_prediction_and_truth_where_they_are() -> None:
    predicted, true = np.zeros((64, 80), dtype=bool), np.zeros((64, 80), dtype=bool)
    predicted[10:30, 10:30] = True
    true[40:60, 50:70] = True
    grey = np.full((64, 80), 100, dtype=np.uint8)
    drawn = draw(Example(grey, predicted, true, ""), 320)
    assert drawn.shape == (256, 320, 3)
    colored = np.ptp(drawn.astype(int), axis=2) > 15
    blue = drawn[..., 0].astype(int) > drawn[..., 2].astype(int) + 15
    expected_orange = np.zeros((256, 320), dtype=bool)
    expected_orange[36:124, 36:124] = True
    assert colored[44:116, 44:116].all()
    assert not (colored & ~blue & ~expected_orange).any()
    rows, columns = np.nonzero(blue)
    assert (abs(rows.min() - 160), abs(columns.max() - 280)) < (5, 5)
    assert not blue[170:230, 210:270].any()


def test_overlay_refuses_a_mask_of_another_grid() -> None:
    with pytest.raises(ValueError, match="image's grid"):
        overlay(Example(np.zeros((8, 8), dtype=np.uint8), np.zeros((4, 4), dtype=bool), None, ""))


def test_heat_covers_where_the_evidence_is_and_nothing_else() -> None:
    grey, heat = np.full((64, 80), 100, dtype=np.uint8), np.zeros((64, 80), dtype=np.float32)
    heat[10:30, 40:60] = 1
    drawn = draw_heat(grey, heat, 160)
    assert (drawn[80:] == 100).all()
    assert (drawn[:, :70] == 100).all()
    assert (drawn[25:55, 85:115].std(axis=(0, 1)) < 1).all()
    assert np.ptp(drawn[40, 100].astype(int)) > 30


def test_an_example_with_heat_has_two_panels_and_says_so() -> None:
    grey = np.zeros((64, 64), dtype=np.uint8)
    plain, hot = (Example(grey, None, None, "true a", heat=heat) for heat in (None, grey.astype(np.float32)))
    sizes = [cv2.imdecode(np.frombuffer(overlay(each), np.uint8), cv2.IMREAD_COLOR).shape for each in (plain, hot)]
    assert sizes == [(320, 320, 3), (320, 640, 3)]
    assert "heat" in hot.described
    assert "heat" not in plain.described


def test_a_band_is_drawn_over_patients_and_holds_the_curve() -> None:
    rng = np.random.default_rng(4)
    labels, patients = np.arange(200) % 2, np.arange(200) // 4
    scores = np.clip(0.3 * labels + rng.normal(0.4, 0.2, 200), 0, 1)
    scored = Scored(labels, np.stack([1 - scores, scores], axis=1), ("a", "b"), patients=patients)
    low, high = figures.roc_bands(scored)[1]
    curve = figures.curves(scored, kind="roc")[1]
    drawn = np.interp(np.linspace(0, 1, 101), curve.x, curve.y)
    assert ((low <= drawn + 0.05) & (drawn <= high + 0.05)).all()
    assert 0.05 < (high - low)[5:50].mean() < 0.5
    assert figures.roc_bands(Scored(labels, scored.probabilities, ("a", "b"))) == {}
    five, four = (Scored(labels, scored.probabilities, ("a", "b"), patients=np.arange(200) % n) for n in (10, 8))
    assert (figures.roc_bands(five)[1][0] <= figures.roc_bands(five)[1][1]).all()
    assert figures.roc_bands(four) == {}  # four patients have each class


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.99])
def test_a_point_to_decide_at_lies_where_scikit_learn_has_it(threshold: float) -> None:
    rng = np.random.default_rng(5)
    truth, scores = rng.integers(0, 2, 60), rng.random(60).astype(np.float32)
    present = scores >= np.float32(threshold)
    (tn, fp), (fn, tp) = confusion_matrix(truth, present, labels=(0, 1))
    rate, sensitivity, precision = figures.at_threshold(truth, scores, threshold)
    assert (rate, sensitivity) == (fp / (fp + tn), tp / (tp + fn))
    assert precision == (tp / (tp + fp) if tp + fp else pytest.approx(math.nan, nan_ok=True))


def test_points_to_decide_at_are_named_on_both_curves() -> None:
    labels, probabilities = scores(60, 2)
    scored = Scored(labels, probabilities, ("a", "b"), points={"specificity 95": np.array([0.4, np.nan])})
    for svg in (figures.roc_curves(scored), figures.precision_recall_curves(scored)):
        assert "at specificity 95" in shown_text(svg)


def test_reliability_points_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(6)
    confidence = rng.random(400)
    right = rng.random(400) < confidence
    middle, share, low, high = figures.reliability_points(confidence, right)
    expected_share, expected_middle = calibration_curve(right, confidence, n_bins=15)
    np.testing.assert_allclose(share, expected_share)
    np.testing.assert_allclose(middle, expected_middle)
    assert ((low <= share) & (share <= high)).all()
    limits = binomtest(int(right[confidence < 1 / 15].sum()), int((confidence < 1 / 15).sum()))
    interval = limits.proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_reliability_shows_calibrated_probabilities_where_there_are_any() -> None:
    labels, probabilities = scores(80, 3)
    raw = Scored(labels, probabilities, ("a", "b", "c"))
    both = Scored(labels, probabilities, ("a", "b", "c"), calibrated=probabilities)
    none = Scored(labels, probabilities, ("a", "b", "c"), calibrated=np.full((80, 3), np.nan))
    assert ["calibrated" in shown_text(figures.reliability(each)) for each in (raw, both, none)] == [False, True, False]


def test_confidence_of_findings_is_over_all_that_are_known() -> None:
    labels = np.array([[1, 0], [np.nan, 1]])
    confidence, right = figures.confidences(
        Scored(labels, np.array([[0.9, 0.2], [0.5, 0.6]]), ("a", "b")), np.array([[0.9, 0.2], [0.5, 0.6]])
    )
    assert confidence.tolist() == [0.9, 0.2, 0.6]
    assert right.tolist() == [True, False, True]


def test_dice_is_grouped_by_the_size_of_the_true_mask() -> None:
    dice = np.array([0.1, 0.2, 0.3, 0.4, np.nan, 0.0])
    share = np.array([0.005, 0.006, 0.02, 0.5, 0.1, 0.0])
    groups = figures_of_groups.size_groups(dice, share)
    assert [(name, values.tolist()) for name, values in groups] == [
        ("under 0.5 %", [0.1]),
        ("0.5 to 2 %", [0.2, 0.3]),
        ("over 2 %", [0.4]),
    ]
    assert "2 images" in shown_text(figures_of_groups.dice_by_size(dice, share))
    assert "any size" in shown_text(figures_of_groups.dice_by_size(dice, None))


def test_intervals_name_every_line_and_say_what_is_undefined() -> None:
    lines = [
        figures_of_groups.Estimate("all images", 0.9, 0.8, 0.95, "50 / 10", True),
        figures_of_groups.Estimate(HOSTILE[2], None, None, None, "3 / 1"),
    ]
    text = shown_text(figures_of_groups.intervals(lines, title="t", xlabel="x", reference=0.9))
    assert "all images" in text
    assert "3 / 1 undefined" in text
