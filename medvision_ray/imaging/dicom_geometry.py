"""What a DICOM object says of its pixels' size and place: top level and functional groups."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medvision_ray.imaging.dicom_header import element, items, numbers, text
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.geometry import Geometry, SpacingSource, stack_slices

_PROJECTION = ("CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA")
_SLICES = ("CT", "MR", "PT", "NM")
_UNIT_TOLERANCE = 1e-2

_TAGS = {
    keyword: Tag(keyword)
    for keyword in (
        "ImageType",
        "FrameOfReferenceUID",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "ImagerPixelSpacing",
        "NominalScannedPixelSpacing",
    )
}

Spacing = tuple[float, float]


def read_spacing(dataset: Dataset, modality: str) -> tuple[Spacing | None, SpacingSource]:
    """Distance between rows and between columns in mm, and where it holds (DICOM PS3.3 10.7.1).

    PixelSpacing is true in a slice. In a projection it is true where it is calibrated: where it says
    so, or differs from ImagerPixelSpacing. One that repeats ImagerPixelSpacing is at the detector; of
    one that stands alone it cannot be told. Ultrasound has a spacing a region, which is not guessed.
    """
    grouped = _grouped_spacings(dataset)
    if len(grouped) > 1:  # frames differ: no one spacing holds for the object
        return None, SpacingSource.NONE
    if grouped:
        slices = modality not in _PROJECTION or _has_planes(dataset)  # tomosynthesis has slices
        return grouped.pop(), SpacingSource.PIXEL_SPACING if slices else SpacingSource.UNVERIFIED
    spacing, imager = _pair(dataset, "PixelSpacing"), _pair(dataset, "ImagerPixelSpacing")
    if spacing is not None:
        return spacing, _source(dataset, modality, spacing, imager)
    if imager is not None:
        return imager, SpacingSource.IMAGER
    nominal = _pair(dataset, "NominalScannedPixelSpacing")
    return (nominal, SpacingSource.NOMINAL_SCANNED) if nominal else (None, SpacingSource.NONE)


def read_geometry(dataset: Dataset, frames: int) -> tuple[Geometry | None, tuple[int, ...]]:
    """Where the object's frames lie.

    Returns:
        The geometry, None where a frame has no place or the frames make no even stack; and the
        frames in order along the normal where they do, else empty.
    """
    if is_mosaic(dataset):
        return None, ()
    shared = tuple(items(dataset, "SharedFunctionalGroupsSequence")[:1])
    groups = items(dataset, "PerFrameFunctionalGroupsSequence")[:frames]
    if frames == 1:
        return _slice((*groups, *shared, dataset), _space(dataset)), ()
    if len(groups) < frames:
        return None, ()
    space = _space(dataset)
    slices = [_slice((group, *shared), space) for group in groups]
    placed = [item for item in slices if item is not None]
    if len(placed) < frames:
        return None, ()
    try:
        order, geometry = stack_slices(placed)
    except DecodeError:  # several stacks, or repeats in time: each frame is still an image
        return None, ()
    return geometry, order


def is_mosaic(dataset: Dataset) -> bool:
    """Whether one frame shows the slices of a volume side by side (Siemens): its position is then no slice's."""
    raw = _raw(dataset, "ImageType")
    return b"MOSAIC" in raw if raw is not None else "MOSAIC" in image_kinds(dataset)


def image_kinds(dataset: Dataset) -> set[str]:
    """The values of ImageType (DICOM PS3.3 C.7.6.1.1.2)."""
    kinds = element(dataset, "ImageType")
    return {str(kind) for kind in kinds} if isinstance(kinds, Sequence) and not isinstance(kinds, str) else {str(kinds)}


def _source(dataset: Dataset, modality: str, spacing: Spacing, imager: Spacing | None) -> SpacingSource:
    if modality in _SLICES or "ImageOrientationPatient" in dataset:
        return SpacingSource.PIXEL_SPACING
    if text(dataset, "PixelSpacingCalibrationType").upper() in ("GEOMETRY", "FIDUCIAL"):
        return SpacingSource.CALIBRATED
    if imager is None:
        return SpacingSource.UNVERIFIED
    same = all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(spacing, imager, strict=True))
    return SpacingSource.IMAGER if same else SpacingSource.CALIBRATED


def _grouped_spacings(dataset: Dataset) -> set[Spacing]:
    """The distinct PixelSpacing of the per-frame functional groups, else of the shared one (DICOM PS3.3 C.7.6.16.2.1)."""
    for group in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        measures = (part for item in items(dataset, group) for part in items(item, "PixelMeasuresSequence")[:1])
        found = {spacing for spacing in (_pair(part, "PixelSpacing") for part in measures) if spacing is not None}
        if found:
            return found
    return set()


def _has_planes(dataset: Dataset) -> bool:
    groups = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
    return any("PlaneOrientationSequence" in item for group in groups for item in items(dataset, group)[:1])


def _slice(places: tuple[Dataset, ...], space: str) -> Geometry | None:
    """A frame's place: each part out of the first data set that has it."""
    position = _first(places, "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = _first(places, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _first(places, "PixelMeasuresSequence", "PixelSpacing", 2)
    if not position or not orientation or not spacing or min(spacing) <= 0:
        return None
    across, down = orientation[:3], orientation[3:]
    lengths = math.hypot(*across), math.hypot(*down)
    slant = sum(one * other for one, other in zip(across, down, strict=True))
    if any(abs(length - 1) > _UNIT_TOLERANCE for length in lengths) or abs(slant) > _UNIT_TOLERANCE:
        return None
    return Geometry(
        origin_lps_mm=(position[0], position[1], position[2]),
        across_lps=(across[0] / lengths[0], across[1] / lengths[0], across[2] / lengths[0]),
        down_lps=(down[0] / lengths[1], down[1] / lengths[1], down[2] / lengths[1]),
        spacing_mm=(spacing[0], spacing[1]),
        space=space,
    )


def _first(places: tuple[Dataset, ...], sequence: str, keyword: str, count: int) -> tuple[float, ...]:
    for place in places:
        for holder in (place, *items(place, sequence)[:1]):
            values = _decimals(holder, keyword)
            if len(values) == count:
                return values
    return ()


def _space(dataset: Dataset) -> str:
    """The frame of reference as a short digest: enough to tell two of them apart."""
    uid = _raw(dataset, "FrameOfReferenceUID") or text(dataset, "FrameOfReferenceUID").encode()
    uid = uid.strip(b" \0")
    return hashlib.sha256(uid).hexdigest()[:16] if uid else ""


def _pair(dataset: Dataset, keyword: str) -> Spacing | None:
    values = _decimals(dataset, keyword)
    return (values[0], values[1]) if len(values) == 2 and min(values) > 0 else None


def _decimals(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """`numbers` of a decimal string, from its bytes where they are as read: a tenth of the time."""
    raw = _raw(dataset, keyword)
    if raw is None:
        return numbers(dataset, keyword)
    try:
        values = tuple([float(part) for part in raw.strip(b" \0").split(b"\\")])
    except ValueError:
        return numbers(dataset, keyword)
    return values if all(map(math.isfinite, values)) else ()


def _raw(dataset: Dataset, keyword: str) -> bytes | None:
    """An element's bytes as they were read; None where it is absent, or converted already."""
    found = dataset.get_item(_TAGS[keyword])
    value = found.value if isinstance(found, RawDataElement) else None
    return value if isinstance(value, bytes) else None
