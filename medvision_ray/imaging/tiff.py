"""TIFF pages to frames through tifffile, held against the limits before a strip is decoded."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # logs quote tag values

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE = 0, 1, 2, 3
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
        return [_frame(page) for page in pages], first.photometric == _MINISWHITE


def _full_pages(file: tifffile.TiffFile, limit: int) -> list[Any]:
    pages: list[Any] = []
    for page in file.pages:
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
    if page.dtype is None or page.compression not in _COMPRESSIONS or page.dtype.kind not in "buif":
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, compression=int(page.compression))
    if page.photometric not in (_MINISWHITE, _MINISBLACK, _RGB, _PALETTE):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, photometric=int(page.photometric))
    if int(page.imagedepth) != 1 or not 1 <= samples <= 4:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, samples=samples)
    pixel_bytes = samples * page.dtype.itemsize
    require_size(config, rows, columns, frames, pixel_bytes)
    if page.is_tiled:
        require_size(config, int(page.tilelength), int(page.tilewidth), 1, pixel_bytes)
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if not ends or max(ends) > size or min(page.databytecounts) < 1:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=max(ends, default=0), actual_bytes=size)


def _frame(page: Any) -> NDArray[np.generic]:
    frame = np.asarray(page.asarray(maxworkers=1))
    if frame.ndim == 3 and frame.shape[:2] != (page.imagelength, page.imagewidth):
        frame = np.moveaxis(frame, 0, -1)  # planar
    if page.photometric == _PALETTE:
        frame = np.take(np.asarray(page.colormap).T, frame, axis=0)
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
