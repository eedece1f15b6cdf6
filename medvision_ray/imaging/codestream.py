"""What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself, read before any codec sees it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from medvision_ray.imaging.errors import DecodeError, ErrorCode

Buffer = bytes | memoryview

_JP2_BOXES = 4096
_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
_SIZ = b"\xff\x4f\xff\x51"
_SOS_MARKER = 0xDA
_LOSSLESS_MARKERS = (0xC3, 0xC7, 0xCB, 0xCF)
_NO_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))
_FRAME_MARKERS = frozenset((*range(0xC0, 0xD0), 0xF7)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True)
class CodestreamInfo:
    """Size and kind of one coded image.

    Attributes:
        precision: bits per sample.
        component_ids: JPEG component identifiers, empty for JPEG 2000.
        lossless: JPEG lossless (SOF3 and its relatives).
        jfif: an APP0 JFIF marker is present, so three components are YCbCr.
        signed: JPEG 2000 samples are signed.
        tiles: JPEG 2000 tiles, else 1.
    """

    rows: int
    columns: int
    components: int
    precision: int
    component_ids: tuple[int, ...] = ()
    lossless: bool = False
    jfif: bool = False
    signed: bool = False
    tiles: int = 1


def read_jpeg(data: bytes) -> CodestreamInfo:
    """Read a JPEG's or JPEG-LS's frame header (ITU-T T.81 B.2.2, T.87 C.2.2).

    Raises:
        DecodeError: CORRUPT where the marker segments are broken or no frame header comes before
            the first scan.
    """
    position = data.find(_SOI, 0, 64)
    if position < 0:
        raise DecodeError(ErrorCode.CORRUPT, expected="jpeg_start")
    position += 2
    jfif = False
    end = len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _NO_LENGTH:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _FRAME_MARKERS:
            return _jpeg_frame(data[position + 4 : position + 2 + length], marker, jfif)
        if marker == _SOS_MARKER or length < 2:
            break
        jfif = jfif or (marker == 0xE0 and data[position + 4 : position + 8] == b"JFIF")
        position += 2 + length
    raise DecodeError(ErrorCode.CORRUPT, expected="jpeg_frame_header")


def _jpeg_frame(body: bytes, marker: int, jfif: bool) -> CodestreamInfo:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise DecodeError(ErrorCode.CORRUPT, expected="jpeg_frame_header")
    precision, rows, columns, components = struct.unpack(">BHHB", body[:6])
    return CodestreamInfo(
        rows=rows,
        columns=columns,
        components=components,
        precision=precision,
        component_ids=tuple(body[6 + 3 * index] for index in range(components)),
        lossless=marker in _LOSSLESS_MARKERS,
        jfif=jfif,
    )


def require_jpeg_end(data: bytes) -> None:
    """Refuse a JPEG whose entropy-coded data does not end with an end-of-image marker.

    libjpeg-turbo decodes a truncated JPEG silently, with a grey tail; byte stuffing keeps the
    marker out of coded data, so one after the start of the scan is enough.

    Raises:
        DecodeError: TRUNCATED.
    """
    if data.rfind(_EOI) < data.rfind(b"\xff\xda"):
        raise DecodeError(ErrorCode.TRUNCATED, expected="jpeg_end_marker")


def bare_jpeg2000(data: Buffer) -> Buffer:
    """A JPEG 2000 codestream without the boxes of a JP2 file before it.

    Raises:
        DecodeError: CORRUPT where there is none.
    """
    start = bytes(data[:_JP2_BOXES]).find(_SIZ)
    if start < 0:
        raise DecodeError(ErrorCode.CORRUPT, expected="jpeg2000_size_segment")
    return data[start:]


def read_jpeg2000(data: Buffer) -> CodestreamInfo:
    """Read a JPEG 2000 SIZ segment (ITU-T T.800 A.5.1), bare or in a JP2 file.

    Raises:
        DecodeError: CORRUPT where there is none or it is not usable.
    """
    stream = bare_jpeg2000(data)
    if len(stream) < 4 + 39:
        raise DecodeError(ErrorCode.CORRUPT, expected="jpeg2000_size_segment")
    fields = struct.unpack_from(">HH8IHB", stream, 4)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components, depth = fields[2:]
    if right <= left or bottom <= top or not tile_width or not tile_height or tile_left > left or tile_top > top:
        raise DecodeError(ErrorCode.CORRUPT, expected="jpeg2000_size_segment")
    return CodestreamInfo(
        rows=bottom - top,
        columns=right - left,
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        tiles=-(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height),
    )
