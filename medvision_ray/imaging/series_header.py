"""Which series a DICOM object is a slice of, told by the beginning of the object: nothing of its pixels is read."""

from __future__ import annotations

import hashlib
from io import BytesIO
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

from medvision_ray.imaging.dicom import looks_like_dicom
from medvision_ray.imaging.dicom_geometry import image_kinds
from medvision_ray.imaging.dicom_header import integer, text
from medvision_ray.imaging.errors import DecodeError

_SLICE_CLASSES = frozenset(
    (
        "1.2.840.10008.5.1.4.1.1.2",  # CT image
        "1.2.840.10008.5.1.4.1.1.4",  # MR image
        "1.2.840.10008.5.1.4.1.1.128",  # PET image
    )
)
_NO_SLICES = frozenset(("LOCALIZER", "MOSAIC"))
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_ROWS = 0x00280010
_WANTED = ("SOPClassUID", "ImageType", "StudyInstanceUID", "SeriesInstanceUID", "NumberOfFrames")
_TAGS: list[int | str | tuple[int, int]] = [int(pydicom.tag.Tag(keyword)) for keyword in _WANTED]


class MoreNeeded(Exception):  # noqa: N818 - it is no error
    """The beginning that was given ends before the elements that are wanted."""


def series_of(start: bytes, whole: bool) -> bytes | None:
    """The series of a CT, MR or PET slice, as a digest that is good for grouping and for nothing else.

    Args:
        start: the first bytes of the object.
        whole: these are all of its bytes.

    Returns:
        None for everything that is scored by itself: other classes and formats, several frames,
        localizers (which lie across the slices), mosaics, deflated data sets, damaged headers.

    Raises:
        MoreNeeded: `start` is too short to tell.
    """
    if not looks_like_dicom(start) or _DEFLATED in start[:1024]:  # a deflated data set would be inflated whole
        return None
    passed = False

    def at_pixels(tag: Any, _representation: Any, _length: int) -> bool:
        nonlocal passed
        passed = int(tag) >= _ROWS
        return passed

    try:
        found: Dataset | None = read_partial(BytesIO(start), at_pixels, force=True, specific_tags=_TAGS)
    except Exception:  # cut off or damaged, which more bytes tell apart
        found = None
    if not passed:
        if not whole:
            raise MoreNeeded
        return None
    return _digest(found) if found is not None else None


def _digest(found: Dataset) -> bytes | None:
    series, study = text(found, "SeriesInstanceUID"), text(found, "StudyInstanceUID")
    if not series or text(found, "SOPClassUID") not in _SLICE_CLASSES or _NO_SLICES & image_kinds(found):
        return None
    try:
        frames = integer(found, "NumberOfFrames", 1) or 1
    except DecodeError:
        return None
    return hashlib.sha256(f"{study}\0{series}".encode()).digest()[:16] if frames == 1 else None
