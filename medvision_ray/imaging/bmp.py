"""BMP: the header held against the limits, 16 and 32 bits a pixel by their masks, all else through OpenCV.

OpenCV takes the masks of 32-bit BMP for granted and maps the 5 bits of 16-bit BMP to 0..248.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode

_RGB, _BITFIELDS, _ALPHA_BITFIELDS = 0, 3, 6
_UNCOMPRESSED = (_RGB, _BITFIELDS, _ALPHA_BITFIELDS)
_DEFAULT_MASKS = {16: (0x7C00, 0x03E0, 0x001F, 0), 32: (0x00FF0000, 0x0000FF00, 0x000000FF, 0)}


@dataclass(frozen=True)
class _Header:
    offset: int
    size: int
    columns: int
    rows: int  # negative where rows run top down
    bits: int
    compression: int

    @property
    def row_bytes(self) -> int:
        return (self.columns * self.bits + 31) // 32 * 4


def decode_bmp(data: bytes, config: DecodeConfig) -> NDArray[np.uint8]:
    """Decode a BMP.

    Returns:
        `(rows, columns, 3)` RGB or `(rows, columns, 4)` RGBA where the header names an alpha mask;
        the fourth byte of other 32-bit BMP is no alpha.

    Raises:
        DecodeError: TRUNCATED, BAD_DIMENSIONS, TOO_LARGE, UNSUPPORTED_ENCODING or CORRUPT.
    """
    header = _header(data)
    rows = abs(header.rows)
    if rows < 1 or header.columns < 1:
        raise DecodeError(ErrorCode.BAD_DIMENSIONS, rows=rows, columns=header.columns)
    require_size(config, rows, header.columns, 1, 4)
    expected = header.offset + rows * header.row_bytes
    if header.compression in _UNCOMPRESSED and len(data) < expected:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=expected, actual_bytes=len(data))
    if header.bits in _DEFAULT_MASKS and header.compression in _UNCOMPRESSED:
        return _by_masks(data, header)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DecodeError(ErrorCode.CORRUPT)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _header(data: bytes) -> _Header:
    if len(data) < 34:
        raise DecodeError(ErrorCode.TRUNCATED, bytes=len(data))
    offset, size = struct.unpack_from("<II", data, 10)
    if size == 12:
        columns, rows, _, bits = struct.unpack_from("<HHHH", data, 18)
        return _Header(offset, size, columns, rows, bits, _RGB)
    columns, rows, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    return _Header(offset, size, columns, rows, bits, compression)


def _by_masks(data: bytes, header: _Header) -> NDArray[np.uint8]:
    masks = _DEFAULT_MASKS[header.bits]
    if header.compression != _RGB:  # the masks stand at the same place, inside long headers and after the short one
        alpha = header.size >= 56 or header.compression == _ALPHA_BITFIELDS
        if len(data) < 70:
            raise DecodeError(ErrorCode.TRUNCATED, bytes=len(data))
        masks = struct.unpack_from("<4I", data, 54) if alpha else (*struct.unpack_from("<3I", data, 54), 0)
    if not all(masks[:3]):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, field="masks")
    width = header.bits // 8
    rows = abs(header.rows)
    cells = np.frombuffer(data, np.uint8, rows * header.row_bytes, header.offset).reshape(rows, -1)
    words = np.ascontiguousarray(cells[:, : header.columns * width]).view(f"<u{width}").astype(np.uint32)
    image = np.stack([_channel(words, mask) for mask in masks if mask], axis=-1)
    return image if header.rows < 0 else np.ascontiguousarray(image[::-1])


def _channel(words: NDArray[np.uint32], mask: int) -> NDArray[np.uint8]:
    """The bits of a mask, scaled to the full range of 8 bits."""
    shift = (mask & -mask).bit_length() - 1
    top = mask >> shift
    values = (words & np.uint32(mask)) >> np.uint32(shift)
    if top == 255:
        return values.astype(np.uint8)
    return np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)
