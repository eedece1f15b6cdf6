"""The frames of a DICOM object: native or compressed data to stored values, colour to 8-bit RGB."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import convert_color_space

from medvision_ray.imaging.codecs import Family, decode_frame, inflate_frame, shift_to_stored
from medvision_ray.imaging.codestream import Buffer
from medvision_ray.imaging.dicom_header import PixelHeader
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.palette import read_palette
from medvision_ray.imaging.reduced import halvings

Pixels = NDArray[np.generic]

_ITEM_TAG = b"\xfe\xff\x00\xe0"
_END_TAG = b"\xfe\xff\xdd\xe0"


def read_pixels(dataset: Dataset, header: PixelHeader) -> Pixels:
    """All frames as `MedicalImage.pixels` has them.

    Returns:
        `(frames, rows, columns)` stored values, or `(frames, rows, columns, 3)` uint8 RGB.
        It may be a read-only view of the file's bytes.

    Raises:
        DecodeError: TRUNCATED, DIMENSION_MISMATCH, CORRUPT, DECOMPRESSION_BOMB.
    """
    if header.frame.photometric == "PALETTE COLOR":
        table = read_palette(dataset, header.frame, header.big_endian)
        stored = read_stored(dataset, header)
        return np.asarray(table[stored.view(f"u{stored.itemsize}") & (len(table) - 1)])
    stored = read_stored(dataset, header)
    if header.frame.samples == 1 or stored.dtype == np.uint8:
        return stored
    return np.right_shift(stored, max(header.frame.bits_stored - 8, 0)).astype(np.uint8)


def read_reduced(dataset: Dataset, header: PixelHeader, model_size: tuple[int, int]) -> Pixels | None:
    """Grey JPEG 2000 and 8-bit JPEG frames at the lowest resolution that is enough for a model of this size.

    Returns:
        As `read_pixels`, but fewer rows and columns; None where that cannot be, and all is to be decoded:
        other encodings, frames that are not far larger than the model's, whatever has no such resolution.
    """
    if header.family not in (Family.JPEG_2000, Family.JPEG) or not header.frame.photometric.startswith("MONOCHROME"):
        return None
    most = halvings(header.frame.rows, header.frame.columns, model_size)
    tries = (_read_halved(dataset, header, times) for times in range(most, 0, -1))
    return next((pixels for pixels in tries if pixels is not None), None)


def _read_halved(dataset: Dataset, header: PixelHeader, times: int) -> Pixels | None:
    try:
        return read_stored(dataset, replace(header, frame=replace(header.frame, halvings=times)))
    except MemoryError:
        raise
    except Exception:  # damaged, or no such resolution: decoding more of it tells which
        return None


def read_stored(dataset: Dataset, header: PixelHeader) -> Pixels:
    """All frames as stored: unused bits cleared, YBR converted to RGB, palette indices left as they are.

    Returns:
        `(frames, rows, columns)` or `(frames, rows, columns, 3)`.

    Raises:
        DecodeError: see `read_pixels`.
    """
    data = dataset[header.keyword].value
    if not isinstance(data, (bytes, memoryview)):
        raise DecodeError(ErrorCode.NO_PIXELS)
    frames = _native(dataset, bytes(data), header) if header.family is None else _compressed(dataset, data, header)
    if isinstance(frames, np.ndarray):
        return frames
    first = next(frames)
    if header.frames == 1:
        return first[None]
    pixels = np.empty((header.frames, *first.shape), dtype=first.dtype)
    pixels[0] = first
    for index, frame in enumerate(frames, start=1):
        if frame.dtype != pixels.dtype:
            raise DecodeError(ErrorCode.CORRUPT, frame=index)
        pixels[index] = frame
    return pixels


def _encoded_frames(data: Buffer, frames: int) -> Iterator[Buffer]:
    """Frames of encapsulated data (DICOM PS3.5 A.4); the one of a single fragment in a view is not copied."""
    if isinstance(data, memoryview):
        start = 16 + int.from_bytes(data[4:8], "little")
        end = start + int.from_bytes(data[start - 4 : start], "little")
        last = end == len(data) or data[end : end + 4] == _END_TAG
        if frames == 1 and data[start - 8 : start - 4] == _ITEM_TAG and end <= len(data) and last:
            return iter((data[start:end],))
    encoded: Iterator[bytes] = generate_frames(bytes(data), number_of_frames=frames)
    return encoded


def _compressed(dataset: Dataset, data: Buffer, header: PixelHeader) -> Iterator[Pixels]:
    assert header.family is not None
    if data[:4] != _ITEM_TAG:
        raise DecodeError(ErrorCode.CORRUPT, expected="encapsulated_pixels")
    encoded = _encoded_frames(data, header.frames)
    for index in range(header.frames):
        source = next(encoded, None)
        if source is None:
            raise DecodeError(ErrorCode.TRUNCATED, frames=header.frames, found=index)
        if header.family is Family.DEFLATED:
            single = replace(header, frames=1, family=None)
            yield next(iter(_native(dataset, inflate_frame(bytes(source), header.frame), single)))
            continue
        frame, ybr = decode_frame(source, header.family, header.frame)
        yield _ybr_to_rgb(frame) if ybr else frame


def _native(dataset: Dataset, data: bytes, header: PixelHeader) -> Pixels | Iterator[Pixels]:
    frame = header.frame
    pixels = frame.rows * frame.columns
    total = pixels * frame.samples * header.frames
    if frame.photometric == "YBR_FULL_422" and len(data) < total:
        return _ybr_422(_samples(dataset, data, header, pixels * 2 * header.frames), header)
    if frame.bits_allocated == 1:
        _require_length(data, -(-total // 8))
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total, bitorder="little")
        return bits.reshape(header.frames, frame.rows, frame.columns)
    samples = _samples(dataset, data, header, total)
    if frame.samples == 1:
        return samples.reshape(header.frames, frame.rows, frame.columns)
    if header.planar:
        planes = samples.reshape(header.frames, frame.samples, frame.rows, frame.columns)
        samples = np.ascontiguousarray(np.moveaxis(planes, 1, -1))
    colour = samples.reshape(header.frames, frame.rows, frame.columns, frame.samples)
    if frame.photometric.startswith("YBR_FULL"):
        return (_ybr_to_rgb(single) for single in colour)
    return colour


def _samples(dataset: Dataset, data: bytes, header: PixelHeader, count: int) -> Pixels:
    """The first `count` native samples in machine byte order, unused bits cleared; a view where it can be."""
    size = header.frame.bits_allocated // 8
    _require_length(data, count * size)
    if header.keyword != "PixelData":
        return _machine_order(np.frombuffer(data, f"{'>' if header.big_endian else '<'}f{size}", count))
    if header.big_endian and size == 1 and dataset[header.keyword].VR == "OW":
        words = np.frombuffer(data, np.uint16, len(data) // 2)  # bytes lie swapped in 16-bit words
        return shift_to_stored(words.byteswap().view(np.uint8)[:count], header.frame)
    values = np.frombuffer(data, f"{'>' if header.big_endian else '<'}u{size}", count)
    return shift_to_stored(_machine_order(values), header.frame)


def _machine_order(values: Pixels) -> Pixels:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _require_length(data: bytes, expected: int) -> None:
    if len(data) < expected:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=expected, actual_bytes=len(data))


def _ybr_422(samples: Pixels, header: PixelHeader) -> Iterator[Pixels]:
    """Horizontally halved chroma, in the order Y1 Y2 Cb Cr (DICOM PS3.3 C.7.6.3.1.2)."""
    frame = header.frame
    for quads in samples.reshape(header.frames, -1, 4):
        full = quads[:, [0, 2, 3, 1, 2, 3]]
        yield _ybr_to_rgb(full.reshape(frame.rows, frame.columns, 3))


def _ybr_to_rgb(frame: Pixels) -> Pixels:
    rgb: Pixels = convert_color_space(frame.copy(), "YBR_FULL", "RGB")
    return rgb
