"""The probability from which a pixel counts as lesion: chosen on validation, and only where that is shown to pay."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from medvision_ray.config import TrainJob
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.mask_threshold import CANDIDATES, choose, scores_by_threshold


def patients(count: int, images: int = 2) -> np.ndarray:
    return np.repeat([f"p{number}" for number in range(count)], images)


def peaked_at(best: float, count: int, gain: float, noise: float) -> np.ndarray:
    """Scores of images that are better by `gain` at `best` than at 0.5, give or take."""
    generator = np.random.default_rng(0)
    level = generator.uniform(0.5, 0.9, size=(count, 1))
    shape = gain * (1 - np.abs(CANDIDATES - best) / abs(best - 0.5)) if best != 0.5 else np.zeros(len(CANDIDATES))
    return level + shape + noise * generator.standard_normal((count, len(CANDIDATES)))


def test_scores_are_the_dice_of_each_thresholded_mask() -> None:
    generator = np.random.default_rng(0)
    masks = generator.random((6, 9, 7), dtype=np.float32)
    masks[0, 0, :3] = (0.1, 0.5, 0.9)  # on a candidate: reached
    truth = generator.random(masks.shape) < 0.3
    found = scores_by_threshold(masks, truth)
    for place, threshold in enumerate(CANDIDATES.astype(np.float32)):
        drawn = masks >= threshold
        expected = dice_per_image(
            (drawn & truth).sum((1, 2)).astype(float), drawn.sum((1, 2)).astype(float), truth.sum((1, 2)).astype(float)
        )
        np.testing.assert_allclose(found[:, place], expected)


def test_a_lesion_in_a_healthy_image_costs_as_much_as_a_missed_one() -> None:
    masks = np.full((2, 4, 4), 0.05, dtype=np.float32)
    masks[1, 0, 0] = 0.4
    healthy = np.zeros((2, 4, 4), dtype=bool)
    found = scores_by_threshold(masks, healthy)
    assert (found[0] == 1).all()
    np.testing.assert_array_equal(found[1], CANDIDATES > 0.4 + 1e-6)
    assert (scores_by_threshold(masks, ~healthy)[0] == 0).all()


def test_a_threshold_that_is_better_on_other_patients_is_taken() -> None:
    found = choose(peaked_at(0.3, 80, gain=0.05, noise=0.01), patients(40))
    assert found.value == 0.3
    assert found.facts["images"] == 80
    assert found.facts["patients"] == 40
    assert 0.03 < found.facts["gain"][1] < found.facts["gain"][0] < found.facts["gain"][2]
    assert "reason" not in found.facts


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (peaked_at(0.3, 80, gain=0.001, noise=0.05), "not shown to be better"),
        (np.full((80, len(CANDIDATES)), 0.7), "no other is better"),
    ],
)
def test_chance_and_a_tie_leave_a_half(scores: np.ndarray, reason: str) -> None:
    found = choose(scores, patients(40))
    assert found.value == 0.5
    assert reason in found.facts["reason"]


def test_few_patients_choose_nothing() -> None:
    found = choose(peaked_at(0.3, 8, gain=0.3, noise=0.0), patients(4))
    assert found.value == 0.5
    assert "fewer than 5" in found.facts["reason"]
    assert choose(np.zeros((0, len(CANDIDATES))), patients(0)).value == 0.5


@pytest.mark.parametrize("value", [0, 1, -0.1, "best", None])
def test_a_threshold_is_a_probability_or_auto(value: object) -> None:
    with pytest.raises(ValidationError, match="mask_threshold"):
        TrainJob.model_validate({"output": "o", "labels": {"table": "t.csv"}, "mask_threshold": value})
