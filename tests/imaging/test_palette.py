"""Palettes of PALETTE COLOR objects: real ones against pydicom's reading of them, the rules on hand-made ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medvision_ray.imaging.codecs import FrameFormat
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.palette import expand_segments, read_palette

PALETTES = [
    "OBXXXX1A.dcm",
    "OBXXXX1A_expb.dcm",
    "gdcm-US-ALOKA-16.dcm",
    "gdcm-US-ALOKA-16_big.dcm",
    "TestPattern_Palette.dcm",
    "TestPattern_Palette_16.dcm",
]


def frame(bits: int = 8, *, signed: bool = False) -> FrameFormat:
    return FrameFormat(1, 1, 1, 8 if bits <= 8 else 16, bits, signed, "PALETTE COLOR")


def palette(descriptor: list[int], data: bytes, keyword: str = "{}PaletteColorLookupTableData") -> Dataset:
    dataset = Dataset()
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", descriptor)
        setattr(dataset, keyword.format(colour), data)
    return dataset


def words(*values: int, order: str = "<") -> bytes:
    return np.array(values, f"{order}u2").tobytes()


def expanded(count: int, *values: int) -> list[int]:
    return expand_segments(np.array(values, np.uint16), count, False).tolist()


@pytest.mark.parametrize("name", PALETTES)
def test_real_palettes_are_what_pydicom_reads(corpora_dir: Any, name: str) -> None:
    dataset = pydicom.dcmread(next(corpora_dir.rglob(name)))
    bits = int(dataset.BitsStored)
    reference = pydicom.pixels.apply_color_lut(np.arange(1 << bits).astype(f"u{dataset.BitsAllocated // 8}"), dataset)
    reference = reference >> 8 if int(reference.max()) > 255 else reference
    found = read_palette(dataset, frame(bits), dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2")
    np.testing.assert_array_equal(found, reference)


def test_a_descriptor_of_0_entries_means_65536() -> None:
    dataset = palette([0, 0, 16], np.arange(65536, dtype="<u2").tobytes())
    assert read_palette(dataset, frame(16), False)[[0, 256, 65535], 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(("big_endian", "expected"), [(False, [1, 2, 3, 4]), (True, [2, 1, 4, 3])])
def test_eight_bit_entries_lie_two_to_a_word(big_endian: bool, expected: list[int]) -> None:
    table = read_palette(palette([4, 0, 8], bytes([1, 2, 3, 4])), frame(), big_endian)
    assert table[:4, 0].tolist() == expected


def test_big_endian_entries_of_16_bits_are_read_in_their_order() -> None:
    table = read_palette(palette([2, 0, 16], words(0x1234, 0xFE00, order=">")), frame(), True)
    assert table[:2, 1].tolist() == [0x12, 0xFE]


def test_eight_bit_colours_in_16_bit_entries_are_not_cut_to_nothing() -> None:
    assert read_palette(palette([2, 0, 16], words(7, 200)), frame(), False)[:2, 2].tolist() == [7, 200]


def test_values_outside_the_palette_take_its_ends() -> None:
    table = read_palette(palette([2, 10, 16], words(100, 200)), frame(), False)
    assert table[[0, 10, 11, 255], 0].tolist() == [100, 100, 200, 200]


def test_signed_indices_start_at_a_negative_first_value() -> None:
    dataset = Dataset()
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(pydicom.tag.Tag(f"{colour}PaletteColorLookupTableDescriptor"), "US", [3, 65535, 16])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", words(10, 20, 30))
    table = read_palette(dataset, frame(signed=True), False)
    assert table[[0x80, 0xFF, 0, 1, 2], 0].tolist() == [10, 10, 20, 30, 30]


def test_segments_are_expanded_as_the_standard_says() -> None:
    assert expanded(7, 0, 2, 5, 9, 1, 4, 17, 0, 1, 3) == [5, 9, 11, 13, 15, 17, 3]
    # an indirect segment copies two segments from byte 0 on; a copied ramp starts at the last value before it
    assert expanded(8, 0, 2, 0, 4, 1, 2, 8, 2, 2, 0, 0) == [0, 4, 6, 8, 0, 4, 6, 8]


def test_segments_never_expand_past_the_descriptors_entries() -> None:
    bomb = [0, 1, 1, *[1, 65535, 2] * 50_000]
    assert len(expanded(256, *bomb)) == 256


@pytest.mark.parametrize("segments", [(1, 4, 9), (0, 9, 1), (3, 1, 1), (0, 1, 5, 2, 1, 6, 0), (0, 0), (0, 1, 5, 2, 1)])
def test_segments_that_break_the_rules_are_a_bad_header(segments: tuple[int, ...]) -> None:
    keyword = "Segmented{}PaletteColorLookupTableData"
    with pytest.raises(DecodeError) as caught:
        read_palette(palette([256, 0, 16], words(*segments), keyword), frame(), False)
    assert caught.value.code is ErrorCode.BAD_HEADER


def test_a_palette_that_is_absent_or_too_short_is_a_bad_header() -> None:
    for dataset in (Dataset(), palette([256, 0, 16], words(1, 2, 3)), palette([256, 0, 12], words(*range(256)))):
        with pytest.raises(DecodeError) as caught:
            read_palette(dataset, frame(), False)
        assert caught.value.code is ErrorCode.BAD_HEADER
