"""The decoding processes' task for the viewer: an object, or the slices of a series, to frames for a browser."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.volume import decode_series
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.serving.pixel_format import encode, header_of, ready_to_send

_held: dict[bytes, tuple[MedicalImage, dict[str, Any]]] = {}
"""The image that this process decoded last, so that more frames of a long file do not decode it again."""


def asked_for(parts: Sequence[bytes], first: int, budget_bytes: int, session: str = "") -> tuple[bytes, dict[str, Any]]:
    """The task's object and options.

    Args:
        parts: the object, or each slice of a series.
        first: index of the first frame wanted.
        budget_bytes: most bytes of pixels in the answer.
        session: keys the pseudonym by which slices of a series find one another; empty leaves it out.
    """
    sizes = [len(part) for part in parts]
    options = {"sizes": sizes, "first": first, "budget_bytes": budget_bytes, "session": session}
    return parts[0] if len(parts) == 1 else b"".join(parts), options


def pixels(data: bytes, options: dict[str, Any], limits: DecodeConfig) -> tuple[dict[str, Any], bytes]:
    """Decode, and encode some frames.

    Args:
        data: the object, or the slices of a series one after another.
        options: as `asked_for` makes them.

    Returns:
        No facts, and the answer in `pixel_format`.

    Raises:
        DecodeError: as in scoring; UNSUPPORTED_SHAPE where there is no frame `first`.
    """
    key = hashlib.sha256(data).digest() + f"{options['session']} {options['sizes']}".encode()
    if key not in _held:
        _held.clear()  # let go before the next one takes its memory
        image = ready_to_send(_decoded(data, options["sizes"], options["session"], limits))
        _held[key] = image, header_of(image)
    image, header = _held[key]
    if options["first"] >= image.frames:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, frames=image.frames, first=options["first"])
    return {}, encode(image, header, options["first"], options["budget_bytes"])


def _decoded(data: bytes, sizes: list[int], session: str, limits: DecodeConfig) -> MedicalImage:
    names = Pseudonymiser(hashlib.sha256(session.encode()).digest()) if session else None
    if len(sizes) == 1:
        return decode(data, limits, names)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return decode_series((data[end - size : end] for size, end in zip(sizes, ends, strict=True)), limits, names)
