"""Masks survive the way into a row and back, and damaged ones are refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medvision_ray.scoring.masks import EMPTY, decode_mask, encode_mask


@given(hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_round_trip(mask: np.ndarray) -> None:
    encoded = encode_mask(mask)
    assert np.array_equal(decode_mask(encoded.data, encoded.box, mask.shape), mask)
    assert encoded.pixels == mask.sum()
    assert encoded.fraction == pytest.approx(mask.mean())


def test_box_is_tight_and_exclusive() -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 7:11] = True
    assert encode_mask(mask).box == (2, 7, 5, 11)


def test_empty_mask_has_no_box() -> None:
    assert encode_mask(np.zeros((4, 4), bool)) == EMPTY


def test_box_outside_the_image_is_refused() -> None:
    encoded = encode_mask(np.ones((4, 4), bool))
    with pytest.raises(ValueError, match="inside"):
        decode_mask(encoded.data, encoded.box, (3, 3))


def test_inflated_data_is_refused() -> None:
    bomb = zlib.compress(b"\0" * 1_000_000)
    with pytest.raises(ValueError, match="bytes of mask"):
        decode_mask(bomb, (0, 0, 4, 4), (4, 4))


def test_a_mask_that_was_not_kept_is_no_empty_one() -> None:
    with pytest.raises(ValueError, match="save_masks: false"):
        decode_mask(None, encode_mask(np.ones((4, 4), bool)).box, (4, 4))
