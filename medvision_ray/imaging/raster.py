"""PNG, JPEG and BMP through OpenCV, TIFF through tifffile; sizes are checked before pixels are decoded.

Rules: colour comes out as RGB; colour whose channels are all the same comes out as grey; alpha is
blended on black (transparent pixels hold any colour), and so is a PNG's transparent grey value;
EXIF orientation of JPEG and orientation of TIFF are applied; 16-bit colour is cut to 8 bits,
16-bit grey is kept. Of an animation the first picture is taken.
"""

from __future__ import annotations

import struct

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.bmp import decode_bmp
from medvision_ray.imaging.codestream import read_jpeg, require_jpeg_end
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import Display, MedicalImage
from medvision_ray.imaging.reduced import MOST_JPEG_HALVINGS, decode_halved_jpeg, halvings
from medvision_ray.imaging.tiff import decode_tiff_frames

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it prints about damaged files

Pixels = NDArray[np.generic]

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 4, 6: 4}


def raster_format(data: bytes) -> str | None:
    """`png`, `jpeg`, `tiff` or `bmp` by the content's first bytes, else None."""
    if data[:3] == b"\xff\xd8\xff" and data[3:4] != b"\xf7":  # F7 starts a bare JPEG-LS, which is no JPEG
        return "jpeg"
    if data[:8] == _PNG:
        return "png"
    if data[:4] in _TIFF:
        return "tiff"
    if data[:2] == b"BM" and len(data) > 18 and int.from_bytes(data[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "bmp"
    return None


def decode_raster(
    data: bytes, kind: str, config: DecodeConfig, model_size: tuple[int, int] | None = None
) -> MedicalImage:
    """Decode a raster file of the given kind; see `decode.decode`, which also maps what codecs raise.

    Raises:
        DecodeError: TOO_LARGE, BAD_DIMENSIONS, TRUNCATED, CORRUPT, UNSUPPORTED_ENCODING or UNSUPPORTED_SHAPE.
    """
    if kind == "jpeg" and model_size:
        reduced = _reduced_jpeg(data, config, model_size)
        if reduced is not None:
            return reduced
    display = Display()
    if kind == "tiff":
        frames, inverted = decode_tiff_frames(data, config)
        pixels = (
            np.stack([_grey_or_rgb(frame) for frame in frames]) if len(frames) > 1 else _grey_or_rgb(frames[0])[None]
        )
        display = Display(invert=inverted)
    else:
        pixels = _SINGLE[kind](data, config)[None]
    return MedicalImage(pixels=pixels, display=display, source_format=kind)


def _jpeg(data: bytes, config: DecodeConfig) -> Pixels:
    info = read_jpeg(data)
    _require_size(config, info.rows, info.columns, info.components)
    require_jpeg_end(data)
    if info.lossless or info.precision != 8:
        return _grey_or_rgb(imagecodecs.jpeg8_decode(data))
    # Both flags apply the EXIF orientation; IMREAD_UNCHANGED would not.
    return _colour_from_bgr(_opencv(data, cv2.IMREAD_GRAYSCALE if info.components == 1 else cv2.IMREAD_COLOR))


def _reduced_jpeg(data: bytes, config: DecodeConfig, model_size: tuple[int, int]) -> MedicalImage | None:
    """An 8-bit JPEG at the lowest resolution that is enough for the model; None where all is to be decoded."""
    info = read_jpeg(data)
    _require_size(config, info.rows, info.columns, info.components)
    require_jpeg_end(data)
    size, turned = (info.rows, info.columns), (info.columns, info.rows)
    times = min(halvings(*size, model_size), halvings(*turned, model_size), MOST_JPEG_HALVINGS)
    if not times or info.precision != 8 or info.lossless:
        return None
    pixels = _colour_from_bgr(decode_halved_jpeg(data, info, times))
    by_size = {tuple(-(-side // (1 << times)) for side in whole): whole for whole in {size, turned}}
    whole = by_size.get(pixels.shape[:2])  # EXIF may have turned it
    if whole is None or len(by_size) < len({size, turned}):
        return None
    return MedicalImage(pixels=pixels[None], source_format="jpeg", source_shape=whole)


def _png(data: bytes, config: DecodeConfig) -> Pixels:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise DecodeError(ErrorCode.CORRUPT, expected="png_header")
    columns, rows, depth, colour = struct.unpack_from(">IIBB", data, 16)
    _require_size(config, rows, columns, _PNG_CHANNELS.get(colour, 4) * max(depth // 8, 1))
    _require_png_chunks(data)
    image = _opencv(data, cv2.IMREAD_UNCHANGED)
    transparent = _transparent_grey(data, depth) if colour == 0 else None
    if transparent is not None and image.ndim == 2:  # OpenCV heeds tRNS of palettes and RGB only
        image = np.where(image == transparent, 0, image).astype(image.dtype)
    return _colour_from_bgr(image)


def _transparent_grey(data: bytes, depth: int) -> int | None:
    """The grey value that a PNG's tRNS chunk makes transparent, as OpenCV scales it (PNG, third edition, 11.3.1.1)."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            return None
        if kind == b"tRNS" and length >= 2 and position + 10 <= len(data):
            value: int = struct.unpack_from(">H", data, position + 8)[0] & ((1 << depth) - 1)
            return value if depth == 16 else value * (255 // ((1 << depth) - 1))
        position += 12 + length
    return None


def _require_png_chunks(data: bytes) -> None:
    """Refuse a PNG whose chunks do not lie one after the other up to the last one (ISO 15948, 5.3).

    OpenCV allocates what a chunk's length says before it looks whether that much is there: 4 GB for a file of 15 kB.
    """
    place = len(_PNG)
    while data[place + 4 : place + 8] != b"IEND":
        if place + 12 > len(data):
            raise DecodeError(ErrorCode.TRUNCATED, expected="png_end")
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _bmp(data: bytes, config: DecodeConfig) -> Pixels:
    return _grey_or_rgb(decode_bmp(data, config))


_SINGLE = {"jpeg": _jpeg, "png": _png, "bmp": _bmp}


def _require_size(config: DecodeConfig, rows: int, columns: int, pixel_bytes: int) -> None:
    if rows < 1 or columns < 1:
        raise DecodeError(ErrorCode.BAD_DIMENSIONS, rows=rows, columns=columns)
    require_size(config, rows, columns, 1, pixel_bytes)


def _opencv(data: bytes, flags: int) -> Pixels:
    image: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise DecodeError(ErrorCode.CORRUPT)
    return image


def _colour_from_bgr(image: Pixels) -> Pixels:
    """OpenCV's grey, BGR or BGRA as grey or 8-bit RGB."""
    if image.ndim == 2:
        return image
    if _channels_agree(image):
        return _opaque(image) if image.shape[2] == 4 else np.ascontiguousarray(image[..., 0])
    code = cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return _grey_or_rgb(cv2.cvtColor(image, code))


def _grey_or_rgb(image: Pixels) -> Pixels:
    """Grey, grey and alpha, RGB or RGBA of any depth as grey or 8-bit RGB."""
    if image.ndim == 2:
        return image
    if image.shape[2] in (2, 4):
        image = _opaque(image)
    if image.ndim == 2:
        return image
    if image.shape[2] != 3:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, channels=image.shape[2])
    if _channels_agree(image):
        return np.ascontiguousarray(image[..., 0])
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return np.right_shift(image, 8).astype(np.uint8)
    raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, colour_bits=8 * image.itemsize)


def _channels_agree(image: Pixels) -> bool:
    coarse = image[::16, ::16]
    # most colour images show it in a few pixels
    return all(
        bool((part[..., 0] == part[..., 1]).all() and (part[..., 1] == part[..., 2]).all()) for part in (coarse, image)
    )


def _opaque(image: Pixels) -> Pixels:
    """Blend on black; grey (2-D) where the colour channels agree."""
    if image.dtype not in (np.uint8, np.uint16):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, alpha_bits=8 * image.itemsize)
    alpha, colour = image[..., -1], image[..., :-1]
    if colour.shape[2] == 1 or _channels_agree(colour):
        colour = colour[..., :1]
    top = (1 << 8 * image.itemsize) - 1
    if int(alpha.min()) < top:
        colour = np.rint(colour.astype(np.float64) * (alpha[..., None].astype(np.float64) / top)).astype(image.dtype)
    return np.ascontiguousarray(colour[..., 0] if colour.shape[2] == 1 else colour)
