"""Batches: the same rows from the object store's views and from tensors that were copied once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from medvision_ray.learning.feed import Examples, Truth, _Resident, balancing_weights, epoch_batches, steps_per_epoch
from medvision_ray.learning.ingest import SCHEMA

SIZE = (4, 6)


def examples(multi_label: bool) -> Examples:
    random = np.random.default_rng(0)
    rows = []
    for index in (3, 0, 5, 2):  # as the object store gives them; rows 1 and 4 failed
        pixels, mask = random.integers(0, 256, (1, *SIZE), np.uint8), random.integers(0, 2, SIZE, np.uint8)
        row = {"index": index, "pixels": pixels.tobytes(), "mask": mask.tobytes() if index != 5 else None}
        rows.append({**row, "digest": "", "error_code": ""})
    targets = random.random((6, 2)).astype(np.float32) if multi_label else None
    truth = Truth(np.array([0, 1, 2, -1, 0, 1]), targets)
    return Examples([pa.Table.from_pylist(rows, schema=SCHEMA)], truth, 1, SIZE)


def test_images_kept_on_a_device_give_the_same_batches() -> None:
    for multi_label in (False, True):
        plain = examples(multi_label)
        rows = np.array([0, 2, 3, 5])
        kept = _Resident({int(row): place for place, row in enumerate(rows)}, plain.batch(rows))
        for wanted in (np.array([5, 0, 5]), np.array([3])):
            for name in ("images", "labels", "targets", "masks", "has_mask"):
                expected, got = getattr(plain.batch(wanted), name), getattr(kept.batch(wanted), name)
                assert (expected is None) == (got is None)
                if expected is not None:
                    assert torch.equal(expected, got)
                    assert expected.dtype == got.dtype


def test_nothing_is_kept_on_a_cpu() -> None:
    plain = examples(multi_label=False)
    assert plain.keep_on(torch.device("cpu")) is False
    assert plain.batch(np.array([5])).has_mask.tolist() == [False]


def drawn(truth: Truth, rows: np.ndarray, epoch: int = 1, world: int = 2, seed: int = 0) -> list[list[np.ndarray]]:
    options = {"seed": seed, "epoch": epoch, "world": world, "batch_size": 8}
    weights = balancing_weights(truth, rows)
    return [epoch_batches(rows, rank=rank, weights=weights, **options) for rank in range(world)]


def seen(shares: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.concatenate(share) for share in shares])


def test_a_balanced_epoch_sees_every_class_as_often_and_unlabelled_images_in_their_share() -> None:
    labels = np.array([0] * 70 + [1] * 20 + [2] * 6 + [-1] * 24)
    truth, rows = Truth(labels, None), np.arange(120)
    for epoch in range(1, 4):
        found = seen(drawn(truth, rows, epoch))
        assert len(found) == 120
        counts = np.bincount(labels[found] + 1, minlength=4)
        assert np.abs(counts - [24, 32, 32, 32]).max() <= 1


def test_a_balanced_epoch_has_equal_steps_on_all_ranks_and_as_many_as_a_plain_one() -> None:
    truth, rows = Truth(np.array([0] * 90 + [1] * 11), None), np.arange(101)
    for world in (1, 2, 3):
        shares = drawn(truth, rows, world=world)
        sizes = [[len(batch) for batch in share] for share in shares]
        assert all(size == sizes[0] for size in sizes)
        assert len(sizes[0]) == steps_per_epoch(101, world, 8)


def test_a_balanced_draw_is_the_same_again_and_another_in_another_epoch_or_seed() -> None:
    truth, rows = Truth(np.array([0] * 90 + [1] * 10), None), np.arange(100)
    first = seen(drawn(truth, rows)).tolist()
    assert seen(drawn(truth, rows)).tolist() == first
    assert seen(drawn(truth, rows, epoch=2)).tolist() != first
    assert seen(drawn(truth, rows, seed=1)).tolist() != first
    everywhere = {row for epoch in range(1, 12) for row in seen(drawn(truth, rows, epoch)).tolist()}
    assert everywhere == set(range(100))  # common images are left out of an epoch, not of the training


def test_how_often_a_row_comes_is_its_weight_up_to_one() -> None:
    truth, rows = Truth(np.array([0] * 37 + [1] * 13 + [2] * 2), None), np.arange(52)
    expected = balancing_weights(truth, rows)
    assert expected.mean() == 1
    counts = np.bincount(seen(drawn(truth, rows, world=1)), minlength=52)
    assert np.abs(counts - expected).max() < 1


def test_findings_are_balanced_by_the_rarest_one_of_an_image() -> None:
    blank = np.nan
    targets = np.array(
        [[1, 0]] * 10 + [[0, 0]] * 20 + [[1, 1]] * 2 + [[0, blank]] * 10 + [[blank, blank]] * 5, dtype=np.float32
    )
    truth = Truth(np.full(47, -1), targets)
    weights = balancing_weights(truth, np.arange(47))
    shares = [weights[part].sum() for part in (slice(0, 10), slice(30, 32), slice(42, 47))]
    none_there = weights[10:30].sum() + weights[32:42].sum()
    assert shares[2] == 5  # nothing is known of them
    assert weights[30] == weights[31] > weights[10:30].max()
    np.testing.assert_allclose(shares[1], none_there)  # each of the groups has weight 1 before scaling
    np.testing.assert_allclose(shares[0], none_there * 10 / 12)  # two of the twelve with the finding are rarer still
    np.testing.assert_allclose(weights.sum(), 47)


def test_without_weights_the_order_is_as_it_was() -> None:
    rows = np.arange(10)
    one = epoch_batches(rows, seed=3, epoch=2, rank=0, world=1, batch_size=4)
    expected = np.random.default_rng([3, 2]).permutation(rows)
    np.testing.assert_array_equal(np.concatenate(one), expected)


def test_rows_without_any_label_are_drawn_once_each() -> None:
    rows = np.arange(9)
    found = seen(drawn(Truth(np.full(9, -1), None), rows, world=1))
    assert sorted(found.tolist()) == rows.tolist()
