"""Adversarial and truncated files: refused with the right code, in bounded memory."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging import dicom, dicom_header, dicom_pixels
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

CONFIG = DecodeConfig()


def stored(data: bytes) -> np.ndarray[Any, Any]:
    dataset, syntax = dicom.parse(data, CONFIG)
    return dicom_pixels.read_stored(dataset, dicom_header.read_pixel_header(dataset, syntax, CONFIG))


def test_a_deflated_bomb_is_refused_at_the_limit() -> None:
    dataset = pydicom.dcmread(get_testdata_file("image_dfl.dcm"))
    out = BytesIO()
    dataset.save_as(out)
    whole = out.getvalue()
    start = dicom._meta_header(whole)[1]
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = zlib.decompress(whole[start:], -zlib.MAX_WBITS) + bytes(64 << 20)
    bomb = whole[:start] + deflater.compress(body) + deflater.flush()
    with pytest.raises(DecodeError) as caught:
        decode(bomb, DecodeConfig(max_decoded_bytes=16 << 20))
    assert caught.value.code is ErrorCode.DECOMPRESSION_BOMB


def test_tiny_frames_without_end_are_over_the_frame_limit() -> None:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.Rows = dataset.Columns = 1
    dataset.NumberOfFrames = 50_000
    dataset.PixelData = bytes(100_000)
    out = BytesIO()
    dataset.save_as(out)
    with pytest.raises(DecodeError) as caught:
        decode(out.getvalue(), CONFIG)
    assert caught.value.code is ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "image_dfl.dcm",
        "liver_1frame.dcm",
        "SC_rgb_rle_2frame.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "examples_rgb_color.dcm",
    ],
)
def test_stored_values_agree_with_pydicoms_own_decoders(name: str) -> None:
    path = get_testdata_file(name)
    needs_plugin = name in ("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm")
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm") if needs_plugin else path).pixel_array
    np.testing.assert_array_equal(np.squeeze(stored(Path(path).read_bytes())), np.squeeze(expected))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg_dcmtk.dcm"]
)
def test_a_truncated_file_is_refused(name: str, share: float) -> None:
    data = Path(get_testdata_file(name)).read_bytes()
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * share)], CONFIG)


def test_a_jpeg_frame_without_its_end_is_truncated() -> None:
    dataset = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2 * 2 - 2000]])
    out = BytesIO()
    dataset.save_as(out)
    with pytest.raises(DecodeError) as caught:
        decode(out.getvalue(), CONFIG)
    assert caught.value.code is ErrorCode.TRUNCATED


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9, 0.95, 0.99])
def test_a_truncated_htj2k_frame_is_refused(corpora_dir: Path, share: float) -> None:
    dataset = pydicom.dcmread(corpora_dir / "pydicom-data/data_store/data/HTJ2KLossless_08_RGB.dcm")
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: int(len(frame) * share)]])
    out = BytesIO()
    dataset.save_as(out)
    with pytest.raises(DecodeError) as caught:
        decode(out.getvalue(), CONFIG)
    assert caught.value.code is ErrorCode.CORRUPT
