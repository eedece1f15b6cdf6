"""TIFF pages to frames through tifffile, held against the limits before a strip is decoded."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.codestream import read_jpeg, require_jpeg_end
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # logs quote tag values

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_COLOUR_SAMPLES = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3, _PALETTE: 1, _YCBCR: 3}
_UNASSOCIATED_ALPHA = 2
_JPEG = 7
# Codecs whose output tifffile bounds by the strip's declared size: none, CCITT, LZW, Deflate, PackBits.
_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)
_REDUCED = 1


def decode_tiff_frames(data: bytes, config: DecodeConfig) -> tuple[list[NDArray[np.generic]], bool]:
    """Decode the full-size pages.

    Returns:
        Frames of one shape, each `(rows, columns)` or `(rows, columns, channels)`, upright; and
        whether low values are bright (WhiteIsZero).

    Raises:
        DecodeError: TOO_LARGE, BAD_DIMENSIONS, TRUNCATED, UNSUPPORTED_ENCODING, UNSUPPORTED_SHAPE.
    """
    with tifffile.TiffFile(BytesIO(data)) as file:
        pages = _full_pages(file, config.max_frames)
        first = pages[0]
        if any((p.shape, p.dtype, p.photometric) != (first.shape, first.dtype, first.photometric) for p in pages):
            raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, pages=len(pages))
        for page in pages:
            _require_sound(page, len(data), len(pages), config)
            if page.compression == _JPEG:
                _require_jpeg_segments(page, data)
        return [_frame(page) for page in pages], first.photometric == _MINISWHITE


def _full_pages(file: tifffile.TiffFile, limit: int) -> list[Any]:
    pages: list[Any] = []
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen:  # tifffile walks a ring of directories for ever
            raise DecodeError(ErrorCode.CORRUPT, expected="tiff_page")
        seen.add(page.offset)
        if not int(getattr(page, "subfiletype", 0)) & _REDUCED:
            pages.append(page)
        if len(pages) > limit:
            raise DecodeError(ErrorCode.TOO_LARGE, frames=len(pages), limit=limit)
    if not pages:
        raise DecodeError(ErrorCode.CORRUPT, expected="tiff_page")
    return pages


def _require_sound(page: Any, size: int, frames: int, config: DecodeConfig) -> None:
    rows, columns, samples = int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel)
    if rows < 1 or columns < 1:
        raise DecodeError(ErrorCode.BAD_DIMENSIONS, rows=rows, columns=columns)
    if page.dtype is None or page.compression not in (*_COMPRESSIONS, _JPEG) or page.dtype.kind not in "buif":
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, compression=int(page.compression))
    if page.photometric not in _COLOUR_SAMPLES or (page.photometric == _YCBCR) > (page.compression == _JPEG):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, photometric=int(page.photometric))
    if int(page.imagedepth) != 1 or not 0 <= samples - _COLOUR_SAMPLES[page.photometric] <= 1:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, samples=samples)
    pixel_bytes = samples * page.dtype.itemsize
    require_size(config, rows, columns, frames, pixel_bytes)
    if page.is_tiled:
        require_size(config, int(page.tilelength), int(page.tilewidth), 1, pixel_bytes)
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if not ends or max(ends) > size or min(page.databytecounts) < 1:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=max(ends, default=0), actual_bytes=size)


def _require_jpeg_segments(page: Any, data: bytes) -> None:
    """Hold the JPEG of each strip or tile against its place: tifffile decodes it before it looks at its size.

    Raises:
        DecodeError: DIMENSION_MISMATCH, TRUNCATED, or UNSUPPORTED_ENCODING for anything but 8-bit baseline JPEG.
    """
    width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    samples = int(page.samplesperpixel) if page.planarconfig == 1 else 1
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        segment = data[offset : offset + count]
        info = read_jpeg(segment)
        if info.precision != 8 or info.lossless:
            raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, bits=info.precision)
        if info.columns != width or info.rows > min(height, page.imagelength) or info.components != samples:
            raise DecodeError(ErrorCode.DIMENSION_MISMATCH, coded_rows=info.rows, coded_columns=info.columns)
        require_jpeg_end(segment)


def _frame(page: Any) -> NDArray[np.generic]:
    frame = np.asarray(page.asarray(maxworkers=1))
    if frame.ndim == 3 and frame.shape[:2] != (page.imagelength, page.imagewidth):
        frame = np.moveaxis(frame, 0, -1)  # planar
    extra = page.samplesperpixel > _COLOUR_SAMPLES[page.photometric]
    if extra and tuple(page.extrasamples)[:1] != (_UNASSOCIATED_ALPHA,):  # alpha that is multiplied in, or no alpha
        frame = frame[..., 0] if frame.shape[-1] == 2 else frame[..., :-1]
    if page.photometric == _PALETTE:
        colours = np.asarray(page.colormap).T
        colours = (colours >> 8 if int(colours.max()) > 255 else colours).astype(np.uint8)  # 16 bits a colour
        frame = np.take(colours, frame, axis=0)
    elif page.bitspersample < 8:  # as PNG readers do: full range
        frame = (frame.astype(np.uint8) * np.uint8(255 // ((1 << int(page.bitspersample)) - 1))).astype(np.uint8)
    if frame.dtype == np.float16:
        frame = frame.astype(np.float32)
    orientation = page.tags.valueof(274, default=1)
    return np.ascontiguousarray(_upright(frame.astype(frame.dtype.newbyteorder("="), copy=False), int(orientation)))


def _upright(frame: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Undo the orientation tag (TIFF 6.0, section 8)."""
    if orientation in (5, 6, 7, 8):
        frame = np.swapaxes(frame, 0, 1)
    if orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    if orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    return frame
