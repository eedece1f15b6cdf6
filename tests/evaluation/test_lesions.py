"""Matching of lesions against a flood fill and set arithmetic."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from medvision_ray.evaluation.lesions import LesionCounts, match_lesions

Pixels = frozenset[tuple[int, int]]


def components(mask: np.ndarray) -> list[Pixels]:
    """Connected components (8-neighbourhood) by flood fill."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    found = []
    while left:
        todo, part = [left.pop()], set()
        while todo:
            row, column = todo.pop()
            part.add((row, column))
            around = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            todo.extend(around)
        found.append(frozenset(part))
    return found


def by_definition(truth: np.ndarray, predicted: np.ndarray, min_iou: float) -> LesionCounts:
    true, drawn = components(truth), components(predicted)

    def match(one: Pixels, other: Pixels) -> bool:
        return bool(one & other) and len(one & other) / len(one | other) >= min_iou

    detected = sum(any(match(one, other) for other in drawn) for one in true)
    spurious = sum(not any(match(one, other) for one in true) for other in drawn)
    return LesionCounts(len(true), detected, spurious)


@pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.25, 0.5])
def test_flood_fill_and_sets_give_the_same(min_iou: float) -> None:
    generator = np.random.default_rng(0)
    several = 0
    for _ in range(40):
        truth = generator.random((14, 17)) < generator.uniform(0, 0.3)
        predicted = np.where(generator.random(truth.shape) < 0.8, truth, generator.random(truth.shape) < 0.2)
        ours = match_lesions(truth, predicted, min_iou)
        assert ours == by_definition(truth, predicted, min_iou)
        several += ours.true > 1 and ours.detected > 0 and ours.false_positives > 0
    assert several > 10


def test_pixels_that_meet_at_a_corner_are_one_lesion() -> None:
    assert match_lesions(np.eye(4, dtype=bool), np.zeros((4, 4), dtype=bool)) == LesionCounts(1, 0, 0)


def test_one_drawn_region_can_detect_two_lesions() -> None:
    truth = np.zeros((5, 5), dtype=bool)
    truth[:, [0, 4]] = True
    assert match_lesions(truth, np.ones((5, 5), dtype=bool)) == LesionCounts(2, 2, 0)


def test_empty_masks_have_no_lesion() -> None:
    empty = np.zeros((3, 3), dtype=bool)
    assert match_lesions(empty, empty) == LesionCounts(0, 0, 0)
    assert match_lesions(empty, ~empty) == LesionCounts(0, 0, 1)


def test_memory_grows_with_the_lesions_and_not_with_their_pairs() -> None:
    speckle = np.zeros((400, 400), dtype=bool)
    speckle[::2, ::2] = True  # 40,000 lesions: all pairs would be 12.8 GB
    tracemalloc.start()
    assert match_lesions(speckle, speckle, 0.5) == LesionCounts(40_000, 40_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
