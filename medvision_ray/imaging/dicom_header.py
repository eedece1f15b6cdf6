"""The header fields of a DICOM object that pixels depend on, checked before anything is allocated."""

from __future__ import annotations

import contextlib
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.codecs import FAMILIES, Family, FrameFormat
from medvision_ray.imaging.errors import DecodeError, ErrorCode

BAD_VALUE_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    NotImplementedError,
    struct.error,
)
"""What pydicom raises when it converts a damaged element."""

_DEFLATED = "1.2.840.10008.1.2.1.99"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", _DEFLATED, _BIG_ENDIAN)
_LARGEST_SIDE = 32768
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_FLOAT_BITS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}


@dataclass(frozen=True)
class PixelHeader:
    """How an object's pixels are stored.

    Attributes:
        frame: format of each frame.
        frames: how many.
        keyword: the element that holds them: PixelData, FloatPixelData or DoubleFloatPixelData.
        planar: colour by plane (PlanarConfiguration 1), native data only.
        family: codec, None for native data.
        big_endian: byte order of native data.
    """

    frame: FrameFormat
    frames: int
    keyword: str
    planar: bool
    family: Family | None
    big_endian: bool


def read_pixel_header(dataset: Dataset, syntax: str, config: DecodeConfig) -> PixelHeader:
    """Read and check the image pixel module (DICOM PS3.3 C.7.6.3).

    Raises:
        DecodeError: BAD_HEADER, BAD_DIMENSIONS, TOO_LARGE, UNSUPPORTED_ENCODING or UNSUPPORTED_SHAPE.
    """
    keyword = next(k for k in ("PixelData", *_FLOAT_BITS) if k in dataset)
    family = _family(dataset, syntax)
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    frames = integer(dataset, "NumberOfFrames", 1) or 1
    if not (1 <= rows <= _LARGEST_SIDE and 1 <= columns <= _LARGEST_SIDE and frames >= 1):
        raise DecodeError(ErrorCode.BAD_DIMENSIONS, rows=rows, columns=columns, frames=frames)
    samples = integer(dataset, "SamplesPerPixel", 1)
    bits = _FLOAT_BITS.get(keyword) or integer(dataset, "BitsAllocated")
    stored = bits if keyword in _FLOAT_BITS else integer(dataset, "BitsStored", bits)
    if samples not in (1, 3):
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, samples_per_pixel=samples)
    if bits not in (1, 8, 16, 32, 64):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, bits_allocated=bits)
    if not 1 <= stored <= bits:
        raise DecodeError(ErrorCode.BAD_HEADER, bits_allocated=bits, bits_stored=stored)
    require_size(config, rows, columns, frames, samples * max(bits, 8) // 8)
    return PixelHeader(
        frame=FrameFormat(
            rows=rows,
            columns=columns,
            samples=samples,
            bits_allocated=bits,
            bits_stored=stored,
            signed=keyword == "PixelData" and integer(dataset, "PixelRepresentation", 0) == 1,
            photometric=_photometric(dataset, samples, keyword),
            low_bit=_low_bit(dataset, bits, stored) if keyword == "PixelData" else 0,
            max_tiles=config.max_tiles,
        ),
        frames=frames,
        keyword=keyword,
        planar=samples > 1 and integer(dataset, "PlanarConfiguration", 0) == 1,
        family=family,
        big_endian=syntax == _BIG_ENDIAN or (not syntax and not dataset.original_encoding[1]),
    )


def require_size(config: DecodeConfig, rows: int, columns: int, frames: int, pixel_bytes: int) -> None:
    """Hold an image's dimensions against the configured limits.

    Raises:
        DecodeError: TOO_LARGE, with the limit that it is over.
    """
    for name, value, limit in (
        ("frame_pixels", rows * columns, config.max_frame_pixels),
        ("frames", frames, config.max_frames),
        ("decoded_bytes", rows * columns * frames * pixel_bytes, config.max_decoded_bytes),
    ):
        if value > limit:
            facts: dict[str, Any] = {name: value, "limit": limit}
            raise DecodeError(ErrorCode.TOO_LARGE, **facts)


@lru_cache(maxsize=256)
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)  # a tenth of the time of an access by keyword, which pydicom looks up each time


def element(dataset: Dataset, keyword: str) -> Any:
    """An element's value, None where it is absent, blank or not convertible."""
    tag = _tag(keyword)
    if tag not in dataset:
        return None
    try:
        value = dataset[tag].value
    except BAD_VALUE_ERRORS:
        return None
    return None if value is None or (isinstance(value, str) and not value.strip()) else value


def integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """An element as one integer.

    Raises:
        DecodeError: BAD_HEADER where it is absent without a default, several values or no number.
    """
    value = element(dataset, keyword)
    if value is None and default is not None and keyword not in dataset:
        return default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        if default is not None and not value:
            return default
        raise DecodeError(ErrorCode.BAD_HEADER, field=keyword) from None


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """An element's finite numbers, one or several; empty where it is absent or any of them is not one."""
    value = element(dataset, keyword)
    try:
        values = tuple(float(x) for x in ([value] if isinstance(value, (int, float, str)) else value or ()))
    except (TypeError, ValueError, OverflowError):
        return ()
    return values if all(math.isfinite(x) for x in values) else ()


def text(dataset: Dataset, keyword: str) -> str:
    """An element as stripped text, empty where it is absent; the first of several values."""
    value = element(dataset, keyword)
    if value is not None and not isinstance(value, str):
        with contextlib.suppress(*BAD_VALUE_ERRORS):
            value = value[0] if len(value) else ""
    return str(value).strip(" \0") if value is not None else ""


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, empty where it is absent or no sequence."""
    value = element(dataset, keyword)
    try:
        return [item for item in value if isinstance(item, Dataset)] if value is not None else []
    except BAD_VALUE_ERRORS:
        return []


def _family(dataset: Dataset, syntax: str) -> Family | None:
    if syntax in FAMILIES:
        return FAMILIES[syntax]
    if syntax in _NATIVE:
        return None
    if not syntax:  # a file without meta header: pydicom guessed the encoding, which says nothing of compression
        if dataset["PixelData"].is_undefined_length if "PixelData" in dataset else False:
            raise DecodeError(ErrorCode.BAD_HEADER, field="TransferSyntaxUID")
        return None
    known = syntax if UID(syntax).name != syntax else "unknown"  # only one out of the standard's list is told
    raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, transfer_syntax=known)


def _low_bit(dataset: Dataset, allocated: int, stored: int) -> int:
    """Where the sample starts: HighBit may be over BitsStored - 1 in old objects (retired; DICOM PS3.5 8.1.1)."""
    high = int((numbers(dataset, "HighBit") or (stored - 1,))[0])
    return high + 1 - stored if stored - 1 < high < allocated else 0


def _photometric(dataset: Dataset, samples: int, keyword: str) -> str:
    value = text(dataset, "PhotometricInterpretation").upper()
    if keyword in _FLOAT_BITS and not value:
        return "MONOCHROME2"
    if value not in _PHOTOMETRIC or (samples == 1) != (value[:4] in ("MONO", "PALE")):
        raise DecodeError(ErrorCode.BAD_HEADER, field="PhotometricInterpretation", samples_per_pixel=samples)
    return value
