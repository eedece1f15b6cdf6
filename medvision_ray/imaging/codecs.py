"""One compressed DICOM frame to its stored samples: imagecodecs for the JPEG families, pylibjpeg-rle for RLE.

Which codec decodes a transfer syntax is written here, once, and does not hang on what is installed.

Frames are decoded here and not by pydicom's plugin registry, because that registry prefers
python-gdcm where it is installed, swallows the reason of a failure and logs the exception's text.
The corrections after the codec are pydicom's (pydicom/pixels/decoders/base.py).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import Enum

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from rle.utils import decode_pixel_data as decode_rle

from medvision_ray.imaging.codestream import Buffer, CodestreamInfo, read_jpeg, read_jpeg2000, require_jpeg_end
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.reduced import decode_halved, decode_halved_jpeg


class Family(str, Enum):
    """Which codec a transfer syntax needs."""

    JPEG = "jpeg"
    JPEG_LS = "jpeg_ls"
    JPEG_2000 = "jpeg_2000"
    RLE = "rle"
    DEFLATED = "deflated"


FAMILIES: dict[str, Family] = {
    "1.2.840.10008.1.2.4.50": Family.JPEG,
    "1.2.840.10008.1.2.4.51": Family.JPEG,
    "1.2.840.10008.1.2.4.53": Family.JPEG,
    "1.2.840.10008.1.2.4.55": Family.JPEG,
    "1.2.840.10008.1.2.4.57": Family.JPEG,
    "1.2.840.10008.1.2.4.70": Family.JPEG,
    "1.2.840.10008.1.2.4.80": Family.JPEG_LS,
    "1.2.840.10008.1.2.4.81": Family.JPEG_LS,
    "1.2.840.10008.1.2.4.90": Family.JPEG_2000,
    "1.2.840.10008.1.2.4.91": Family.JPEG_2000,
    "1.2.840.10008.1.2.4.201": Family.JPEG_2000,
    "1.2.840.10008.1.2.4.202": Family.JPEG_2000,
    "1.2.840.10008.1.2.4.203": Family.JPEG_2000,
    "1.2.840.10008.1.2.5": Family.RLE,
    "1.2.840.10008.1.2.8.1": Family.DEFLATED,
}
"""Supported compressed transfer syntaxes (DICOM PS3.5 A.4) and the codec of each."""

_RGB_IDS = ((82, 71, 66), (114, 103, 98))
_SMALLEST_TILE_PIXELS = 64


@dataclass(frozen=True)
class FrameFormat:
    """What the data set says of every frame (DICOM PS3.3 C.7.6.3).

    Attributes:
        samples: 1 for grey and palette indices, 3 for colour.
        bits_allocated: 1, 8, 16, 32 or 64.
        bits_stored: bits of a sample that count; the others may hold anything.
        signed: two's complement samples (PixelRepresentation 1).
        photometric: PhotometricInterpretation.
        low_bit: bits below the sample, by the retired HighBit over BitsStored - 1; 0 in almost every file.
        max_tiles: most JPEG 2000 tiles that a frame may have.
        halvings: not of the data set: how often the sides of grey JPEG and JPEG 2000 frames are halved in decoding.
    """

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    low_bit: int = 0
    max_tiles: int = 65_536
    halvings: int = 0


def decode_frame(data: Buffer, family: Family, expected: FrameFormat) -> tuple[NDArray[np.generic], bool]:
    """Decode one frame.

    Args:
        data: the frame's codestream; a view of it spares a copy of a JPEG 2000 and of no other.

    Returns:
        Samples of shape `(rows, columns)` or `(rows, columns, 3)`, in the smallest integer type
        that the codec gives, and whether colour is still YBR_FULL. With `halvings`, fewer rows and columns.

    Raises:
        DecodeError: DIMENSION_MISMATCH where the codestream's size is not the header's,
            DECOMPRESSION_BOMB for absurd tilings, TRUNCATED for a JPEG without its end.
        Exception: whatever the codec raises on damaged data; `decode.decode` maps it.
    """
    if family is Family.JPEG_2000:
        return _decode_jpeg2000(data, expected), False
    data = bytes(data)  # the same object where it is one already
    if family is Family.RLE:
        return _decode_rle(data, expected)
    info = read_jpeg(data)
    _require_same_size(info, expected)
    ybr = expected.photometric.startswith("YBR_FULL")
    require_jpeg_end(data)  # without one CharLS refuses too, but after seconds of search in a small frame
    if expected.halvings and family is Family.JPEG and expected.samples == 1:
        return _as_stored(decode_halved_jpeg(data, info, expected.halvings), family, info, expected), False
    if family is Family.JPEG:
        frame, ybr = _decode_jpeg(data, info, expected)
    else:
        frame = imagecodecs.jpegls_decode(data)
        ybr = ybr and info.component_ids not in _RGB_IDS
    _require_shape(frame, expected)
    return _as_stored(frame, family, info, expected), ybr


def _decode_jpeg2000(data: Buffer, expected: FrameFormat) -> NDArray[np.generic]:
    info = read_jpeg2000(data)
    _require_same_size(info, expected)
    if expected.halvings:
        frame = decode_halved(data, info, expected.halvings)
    else:  # HTJ2K too: imagecodecs.htj2k_decode ignores OpenJPH's error and returns a half-filled image
        frame = imagecodecs.jpeg2k_decode(data, numthreads=1)  # type: ignore[arg-type]  # it takes any buffer
        _require_shape(frame, expected)
    return _as_stored(frame, Family.JPEG_2000, info, expected)


def _require_shape(frame: NDArray[np.generic], expected: FrameFormat) -> None:
    if frame.shape != _shape(expected):
        raise DecodeError(ErrorCode.DIMENSION_MISMATCH, decoded_dimensions=frame.ndim)


def _shape(expected: FrameFormat) -> tuple[int, ...]:
    size = (expected.rows, expected.columns)
    return size if expected.samples == 1 else (*size, expected.samples)


def _require_same_size(info: CodestreamInfo, expected: FrameFormat) -> None:
    if (info.rows, info.columns, info.components) != (expected.rows, expected.columns, expected.samples):
        raise DecodeError(
            ErrorCode.DIMENSION_MISMATCH,
            rows=expected.rows,
            columns=expected.columns,
            samples=expected.samples,
            coded_rows=info.rows,
            coded_columns=info.columns,
            coded_samples=info.components,
        )
    tiny = info.tiles > _SMALLEST_TILE_PIXELS and info.tiles * _SMALLEST_TILE_PIXELS > info.rows * info.columns
    if tiny or info.tiles > expected.max_tiles:
        raise DecodeError(ErrorCode.DECOMPRESSION_BOMB, tiles=info.tiles, limit=expected.max_tiles)


def _decode_jpeg(data: bytes, info: CodestreamInfo, expected: FrameFormat) -> tuple[NDArray[np.generic], bool]:
    if expected.samples == 1:
        return imagecodecs.jpeg8_decode(data), False
    rgb = info.component_ids in _RGB_IDS or (expected.photometric == "RGB" and not info.jfif)
    if rgb:  # named on both sides, else libjpeg takes three components for YCbCr
        return imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB"), False
    if info.lossless:  # libjpeg-turbo does not convert the colours of lossless JPEG
        return imagecodecs.jpeg8_decode(data, colorspace="YCBCR", outcolorspace="YCBCR"), True
    return imagecodecs.jpeg8_decode(data, outcolorspace="RGB"), False


def inflate_frame(data: bytes, expected: FrameFormat) -> bytes:
    """One frame of the Deflated Image Frame syntax as native little-endian bytes (DICOM PS3.5 A.4.12).

    Raises:
        DecodeError: TRUNCATED where there are fewer bytes than the header says; more are never inflated.
    """
    length = -(-expected.rows * expected.columns * expected.samples * expected.bits_allocated // 8)
    native = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length)
    if len(native) < length:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=length, actual_bytes=len(native))
    return native


def _decode_rle(data: bytes, expected: FrameFormat) -> tuple[NDArray[np.generic], bool]:
    if expected.bits_allocated == 1:
        return _decode_rle_bits(data, expected), False
    # pylibjpeg-rle panics on some corrupt data; PanicException is no Exception, decode.decode catches it.
    raw = decode_rle(
        data, version=2, rows=expected.rows, columns=expected.columns, bits_allocated=expected.bits_allocated
    )
    unsigned = np.frombuffer(raw, dtype=f"<u{expected.bits_allocated // 8}")
    pixels = expected.rows * expected.columns
    if unsigned.size != pixels * expected.samples:
        raise DecodeError(ErrorCode.DIMENSION_MISMATCH, decoded_samples=unsigned.size)
    planes = unsigned.reshape(expected.samples, expected.rows, expected.columns)
    frame = planes[0] if expected.samples == 1 else np.moveaxis(planes, 0, -1)
    return shift_to_stored(frame, expected), expected.photometric.startswith("YBR_FULL")


def _decode_rle_bits(data: bytes, expected: FrameFormat) -> NDArray[np.generic]:
    """Samples of one bit, which RLE packs eight to a byte over the whole frame."""
    pixels = expected.rows * expected.columns
    packed = decode_rle(data, version=2, rows=1, columns=-(-pixels // 8), bits_allocated=8)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=pixels, bitorder="little")
    return bits.reshape(expected.rows, expected.columns)


def _as_stored(
    frame: NDArray[np.generic], family: Family, info: CodestreamInfo, expected: FrameFormat
) -> NDArray[np.generic]:
    grey = expected.samples == 1
    if family is Family.JPEG_2000:
        # Precision and sign are the codestream's; where its sign differs from the header's, the header's holds.
        bits = info.precision if grey and info.signed != expected.signed else 8 * frame.itemsize
    elif family is Family.JPEG_LS:  # has no sign of its own
        bits = info.precision if expected.signed else 8 * frame.itemsize
    else:
        bits = expected.bits_stored
    return clear_unused_bits(frame, bits, expected.signed)


def shift_to_stored(frame: NDArray[np.generic], expected: FrameFormat) -> NDArray[np.generic]:
    """Native samples as stored values: bits below the sample dropped, those above cleared."""
    if expected.low_bit:
        frame = np.right_shift(frame.view(np.dtype(f"u{frame.itemsize}")), expected.low_bit)
    return clear_unused_bits(frame, expected.bits_stored, expected.signed)


def clear_unused_bits(frame: NDArray[np.generic], bits: int, signed: bool) -> NDArray[np.generic]:
    """Samples with only their `bits` low bits, sign-extended where signed (DICOM PS3.5 8.1.1).

    The bits above may hold overlays or junk. The input is returned as it is where they do not.
    """
    unsigned = frame.view(np.dtype(f"u{frame.itemsize}"))
    shift = 8 * frame.itemsize - bits
    target = np.dtype(f"{'i' if signed else 'u'}{frame.itemsize}")
    if shift <= 0 or not unsigned.size:
        return unsigned.view(target)
    if not signed and int(unsigned.max()) < 1 << bits:
        return unsigned
    values = unsigned.view(target)
    if signed and int(values.min()) >= -(1 << (bits - 1)) and int(values.max()) < 1 << (bits - 1):
        return values
    cleared: NDArray[np.generic] = np.left_shift(values, shift)
    np.right_shift(cleared, shift, out=cleared)
    return cleared
