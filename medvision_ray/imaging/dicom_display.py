"""What a DICOM object says of its display, top level and functional groups."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from medvision_ray.imaging.dicom_header import PixelHeader, element, items, numbers, text
from medvision_ray.imaging.image import Display, LookupTable, VoiFunction, Window


def read_display(dataset: Dataset, header: PixelHeader, modality: str) -> tuple[Display, tuple[Display, ...]]:
    """The display chain of the object, and of each frame where frames differ.

    Frames take it from the per-frame functional groups, then the shared ones, then the top level
    (DICOM PS3.3 C.7.6.16.2.9 and .10). Colour has no chain.
    """
    if header.frame.samples > 1 or header.frame.photometric == "PALETTE COLOR":
        return Display(), ()
    shared = (items(dataset, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    groups = items(dataset, "PerFrameFunctionalGroupsSequence")[: header.frames]
    if len(groups) < header.frames:
        groups = []
    if not groups:
        return _display((shared, dataset), dataset, header, modality), ()
    frames = tuple(_display((group, shared, dataset), dataset, header, modality) for group in groups)
    return frames[0], frames if any(_differs(frames[0], other) for other in frames[1:]) else ()


def _differs(one: Display, other: Display) -> bool:
    if one.modality_lut is not None or one.voi_lut is not None or other.modality_lut or other.voi_lut:
        return True  # tables do not compare; taking them as different only costs the shortcut
    return one != other


def _display(places: tuple[Dataset, ...], dataset: Dataset, header: PixelHeader, modality: str) -> Display:
    rescale = _first(places, "PixelValueTransformationSequence", "RescaleSlope")
    voi = _first(places, "FrameVOILUTSequence", "WindowCenter", "VOILUTSequence")
    signed = header.frame.signed
    slope = (numbers(rescale, "RescaleSlope") or (1.0,))[0]
    intercept = (numbers(rescale, "RescaleIntercept") or (0.0,))[0]
    modality_lut = _lookup_table(dataset, "ModalityLUTSequence", header, signed)
    return Display(
        slope=slope or 1.0,  # a slope of 0 would erase the image
        intercept=intercept,
        modality_lut=modality_lut,
        window=_window(voi),
        voi_lut=_lookup_table(voi, "VOILUTSequence", header, signed or intercept < 0),
        hounsfield=modality == "CT" and modality_lut is None and _in_hounsfield(rescale),
        invert=_inverted(dataset, header),
        padding=_padding(dataset, header),
    )


def is_for_processing(dataset: Dataset) -> bool:
    """Whether these are a detector's raw values, not made for viewing (DICOM PS3.3 C.8.11.1.1.1)."""
    return text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING"


def _inverted(dataset: Dataset, header: PixelHeader) -> bool:
    """Whether low values are bright (DICOM PS3.3 C.11.6, C.7.6.3.1.2).

    Raw X-rays have no presentation of their own; where they say which end of the values had less beam
    (C.8.11.3.1.2), that end is bright, as bone is on film.
    """
    sign = numbers(dataset, "PixelIntensityRelationshipSign")[:1]
    if is_for_processing(dataset) and sign in ((1.0,), (-1.0,)):
        return sign == (1.0,)
    shape = text(dataset, "PresentationLUTShape").upper()
    return shape == "INVERSE" or (not shape and header.frame.photometric == "MONOCHROME1")


def _first(places: tuple[Dataset, ...], sequence: str, *keywords: str) -> Dataset:
    for place in places[:-1]:
        for item in items(place, sequence)[:1]:
            if any(keyword in item for keyword in keywords):
                return item
    return places[-1]


def _in_hounsfield(rescale: Dataset) -> bool:
    """Whether a CT's modality values are HU: rescaled, and not said to be of another unit (DICOM PS3.3 C.11.1.1.2)."""
    unit = text(rescale, "RescaleType").upper()
    return "RescaleSlope" in rescale and unit in ("", "HU", "HU_MOD")


def _window(dataset: Dataset) -> Window | None:
    centers, widths = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    if not centers or not widths or widths[0] <= 0:
        return None
    name = text(dataset, "VOILUTFunction").upper()
    function = VoiFunction(name) if name in VoiFunction.__members__ else VoiFunction.LINEAR
    if function is VoiFunction.LINEAR and widths[0] < 1:  # not allowed for LINEAR; meant for data in small units
        function = VoiFunction.LINEAR_EXACT
    return Window(centers[0], widths[0], function)


def _lookup_table(dataset: Dataset, sequence: str, header: PixelHeader, signed: bool) -> LookupTable | None:
    """The first usable table of a sequence (DICOM PS3.3 C.11.1.1, C.11.2.1.1)."""
    for item in items(dataset, sequence):
        descriptor = numbers(item, "LUTDescriptor")
        values = _entries(element(item, "LUTData"), header.big_endian) if len(descriptor) == 3 else None
        if values is None:
            continue
        entries, first, bits = (int(x) for x in descriptor)
        entries = entries & 0xFFFF or 65536
        if bits <= 8 and values.size == entries // 2 + entries % 2:  # two 8-bit entries packed in a word
            values = values.view(np.uint8).astype(np.uint16)
        if not 1 <= bits <= 16 or values.size < entries:
            continue
        return LookupTable(first - 65536 if signed and first > 32767 else first, values[:entries], bits)
    return None


def _entries(data: Any, big_endian: bool) -> np.ndarray[Any, np.dtype[np.uint16]] | None:
    if isinstance(data, (bytes, bytearray)):
        words = np.frombuffer(data, np.dtype(">u2" if big_endian else "<u2"), len(data) // 2)
        return words.astype(np.uint16)
    try:
        return (np.atleast_1d(np.asarray(data, dtype=np.int64)) & 0xFFFF).astype(np.uint16)
    except (TypeError, ValueError, OverflowError):
        return None


def _padding(dataset: Dataset, header: PixelHeader) -> tuple[float, float] | None:
    """PixelPaddingValue up to PixelPaddingRangeLimit, in stored values (DICOM PS3.3 C.7.5.1.1.2)."""
    prefix = header.keyword.removesuffix("Data").removesuffix("Pixel")  # Float, DoubleFloat or nothing
    value = numbers(dataset, f"{prefix}PixelPaddingValue")
    limit = numbers(dataset, f"{prefix}PixelPaddingRangeLimit") or value
    if not value:
        return None
    if prefix:
        return min(value[0], limit[0]), max(value[0], limit[0])
    ends = [int(value[0]), int(limit[0])]
    half = 1 << (header.frame.bits_allocated - 1)
    for index, end in enumerate(ends):  # written with the other VR of US or SS
        if header.frame.signed and end >= half:
            ends[index] = end - 2 * half
        elif not header.frame.signed and end < 0:
            ends[index] = end + 2 * half
    return min(ends), max(ends)
