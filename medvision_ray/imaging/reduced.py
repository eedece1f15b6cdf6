"""Grey JPEG 2000 at a lower resolution, for models that see far less than the file holds; off by default.

The wavelet's own coarser image is decoded and the finest details are never unpacked, which is what costs.
It is Pillow that can do that with OpenJPEG; imagecodecs always decodes all. The coarser image is
no mean over blocks of pixels: prepared pixels differ a little from those of the whole image.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from medvision_ray.imaging.codestream import Buffer, CodestreamInfo, bare_jpeg2000
from medvision_ray.imaging.errors import DecodeError, ErrorCode

MARGIN = 2
"""How many times the model's input the decoded sides are at least, so that resizing has something to average."""
_MOST_HALVINGS = 5


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
