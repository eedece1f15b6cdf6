"""A series of single-slice DICOM objects to one volume: decoded, ordered by place, checked, stacked.

Slices are ordered along their normal, never by name or instance number. What makes no box without
distortion (gaps, repeats, tilt, mixed orientations or sizes) is refused with a code of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.geometry import Geometry, stack_slices
from medvision_ray.imaging.image import Display, MedicalImage
from medvision_ray.privacy import Pseudonymiser


def decode_series(
    parts: Iterable[bytes], config: DecodeConfig, pseudonymiser: Pseudonymiser | None = None
) -> MedicalImage:
    """Decode the objects of one series, in any order, to a volume.

    Args:
        parts: the objects; each is let go once it is decoded.
        config: limits of one object, and of the volume's frames and decoded bytes.

    Raises:
        DecodeError: the reason why the volume cannot be had. Of a slice that cannot be decoded
            its own code, with its number among the parts.
    """
    slices: list[MedicalImage] = []
    decoded_bytes = 0
    for number, part in enumerate(parts):
        try:
            image = decode(part, config, pseudonymiser)
        except DecodeError as error:
            raise DecodeError(error.code, error.stage, **{**error.facts, "slice": number}) from None
        if image.frames != 1:
            raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, frames=image.frames, slice=number)
        decoded_bytes += image.pixels.nbytes
        if number >= config.max_frames:
            raise DecodeError(ErrorCode.TOO_LARGE, frames=number + 1, limit=config.max_frames)
        if decoded_bytes > config.max_decoded_bytes:
            raise DecodeError(ErrorCode.TOO_LARGE, decoded_bytes=decoded_bytes, limit=config.max_decoded_bytes)
        slices.append(image)
    return stack(slices, config)


def stack(slices: Sequence[MedicalImage], config: DecodeConfig) -> MedicalImage:
    """Stack decoded single slices of one series.

    Returns:
        One image: frames from the lowest slice to the highest along the normal (for axial slices
        from feet to head), each with its own display chain where they differ, as rescale does in PET.

    Raises:
        DecodeError: see `geometry.stack_slices`; MISSING_POSITION where a slice has no place.
    """
    if not slices:
        raise DecodeError(ErrorCode.NO_PIXELS, slices=0)
    geometries = _require_places(slices)
    _require_one_size(slices)
    order, geometry = stack_slices(geometries)
    first = slices[order[0]]
    kind = np.result_type(*{image.pixels.dtype for image in slices})
    require_size(config, *first.shape, len(slices), kind.itemsize * (first.pixels.size // int(np.prod(first.shape))))
    pixels = np.empty((len(slices), *first.pixels.shape[1:]), dtype=kind)
    for place, index in enumerate(order):
        pixels[place] = slices[index].pixels[0]
    displays = tuple(slices[index].display for index in order)
    return replace(
        first,
        pixels=pixels,
        geometry=geometry,
        slice_order=tuple(range(len(slices))),
        header=replace(first.header, may_contain_text=any(image.header.may_contain_text for image in slices)),
        frame_display=() if all(_alike(displays[0], other) for other in displays[1:]) else displays,
    )


def _require_places(slices: Sequence[MedicalImage]) -> list[Geometry]:
    placed = [image.geometry for image in slices if image.geometry is not None]
    if len(placed) < len(slices):
        raise DecodeError(ErrorCode.MISSING_POSITION, slices=len(slices), missing=len(slices) - len(placed))
    return placed


def _require_one_size(slices: Sequence[MedicalImage]) -> None:
    sizes = {image.pixels.shape for image in slices}
    if len(sizes) > 1:
        raise DecodeError(ErrorCode.MIXED_SIZES, slices=len(slices), sizes=len(sizes))


def _alike(one: Display, other: Display) -> bool:
    """Whether two display chains are the same; tables do not compare, so those with any count as different."""
    if any(table is not None for display in (one, other) for table in (display.modality_lut, display.voi_lut)):
        return one is other
    return one == other
