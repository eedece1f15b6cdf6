"""How a pass is cut into blocks."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision_ray.scoring.pipeline import cut_blocks


def _objects(count: int) -> pa.Table:
    return pa.table({"image_id": pa.array([7 * number for number in range(count)], pa.int64())})


@given(
    count=st.integers(1, 3000),
    block_rows=st.integers(1, 300),
    actors=st.integers(1, 40),
    marked=st.dictionaries(st.integers(0, 3000).map(lambda number: 7 * number), st.integers(1, 300), max_size=4),
)
def test_blocks_hold_every_object_once_and_in_order(
    count: int, block_rows: int, actors: int, marked: dict[int, int]
) -> None:
    objects = _objects(count)
    blocks = cut_blocks(objects, block_rows, actors, marked)
    assert pa.concat_tables(blocks) == objects
    assert all(0 < block.num_rows <= block_rows for block in blocks)


@pytest.mark.parametrize(("count", "actors"), [(5, 2), (40, 2), (700, 2), (5000, 7)])
def test_every_actor_has_work_and_the_last_blocks_are_small(count: int, actors: int) -> None:
    blocks = cut_blocks(_objects(count), 256, actors, {})
    assert len(blocks) >= min(actors, count)
    assert max(block.num_rows for block in blocks[-actors:]) <= 16


def test_block_that_was_begun_before_is_cut_alike_again() -> None:
    objects = _objects(1000)
    first, rows = objects["image_id"][300].as_py(), 37
    blocks = cut_blocks(objects, 256, 2, {first: rows})
    assert [block.num_rows for block in blocks if block["image_id"][0].as_py() == first] == [rows]
