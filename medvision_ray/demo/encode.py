"""Write phantom pictures as the files a hospital has: DICOM of four kinds, NIfTI, PNG, JPEG."""

from __future__ import annotations

import gzip
import io
import uuid
from dataclasses import dataclass

import cv2
import imagecodecs
import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from medvision_ray.demo.phantom import FloatImage

_DX = "1.2.840.10008.5.1.4.1.1.1.1"
_CR = "1.2.840.10008.5.1.4.1.1.1"
_CT = "1.2.840.10008.5.1.4.1.1.2"
_MR = "1.2.840.10008.5.1.4.1.1.4"
_ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_XRAY_MAX = 4095
_MR_MAX = 1800
_WINDOW_LOW_HU, _WINDOW_HIGH_HU = -160.0, 240.0
_BLACK = 0.05


@dataclass(frozen=True)
class Subject:
    """A phantom patient, with the identifiers that no output of a job may hold.

    Attributes:
        name: value of PatientName, and of a NIfTI header's description.
        patient_id: value of PatientID.
        accession: value of AccessionNumber.
        number: makes UIDs differ between patients of one archive.
        seed: makes UIDs differ between archives.
    """

    name: str
    patient_id: str
    accession: str
    number: int
    seed: int

    def uid(self, *parts: object) -> str:
        """A valid UID (2.25 and a UUID, DICOM PS3.5 B.2) that depends on the seed, patient and parts alone."""
        name = "/".join(str(part) for part in ("medvision_ray phantom", self.seed, self.number, *parts))
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def to_hounsfield(picture: FloatImage) -> NDArray[np.int16]:
    """HU that display as this picture under the soft-tissue window (centre 40, width 400).

    The darkest twentieth spreads down to air at -1000 HU, all of which that window shows black.
    """
    tissue = _WINDOW_LOW_HU + picture * (_WINDOW_HIGH_HU - _WINDOW_LOW_HU)
    dark_top = _WINDOW_LOW_HU + _BLACK * (_WINDOW_HIGH_HU - _WINDOW_LOW_HU)
    air = -1000.0 + picture / _BLACK * (dark_top + 1000.0)
    return np.rint(np.where(picture < _BLACK, air, tissue)).astype(np.int16)


def xray_dicom(subject: Subject, index: int, picture: FloatImage, *, digital: bool, inverted: bool) -> bytes:
    """A chest film as DX (with a window and a presentation shape) or CR (with neither).

    Args:
        index: number of the object among the patient's.
        picture: display values in [0, 1], shape `(H, W)`; stored in 12 bits.
        inverted: MONOCHROME1, stored so that it displays the same.
    """
    stored = np.rint(picture * _XRAY_MAX).astype(np.uint16)
    if inverted:
        stored = np.asarray(_XRAY_MAX - stored, dtype=np.uint16)
    data = _object(subject, index, _DX if digital else _CR, "DX" if digital else "CR")
    data.BodyPartExamined = "CHEST"
    data.ViewPosition = "PA"
    data.PatientOrientation = ["L", "F"]
    spacing = _spacing(430.0, picture)
    if digital:
        data.ImageType = ["ORIGINAL", "PRIMARY", ""]
        data.PresentationIntentType = "FOR PRESENTATION"
        data.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
        data.PixelIntensityRelationship = "LOG"
        data.PixelIntensityRelationshipSign = 1 if inverted else -1
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = 0, 1, "US"
        data.WindowCenter, data.WindowWidth = 2048, 4096
        data.ImageLaterality = "U"
        data.AnatomicRegionSequence = _one(CodeValue="51185008", CodingSchemeDesignator="SCT", CodeMeaning="Chest")
        data.AcquisitionContextSequence = Sequence()
        data.PositionerType = ""
        data.BurnedInAnnotation = "NO"
        data.LossyImageCompression = "00"
        data.DetectorType = "DIRECT"
    data.ImagerPixelSpacing = spacing
    data.PixelSpacing = spacing
    _set_pixels(data, stored, bits=12, inverted=inverted)
    return _to_bytes(data)


def ct_dicom(subject: Subject, index: int, picture: FloatImage, *, signed: bool, compressed: bool) -> bytes:
    """A chest slice in HU: signed, or unsigned over an intercept of -1024; JPEG-LS where asked."""
    hounsfield = to_hounsfield(picture)
    data = _object(subject, index, _CT, "CT")
    data.BodyPartExamined = "CHEST"
    data.KVP = "120"
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = (0 if signed else -1024), 1, "HU"
    data.WindowCenter, data.WindowWidth = 40, 400
    _set_plane(data, picture, subject.uid("space", index), field_mm=360.0)
    stored = hounsfield if signed else (hounsfield + 1024).astype(np.uint16)
    _set_pixels(data, stored, bits=16 if signed else 12)
    if compressed:
        data.PixelData = encapsulate([imagecodecs.jpegls_encode(stored)])
        data["PixelData"].VR = "OB"
        data.file_meta.TransferSyntaxUID = JPEGLSLossless
    return _to_bytes(data)


def mr_dicom(subject: Subject, index: int, picture: FloatImage) -> bytes:
    """A head slice as a single-frame MR object without a window."""
    data = _object(subject, index, _MR, "MR")
    data.BodyPartExamined = "HEAD"
    data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "SE", "NONE", ""
    data.MRAcquisitionType = "2D"
    data.RepetitionTime, data.EchoTime, data.EchoTrainLength = "4000", "90", "8"
    _set_plane(data, picture, subject.uid("space", index), field_mm=240.0)
    _set_pixels(data, np.rint(picture * _MR_MAX).astype(np.uint16), bits=12)
    return _to_bytes(data)


def multiframe_dicom(subject: Subject, index: int, pictures: FloatImage) -> bytes:
    """Head slices, shape `(frames, H, W)`, as one enhanced MR object.

    The functional groups that place and scale the frames are there (DICOM PS3.3 C.7.6.16); those
    that describe the acquisition are not.
    """
    data = _object(subject, index, _ENHANCED_MR, "MR")
    data.ImageType = ["ORIGINAL", "PRIMARY", "T2", "NONE"]
    data.BodyPartExamined = "HEAD"
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = subject.uid("space", index), ""
    data.NumberOfFrames = len(pictures)
    data.BurnedInAnnotation = "NO"
    data.PresentationLUTShape = "IDENTITY"
    plane = _item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    measures = _item(PixelSpacing=_spacing(240.0, pictures[0]), SliceThickness=5)
    scale = _item(RescaleIntercept=0, RescaleSlope=1, RescaleType="US")
    data.SharedFunctionalGroupsSequence = _one(
        PixelMeasuresSequence=Sequence([measures]),
        PlaneOrientationSequence=Sequence([plane]),
        PixelValueTransformationSequence=Sequence([scale]),
        FrameVOILUTSequence=_one(WindowCenter=_MR_MAX / 2, WindowWidth=_MR_MAX),
    )
    data.PerFrameFunctionalGroupsSequence = Sequence(
        _item(
            FrameContentSequence=_one(StackID="1", InStackPositionNumber=number),
            PlanePositionSequence=_one(ImagePositionPatient=[-120, -120, 5 * number]),
        )
        for number in range(1, len(pictures) + 1)
    )
    _set_pixels(data, np.rint(pictures * _MR_MAX).astype(np.uint16), bits=12)
    return _to_bytes(data)


def nifti(subject: Subject, pictures: FloatImage) -> bytes:
    """Head slices, shape `(frames, H, W)`, as a compressed NIfTI volume in int16.

    Rows run to posterior and columns to the patient's left, as in DICOM, so that the file's axes
    `(i, j, k)` are left, posterior, superior.
    """
    values = np.rint(pictures * _MR_MAX).astype(np.int16).transpose(2, 1, 0)
    side = 240.0 / pictures.shape[2]
    image = nibabel.Nifti1Image(values, np.diag([-side, -side, 5.0, 1.0]))
    image.header["descrip"] = subject.name.encode()
    image.header.set_xyzt_units("mm")
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=1, mtime=0) as stream:
        stream.write(image.to_bytes())
    return packed.getvalue()


def png(picture: FloatImage | NDArray[np.bool_], *, bits: int = 8) -> bytes:
    """A grey PNG of 8 or 16 bits; a mask comes out as 0 and 255."""
    dtype = np.uint8 if bits == 8 else np.uint16
    return _encode_raster(".png", np.rint(picture * float(np.iinfo(dtype).max)).astype(dtype))


def jpeg(picture: FloatImage) -> bytes:
    """A grey baseline JPEG."""
    return _encode_raster(".jpg", np.rint(picture * 255.0).astype(np.uint8), cv2.IMWRITE_JPEG_QUALITY, 92)


def pixelless_dicom(subject: Subject, index: int) -> bytes:
    """A CT object whose pixels never arrived."""
    data = _object(subject, index, _CT, "CT")
    data.Rows, data.Columns = 256, 256
    return _to_bytes(data)


def absurd_dicom(subject: Subject, index: int) -> bytes:
    """A CR object whose header promises 65535 x 65535 pixels over 64 bytes."""
    data = _object(subject, index, _CR, "CR")
    _set_pixels(data, np.zeros((4, 8), dtype=np.uint16), bits=12)
    data.Rows, data.Columns = 65535, 65535
    return _to_bytes(data)


def _object(subject: Subject, index: int, sop_class: str, modality: str) -> Dataset:
    """Patient, study, series and equipment of an object, with its file header."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = sop_class
    data.file_meta.MediaStorageSOPInstanceUID = subject.uid("object", index)
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID, data.SOPInstanceUID = sop_class, subject.uid("object", index)
    data.PatientName, data.PatientID = subject.name, subject.patient_id
    data.PatientBirthDate, data.PatientSex = "19010101", "O"
    data.StudyInstanceUID, data.SeriesInstanceUID = subject.uid("study"), subject.uid("series", index)
    data.StudyDate = data.ContentDate = data.AcquisitionDate = "20200102"
    data.StudyTime = data.ContentTime = data.AcquisitionTime = "030405"
    data.StudyID, data.AccessionNumber = "1", subject.accession
    data.ReferringPhysicianName = "PHANTOM^DOCTOR"
    data.Manufacturer, data.InstitutionName = "medvision_ray", "PHANTOM HOSPITAL"
    data.ManufacturerModelName, data.DeviceSerialNumber, data.SoftwareVersions = "Phantom", "1", "1"
    data.Modality = modality
    if modality in ("CT", "MR"):
        data.PatientPosition = "HFS"
    data.SeriesNumber, data.InstanceNumber, data.AcquisitionNumber = index + 1, 1, 1
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality == "CT" else ["ORIGINAL", "PRIMARY", "OTHER"]
    return data


def _set_plane(data: Dataset, picture: FloatImage, space: str, field_mm: float) -> None:
    data.FrameOfReferenceUID = space
    data.PositionReferenceIndicator = ""
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [-field_mm / 2, -field_mm / 2, 0]
    data.SliceThickness = 5
    data.PixelSpacing = _spacing(field_mm, picture)


def _set_pixels(data: Dataset, stored: NDArray[np.integer], *, bits: int, inverted: bool = False) -> None:
    """Set the Image Pixel module (DICOM PS3.3 C.7.6.3) from shape `(H, W)` or `(frames, H, W)`."""
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    data.Rows, data.Columns = stored.shape[-2:]
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()


def _spacing(field_mm: float, picture: FloatImage) -> list[float]:
    return [field_mm / picture.shape[0]] * 2


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def _one(**elements: object) -> Sequence:
    return Sequence([_item(**elements)])


def _to_bytes(data: Dataset) -> bytes:
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _encode_raster(suffix: str, values: NDArray[np.integer], *options: int) -> bytes:
    done, encoded = cv2.imencode(suffix, values, options)
    if not done:
        raise RuntimeError(f"OpenCV could not write {suffix} of shape {values.shape} and type {values.dtype}.")
    return bytes(encoded.tobytes())
