"""DICOM objects: parse, refuse what is no picture, read pixels, display, spacing and keyed pseudonyms."""

from __future__ import annotations

import logging
import warnings
import zlib
from io import BytesIO

import pydicom
from pydicom import config as pydicom_config
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.burned_in import may_contain_text
from medvision_ray.imaging.codecs import Family
from medvision_ray.imaging.dicom_display import is_for_processing, read_display
from medvision_ray.imaging.dicom_geometry import read_geometry, read_spacing
from medvision_ray.imaging.dicom_header import element, read_pixel_header, text
from medvision_ray.imaging.dicom_pixels import read_pixels, read_reduced
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.header_fields import FIELD_KEYWORDS, read_header_fields
from medvision_ray.imaging.header_terms import MODALITIES
from medvision_ray.imaging.image import MedicalImage, SubjectKeys
from medvision_ray.privacy import Pseudonymiser

# pydicom warns and logs with the values of elements, which can be a patient's name.
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")

_DEFLATED = "1.2.840.10008.1.2.1.99"
_USUAL_RATIO = 8
_COUNTED_BYTES = 1 << 20
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_NOT_PICTURES = frozenset(
    (
        "1.2.840.10008.5.1.4.1.1.66.4",  # segmentation
        "1.2.840.10008.5.1.4.1.1.66.7",  # label map segmentation
        "1.2.840.10008.5.1.4.1.1.481.2",  # dose grid
    )
)
# Only these are parsed, which is faster, and most of what a header says of a patient never enters memory as a value.
_WANTED = (
    "SOPClassUID Modality PatientID IssuerOfPatientID StudyInstanceUID SeriesInstanceUID SamplesPerPixel "
    "PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated BitsStored "
    "HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit FloatPixelPaddingValue "
    "FloatPixelPaddingRangeLimit DoubleFloatPixelPaddingValue DoubleFloatPixelPaddingRangeLimit "
    "PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing RescaleIntercept RescaleSlope RescaleType "
    "WindowCenter WindowWidth VOILUTFunction ModalityLUTSequence VOILUTSequence PresentationLUTShape "
    "RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor "
    "RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData "
    "SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData "
    "SegmentedBluePaletteColorLookupTableData ImageType PixelSpacingCalibrationType ImagePositionPatient "
    "ImageOrientationPatient FrameOfReferenceUID SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence PixelData FloatPixelData DoubleFloatPixelData "
    "BurnedInAnnotation ConversionType PresentationIntentType PixelIntensityRelationshipSign"
)
_TAGS: list[int | str | tuple[int, int]] = [int(pydicom.tag.Tag(keyword)) for keyword in _WANTED.split()]
_FIELD_TAGS = [*_TAGS, *(int(pydicom.tag.Tag(keyword)) for keyword in FIELD_KEYWORDS)]


def looks_like_dicom(data: bytes) -> bool:
    """Whether the content is DICOM: the `DICM` prefix, or a data set that starts with group 0002 or 0008 without it."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 16 or data[:4] == b"\0\0\0\0":
        return False
    little = data[0] in (0x02, 0x08) and data[1] == 0 and data[3] == 0
    big = data[0] == 0 and data[1] == 0x08 and data[2] == 0
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    return (little and (explicit or int.from_bytes(data[4:8], "little") < len(data))) or (big and explicit)


def decode_dicom(
    data: bytes,
    config: DecodeConfig,
    pseudonymiser: Pseudonymiser | None,
    model_size: tuple[int, int] | None = None,
) -> MedicalImage:
    """Decode a DICOM object; see `decode.decode`, which also maps what pydicom raises."""
    dataset, syntax = parse(data, config, fields=pseudonymiser is not None)
    _require_picture(dataset, data)
    if config.for_processing == "refuse" and is_for_processing(dataset):
        raise DecodeError(ErrorCode.FOR_PROCESSING)
    header = read_pixel_header(dataset, syntax, config)
    modality = text(dataset, "Modality").upper()
    modality = modality if modality in MODALITIES else "OT"  # a name fits into the field as well as a code
    display, frame_display = read_display(dataset, header, modality)
    colour = header.frame.samples > 1 or header.frame.photometric == "PALETTE COLOR"
    suspect = may_contain_text(dataset, modality, text(dataset, "SOPClassUID"), colour=colour)
    spacing, spacing_source = read_spacing(dataset, modality)
    geometry, slice_order = read_geometry(dataset, header.frames)
    if header.family is Family.JPEG_2000:
        _share_pixels(dataset, data)
    reduced = read_reduced(dataset, header, model_size) if model_size else None
    return MedicalImage(
        pixels=read_pixels(dataset, header) if reduced is None else reduced,
        modality=modality,
        display=display,
        spacing_mm=spacing,
        spacing_source=spacing_source,
        geometry=geometry,
        slice_order=slice_order,
        frame_display=frame_display,
        keys=_subject_keys(dataset, pseudonymiser),
        header=read_header_fields(dataset, pseudonymiser, may_contain_text=suspect),
        source_format="dicom",
        source_shape=None if reduced is None else (header.frame.rows, header.frame.columns),
    )


def parse(data: bytes, config: DecodeConfig, *, fields: bool = False) -> tuple[Dataset, str]:
    """Parse the elements that decoding needs.

    Args:
        fields: those of `header_fields` too.

    Returns:
        The data set, and its transfer syntax or an empty text where the file names none.

    Raises:
        DecodeError: DECOMPRESSION_BOMB or TRUNCATED for a deflated data set.
    """
    syntax, body = _meta_header(data)
    tags = _FIELD_TAGS if fields else _TAGS
    if syntax == _DEFLATED:  # pydicom would inflate all of it, however much that is
        inflated = _inflate(memoryview(data)[body:], config.max_decoded_bytes)
        dataset = read_dataset(BytesIO(inflated), False, True, specific_tags=tags)
        dataset.set_original_encoding(False, True)
        return dataset, syntax
    parsed = pydicom.dcmread(BytesIO(data), force=True, specific_tags=tags)
    return parsed, text(parsed.file_meta, "TransferSyntaxUID")


def _meta_header(data: bytes) -> tuple[str, int]:
    """Transfer syntax and end of the file meta group (DICOM PS3.10 7.1), empty and 0 where there is none."""
    position = 132 if data[128:132] == b"DICM" else 0
    syntax = ""
    while data[position : position + 2] == b"\x02\x00":
        kind = data[position + 4 : position + 6]
        if kind in (b"OB", b"UN", b"OW", b"SQ", b"UT"):
            start, length = position + 12, int.from_bytes(data[position + 8 : position + 12], "little")
        else:
            start, length = position + 8, int.from_bytes(data[position + 6 : position + 8], "little")
        if data[position + 2 : position + 4] == b"\x10\x00":
            syntax = data[start : start + length].decode("ascii", "replace").strip(" \0")
        position = start + length
    return syntax, position


def _inflate(compressed: memoryview, limit: int) -> bytes:
    """Inflate a data set of at most `limit` bytes.

    Past the usual ratio the rest is counted before any of it is kept: a bomb costs time, never memory.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(compressed, _USUAL_RATIO * len(compressed) + 1)
    if inflater.unconsumed_tail:
        counter, total, tail = inflater.copy(), len(inflated), inflater.unconsumed_tail
        while tail and not counter.eof and total <= limit:
            total += len(counter.decompress(tail, _COUNTED_BYTES))
            tail = counter.unconsumed_tail
        if total <= limit:
            inflated += inflater.decompress(inflater.unconsumed_tail)
        else:
            raise DecodeError(ErrorCode.DECOMPRESSION_BOMB, limit_bytes=limit)
    if len(inflated) > limit:
        raise DecodeError(ErrorCode.DECOMPRESSION_BOMB, limit_bytes=limit)
    if not inflater.eof:
        raise DecodeError(ErrorCode.TRUNCATED, inflated_bytes=len(inflated))
    return inflated


def _share_pixels(dataset: Dataset, data: bytes) -> None:
    """Let go of pydicom's copy of the pixel data for a view of the object's own bytes.

    For JPEG 2000, of which OpenJPEG makes 32-bit samples and copies of its own: it takes the most memory of all.
    """
    raw = dataset.get_item("PixelData")
    if isinstance(raw, RawDataElement) and isinstance(raw.value, bytes):
        view = memoryview(data)[raw.value_tell : raw.value_tell + len(raw.value)]
        if view == raw.value:
            dataset[raw.tag] = raw._replace(value=view)


def _require_picture(dataset: Dataset, data: bytes) -> None:
    sop_class = text(dataset, "SOPClassUID") or text(
        getattr(dataset, "file_meta", Dataset()), "MediaStorageSOPClassUID"
    )
    if sop_class == _WHOLE_SLIDE:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, kind="whole_slide")
    if sop_class in _NOT_PICTURES:
        raise DecodeError(ErrorCode.NOT_AN_IMAGE)
    if any(keyword in dataset for keyword in _PIXEL_KEYWORDS):
        return
    if sop_class and "Image Storage" not in UID(sop_class).name:
        raise DecodeError(ErrorCode.NOT_AN_IMAGE)
    if data[128:132] != b"DICM" and not any(keyword in dataset for keyword in ("Rows", "Modality", "StudyInstanceUID")):
        raise DecodeError(ErrorCode.UNSUPPORTED_FORMAT)  # only its first bytes looked like DICOM
    # pydicom drops an element of undefined length that the end of the file cuts off
    cut = any(data.rfind(tag) > 132 for tag in _PIXEL_TAGS)
    raise DecodeError(ErrorCode.TRUNCATED if cut else ErrorCode.NO_PIXELS)


def _subject_keys(dataset: Dataset, pseudonymiser: Pseudonymiser | None) -> SubjectKeys:
    if pseudonymiser is None:
        return SubjectKeys()
    patient, issuer, study, series = (
        str(element(dataset, keyword) or "").strip(" \0")
        for keyword in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID")
    )
    return SubjectKeys(
        patient_key=pseudonymiser.patient(patient, issuer) if patient else None,
        study_key=pseudonymiser.study(study) if study else None,
        series_key=pseudonymiser.series(series) if series else None,
    )
