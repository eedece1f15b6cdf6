"""Each parser of ours on any bytes: its result or a DecodeError, nothing else, within a bounded time.

Hypothesis draws damaged headers of sound files and beginnings that only look like one; it draws the same in
every run (`derandomize`), so that a red run is red again. `campaign.py` is the long search.
"""

from __future__ import annotations

import gzip
import struct
import time
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.bmp import decode_bmp
from medvision_ray.imaging.codestream import CodestreamInfo, read_jpeg, read_jpeg2000, require_jpeg_end
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.dicom import looks_like_dicom
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.nifti import looks_like_nifti
from medvision_ray.imaging.palette import expand_segments
from medvision_ray.imaging.raster import raster_format
from medvision_ray.imaging.series_header import MoreNeeded, series_of

LIMITS = DecodeConfig(max_frame_pixels=1 << 20, max_decoded_bytes=8 << 20, max_frames=64)
SECONDS = 5.0  # a call takes a thousandth of it; a loaded machine some more
EACH = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=SECONDS),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
GREY = np.random.default_rng(0).integers(0, 256, (24, 17), dtype=np.uint8)
VOLUME = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)


def png(depth: Any) -> bytes:
    return cv2.imencode(".png", GREY.astype(depth))[1].tobytes()


def tiff(**options: Any) -> bytes:
    out = BytesIO()
    tifffile.imwrite(out, GREY, **options)
    return out.getvalue()


def nifti(kind: Any) -> bytes:
    data: bytes = kind(VOLUME, np.diag([2.0, 3.0, 4.0, 1.0])).to_bytes()
    return data


JPEG = cv2.imencode(".jpg", GREY)[1].tobytes()
JPEG_2000 = imagecodecs.jpeg2k_encode(GREY, codecformat="j2k", reversible=True, level=0)
JPEG_LS = imagecodecs.jpegls_encode(GREY)
FILES = {
    "png of 8 bits": png(np.uint8),
    "png of 16 bits": png(np.uint16),
    "jpeg": JPEG,
    "bmp": cv2.imencode(".bmp", GREY)[1].tobytes(),
    "tiff in strips": tiff(),
    "tiff, deflated": tiff(compression="zlib"),
    "nifti-1": nifti(nibabel.Nifti1Image),
    "nifti-2": nifti(nibabel.Nifti2Image),
    "nifti, gzip": gzip.compress(nifti(nibabel.Nifti1Image), mtime=0),
    "dicom": Path(get_testdata_file("CT_small.dcm")).read_bytes(),
    "dicom, big endian": Path(get_testdata_file("MR_small_bigendian.dcm")).read_bytes(),
    "dicom, RLE": Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes(),
}


@st.composite
def damaged(draw: st.DrawFn, sound: bytes, reach: int = 1200) -> bytes:
    """A sound file with some bytes or numbers of its beginning replaced, and perhaps cut or lengthened."""
    data = bytearray(sound)
    end = min(reach, len(data)) - 1
    for place in draw(st.lists(st.integers(0, end), max_size=6)):
        width, number = draw(st.sampled_from("BHI")), draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, -1)))
        size = struct.calcsize(width)
        value = number if number >= 0 else draw(st.integers(0, (1 << 8 * size) - 1))
        data[place : place + size] = value.to_bytes(size, draw(st.sampled_from(("little", "big"))))
    cut = draw(st.none() | st.integers(0, len(data)))
    return bytes(data[:cut]) + draw(st.binary(max_size=8))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the DecodeError that it raises; whatever else it raises ends the test."""
    started = time.perf_counter()
    try:
        found = call()
    except DecodeError as error:
        found = error
    assert time.perf_counter() - started < SECONDS
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_image_or_a_decode_error(name: str) -> None:
    codes: list[ErrorCode | None] = []

    @EACH
    @given(damaged(FILES[name]))
    def run(data: bytes) -> None:
        found = outcome(lambda: decode(data, LIMITS))
        assert isinstance(found, (MedicalImage, DecodeError))
        codes.append(found.code if isinstance(found, DecodeError) else None)

    run()
    assert ErrorCode.INTERNAL_ERROR not in codes
    assert len(set(codes)) > 2  # it reaches both ways out, and several reasons


@pytest.mark.parametrize(
    ("read", "sound"),
    [(read_jpeg, JPEG), (read_jpeg, JPEG_LS), (read_jpeg2000, JPEG_2000), (require_jpeg_end, JPEG)],
    ids=["jpeg header", "jpeg-ls header", "jpeg 2000 header", "jpeg end"],
)
def test_a_codestream_s_header_is_read_or_refused(read: Callable[[bytes], Any], sound: bytes) -> None:
    kinds: set[type] = set()

    @EACH
    @given(damaged(sound, 120) | st.binary(max_size=200))
    def run(data: bytes) -> None:
        found = outcome(lambda: read(data))
        assert found is None or isinstance(found, (CodestreamInfo, DecodeError))
        kinds.add(type(found))

    run()
    assert len(kinds) == 2


@EACH
@given(damaged(FILES["bmp"], 70))
def test_a_bmp_s_header_is_read_or_refused(data: bytes) -> None:
    found = outcome(lambda: decode_bmp(data, LIMITS))
    assert isinstance(found, DecodeError) or found.shape[2] in (3, 4)


@EACH
@given(st.lists(st.integers(0, 5) | st.integers(0, 65535), max_size=40), st.integers(1, 65536), st.booleans())
def test_segments_of_a_palette_are_expanded_or_refused(words: list[int], entries: int, byte_wide: bool) -> None:
    found = outcome(lambda: expand_segments(np.array(words, np.uint16), entries, byte_wide))
    assert isinstance(found, DecodeError) or len(found) <= entries


@EACH
@given(
    damaged(FILES["dicom"], 2000) | damaged(FILES["dicom, big endian"], 2000) | st.binary(max_size=400), st.booleans()
)
def test_the_series_of_any_bytes_is_a_digest_or_none_or_more_is_asked_for(data: bytes, whole: bool) -> None:
    try:
        found = outcome(lambda: series_of(data, whole))
    except MoreNeeded:
        assert not whole
    else:
        assert found is None or len(found) == 16


@EACH
@given(st.binary(max_size=600) | st.sampled_from(sorted(FILES.values())).flatmap(damaged))
def test_telling_formats_apart_never_fails(data: bytes) -> None:
    assert raster_format(data) in (None, "png", "jpeg", "tiff", "bmp")
    assert looks_like_nifti(data) in (True, False)
    assert looks_like_dicom(data) in (True, False)
