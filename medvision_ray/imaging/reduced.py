"""JPEG 2000 and JPEG at a lower resolution, for models that see far less than the file holds; off by default.

Of JPEG 2000 the wavelet's own coarser image is decoded and the finest details are never unpacked, which is what
costs. It is Pillow that can do that with OpenJPEG; imagecodecs always decodes all. Of 8-bit JPEG libjpeg
computes fewer pixels a block, through OpenCV. Neither is quite the mean over pixels that resizing takes:
prepared pixels differ a little from those of the whole image.
"""

from __future__ import annotations

from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from medvision_ray.imaging.codestream import Buffer, CodestreamInfo, bare_jpeg2000
from medvision_ray.imaging.errors import DecodeError, ErrorCode

MARGIN = 2
"""How many times the model's input the decoded sides are at least, so that resizing has something to average."""
MOST_JPEG_HALVINGS = 3
_MOST_HALVINGS = 5
_GREY_FLAGS = (-1, cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_GRAYSCALE_8)
_COLOUR_FLAGS = (-1, cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_COLOR_8)


def halvings(rows: int, columns: int, model_size: tuple[int, int]) -> int:
    """How often both sides can be halved and still be `MARGIN` times the model's.

    Examples:
        >>> halvings(2048, 2048, (224, 224)), halvings(512, 512, (224, 224))
        (2, 0)
    """
    found = 0
    while found < _MOST_HALVINGS and all(
        side >> (found + 1) >= MARGIN * wanted for side, wanted in zip((rows, columns), model_size, strict=True)
    ):
        found += 1
    return found


def decode_halved_jpeg(data: bytes, info: CodestreamInfo, times: int) -> NDArray[np.uint8]:
    """An 8-bit JPEG with its sides halved up to three times and rounded up, upright as its EXIF says.

    Returns:
        Grey `(rows, columns)` of one component, else BGR `(rows, columns, 3)`.

    Raises:
        DecodeError: UNSUPPORTED_ENCODING for other JPEG, CORRUPT.
    """
    if info.precision != 8 or info.lossless or not 1 <= times <= MOST_JPEG_HALVINGS:
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, bits=info.precision)
    flags = _GREY_FLAGS if info.components == 1 else _COLOUR_FLAGS
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags[times])
    if image is None:
        raise DecodeError(ErrorCode.CORRUPT)
    return np.asarray(image, np.uint8)


def decode_halved(data: Buffer, info: CodestreamInfo, times: int) -> NDArray[np.generic]:
    """The coarser image of a codestream of one component, its sides halved `times` times and rounded up.

    Returns:
        Samples as imagecodecs would give them: int16 or int8 where the codestream is signed, else uint16 or uint8.

    Raises:
        DecodeError: UNSUPPORTED_ENCODING where there is no such image, in which case the whole one may be decoded.
        Exception: what Pillow raises on damaged data, on fewer resolutions than that, and on sizes that
            it rounds down where OpenJPEG rounds up.
    """
    if info.components != 1 or info.precision > 16:
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, components=info.components, bits=info.precision)
    # Not by `Image.open`, which would try other formats and has a limit of its own beside the configured one.
    image = Jpeg2KImageFile(BytesIO(bare_jpeg2000(data)))
    image.reduce = times
    scaled = np.asarray(image)
    size = tuple(-(-side // (1 << times)) for side in (info.rows, info.columns))
    if scaled.shape != size or scaled.dtype not in (np.uint8, np.uint16):
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, dimensions=scaled.ndim)
    # Pillow shifts samples up to the full range and signed ones by half of it.
    samples: NDArray[np.generic] = np.right_shift(scaled, 8 * scaled.itemsize - info.precision)
    if not info.signed:
        return samples
    return (samples.astype(np.int32) - (1 << (info.precision - 1))).astype(f"i{scaled.itemsize}")
