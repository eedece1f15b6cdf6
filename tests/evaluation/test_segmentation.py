"""Dice, IoU and mask counts against hand-computed values and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest

from medvision_ray.evaluation.measure import measure
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.segmentation import (
    MaskView,
    dice_per_image,
    iou_per_image,
    mask_view,
    plain_overlaps,
    weighted_overlaps,
)

# image: 0 found, 1 missed (nothing drawn), 2 missed (drawn elsewhere), 3 truly empty and left so,
# 4 truly empty and drawn, 5 no true mask known, 6 found, no label
SAMPLES = EvaluationSamples(
    classes=("glioma", "meningioma", "normal"),
    multi_label=False,
    patients=np.array(["a", "a", "b", "c", "d", "e", "f"]),
    labels=np.array([0, 0, 1, 2, 2, 0, -1]),
    overlap=np.array([30.0, 0, 0, 0, 0, np.nan, 10]),
    predicted_area=np.array([40.0, 0, 25, 0, 7, 50, 10]),
    true_area=np.array([60.0, 20, 25, 0, 0, np.nan, 10]),
)


def view_of(samples: EvaluationSamples) -> MaskView:
    view = mask_view(samples)
    assert view is not None
    return view


def test_means_are_over_non_empty_true_masks_and_a_missed_mask_counts_zero() -> None:
    ours = plain_overlaps(view_of(SAMPLES))
    assert ours["all", "dice"] == pytest.approx((0.6 + 0 + 0 + 1) / 4)
    assert ours["all", "iou"] == pytest.approx((30 / 70 + 0 + 0 + 1) / 4)
    assert ours["glioma", "dice"] == pytest.approx(0.3)
    assert ours["meningioma", "iou"] == 0
    assert np.isnan(ours["normal", "dice"])


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [("all", (4, 2, 2, 1)), ("glioma", (2, 1, 0, 0)), ("meningioma", (1, 1, 0, 0)), ("normal", (0, 0, 2, 1))],
)
def test_missed_and_spurious_masks_are_counted(class_name: str, expected: tuple[int, int, int, int]) -> None:
    rows = {row.metric: row.value for row in measure(SAMPLES, resamples=0, seed=0) if row.class_name == class_name}
    counts = (rows["mask_images"], rows["missed_masks"], rows["empty_mask_images"], rows["spurious_masks"])
    assert counts == expected


def test_rows_name_the_images_and_patients_that_the_mean_is_over() -> None:
    rows = {(row.class_name, row.metric): row for row in measure(SAMPLES, resamples=0, seed=0)}
    assert (rows["all", "dice"].n_images, rows["all", "dice"].n_patients) == (4, 3)
    assert (rows["glioma", "dice"].n_images, rows["glioma", "dice"].n_patients) == (2, 1)
    assert (rows["normal", "dice"].n_images, rows["normal", "dice"].value) == (0, None)
    assert (rows["all", "spurious_masks"].n_images, rows["all", "spurious_masks"].n_patients) == (2, 2)


def test_per_image_values_agree_with_torchmetrics_on_masks() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.segmentation")
    generator = np.random.default_rng(0)
    true = generator.random((12, 1, 16, 16)) < generator.random((12, 1, 1, 1))
    predicted = generator.random((12, 1, 16, 16)) < 0.5
    areas = tuple(mask.sum(axis=(1, 2, 3)).astype(float) for mask in (true & predicted, predicted, true))
    options = {"num_classes": 1, "include_background": True, "input_format": "one-hot"}
    theirs = functional.dice_score(torch.tensor(predicted).int(), torch.tensor(true).int(), average="macro", **options)
    np.testing.assert_allclose(dice_per_image(*areas), theirs.reshape(-1), atol=1e-6)
    theirs = functional.mean_iou(torch.tensor(predicted).int(), torch.tensor(true).int(), **options)
    np.testing.assert_allclose(iou_per_image(*areas), theirs.reshape(-1), atol=1e-6)


def test_weighted_means_at_unit_weights_are_the_plain_means() -> None:
    view = view_of(SAMPLES)
    weighted = weighted_overlaps(view)(np.ones((1, view.patients.size)))
    assert {key: value[0] for key, value in weighted.items()} == pytest.approx(plain_overlaps(view), nan_ok=True)


def test_a_finding_groups_every_image_that_has_it() -> None:
    samples = EvaluationSamples(
        classes=("effusion", "nodule"),
        multi_label=True,
        patients=np.array(["a", "b", "c"]),
        targets=np.array([[1, 1], [0, 1], [np.nan, 0]]),
        overlap=np.array([1.0, 0, 2]),
        predicted_area=np.array([1.0, 0, 4]),
        true_area=np.array([1.0, 3, 4]),
    )
    ours = plain_overlaps(view_of(samples))
    assert (ours["effusion", "dice"], ours["nodule", "dice"], ours["all", "dice"]) == (1, 0.5, 0.5)


def test_images_without_a_true_mask_do_not_touch_the_interval() -> None:
    generator = np.random.default_rng(0)
    area = np.full(30, 10.0)
    overlap = generator.integers(0, 11, 30).astype(float)

    def rows(extra: int) -> dict[str, tuple[float | None, float | None]]:
        samples = EvaluationSamples(
            classes=("tumour",),
            multi_label=False,
            patients=np.arange(30 + extra).astype(str),
            labels=np.zeros(30 + extra, dtype=int),
            overlap=np.concatenate([overlap, np.zeros(extra)]),
            predicted_area=np.concatenate([area, np.zeros(extra)]),
            true_area=np.concatenate([area, np.zeros(extra)]),
        )
        found = measure(samples, resamples=200, seed=0)
        return {row.metric: (row.ci_low, row.ci_high) for row in found if row.class_name == "all"}

    assert rows(0)["dice"] == rows(50)["dice"]


def test_without_any_true_mask_there_is_nothing_to_segment() -> None:
    unknown = np.full(2, np.nan)
    samples = EvaluationSamples(
        ("x",),
        False,
        np.array(["a", "b"]),
        np.array([0, 0]),
        overlap=unknown,
        predicted_area=unknown,
        true_area=unknown,
    )
    assert mask_view(samples) is None
