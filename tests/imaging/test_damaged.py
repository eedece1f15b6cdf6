"""What campaigns of damaged files (`make test-fuzz`) found, each held by a test."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate

from medvision_ray.config import DecodeConfig
from medvision_ray.demo import encode
from medvision_ray.demo.encode import Subject
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

GREY = np.random.default_rng(0).integers(0, 65536, (72, 96), dtype=np.uint16)


def code_of(data: bytes) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        decode(data, DecodeConfig())
    return caught.value.code


def peak_above_bytes(data: bytes) -> int:
    """Memory that refusing these bytes took at most."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux only")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = status("VmRSS")
    code_of(data)
    return status("VmHWM") - before


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x40000000, 0xFFFFFFFF, 1 << 20])
@pytest.mark.parametrize("chunk", [b"IDAT", b"IHDR"])
def test_a_lie_in_a_png_chunk_s_length_takes_no_memory(chunk: bytes, length: int) -> None:
    data = cv2.imencode(".png", GREY)[1].tobytes()
    place = data.index(chunk) - 4
    lying = data[:place] + length.to_bytes(4, "big") + data[place + 4 :]
    assert code_of(lying) is ErrorCode.TRUNCATED
    assert peak_above_bytes(lying) < 32 << 20


def test_a_png_with_more_chunks_and_with_bytes_after_its_end_decodes() -> None:
    data = cv2.imencode(".png", GREY)[1].tobytes()
    assert np.array_equal(decode(data + b"more", DecodeConfig()).pixels[0], GREY)


def test_a_jpeg_ls_without_its_end_is_truncated_before_the_codec_searches_for_it() -> None:
    picture = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    subject = Subject("DOE^JANE", "1", "1", 1, 0)
    dataset = dcmread(BytesIO(encode.ct_dicom(subject, 0, picture, signed=False, compressed=True)))
    code = imagecodecs.jpegls_encode(np.zeros((64, 64), np.uint16))
    dataset.PixelData = encapsulate([code[:-4]])
    sink = BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    assert code_of(sink.getvalue()) is ErrorCode.TRUNCATED
