"""Batches: the same rows from the object store's views and from tensors that were copied once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from medvision_ray.learning.feed import Examples, Truth, _Resident
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
