"""MedicalImage: one decoded object, before any choice of how to show it to a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from medvision_ray.imaging.geometry import Geometry, SpacingSource
from medvision_ray.imaging.header_fields import HeaderFields


class VoiFunction(str, Enum):
    """How a window maps modality values to the display range (DICOM PS3.3 C.11.2.1.2 and .3)."""

    LINEAR = "LINEAR"
    LINEAR_EXACT = "LINEAR_EXACT"
    SIGMOID = "SIGMOID"


@dataclass(frozen=True)
class Window:
    """A window in modality units (HU for CT)."""

    center: float
    width: float
    function: VoiFunction = VoiFunction.LINEAR


@dataclass(frozen=True)
class LookupTable:
    """A modality or VOI LUT (DICOM PS3.3 C.11.1.1, C.11.2.1.1).

    Attributes:
        first: input value that the first entry belongs to; lower inputs take the first entry.
        values: entries, shape `(entries,)`; inputs past the end take the last entry.
        bits: depth of the entries as declared.
    """

    first: int
    values: NDArray[np.uint16]
    bits: int


@dataclass(frozen=True)
class Display:
    """What the file says of the way from stored values to a picture. Nothing here is applied yet.

    Attributes:
        slope: rescale slope; 1 where the file has none.
        intercept: rescale intercept; 0 where the file has none.
        modality_lut: replaces slope and intercept where present.
        window: the file's first window.
        voi_lut: the file's first VOI LUT; wins over `window` where present.
        invert: low values are bright (MONOCHROME1, or PresentationLUTShape INVERSE); applied last.
        padding: inclusive range of stored values that are padding, not tissue.
        hounsfield: a CT's modality values are HU, so that a window in HU fits them; False where the
            file has no rescale, a modality LUT, or a RescaleType of another unit.
    """

    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: LookupTable | None = None
    window: Window | None = None
    voi_lut: LookupTable | None = None
    invert: bool = False
    padding: tuple[float, float] | None = None
    hounsfield: bool = True


@dataclass(frozen=True)
class SubjectKeys:
    """Keyed pseudonyms of an object's patient, study and series; None where the file names none."""

    patient_key: str | None = None
    study_key: str | None = None
    series_key: str | None = None


@dataclass(frozen=True)
class MedicalImage:
    """One object, decoded to stored values.

    Attributes:
        pixels: stored values, shape `(frames, rows, columns)` for grey of any integer or float
            type, or `(frames, rows, columns, 3)` uint8 RGB.
        modality: DICOM modality code (`CT`, `MR`, `DX`, ...), or `OT` where the format names none.
        display: the file's own display chain.
        spacing_mm: distance between rows and between columns in mm; `spacing_source` says where it holds.
        spacing_source: where it comes from; `true_in_patient` where areas may be computed with it.
        geometry: where the pixels lie, slices in `slice_order` (of a single slice: as it is); None where
            that is not known.
        slice_order: frames from the lowest to the highest along the slices' normal, where they are an
            even stack of slices; else empty, and frames are no neighbours of one another.
        frame_display: one `Display` a frame where frames differ (enhanced multi-frame), else empty.
        keys: keyed pseudonyms.
        header: what else of the header may enter tables.
        source_format: `dicom`, `nifti`, `png`, `jpeg`, `tiff` or `bmp`.
        source_shape: rows and columns of the file, where `pixels` are of a lower resolution; spacing and
            geometry are of the file's grid.
    """

    pixels: NDArray[np.generic]
    modality: str = "OT"
    display: Display = field(default_factory=Display)
    spacing_mm: tuple[float, float] | None = None
    spacing_source: SpacingSource = SpacingSource.NONE
    geometry: Geometry | None = None
    slice_order: tuple[int, ...] = ()
    frame_display: tuple[Display, ...] = ()
    keys: SubjectKeys = field(default_factory=SubjectKeys)
    header: HeaderFields = field(default_factory=HeaderFields)
    source_format: str = "dicom"
    source_shape: tuple[int, int] | None = None

    @property
    def frames(self) -> int:
        """Number of frames (slices of a volume count as frames)."""
        return int(self.pixels.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one frame on the source's pixel grid."""
        return self.source_shape or (int(self.pixels.shape[1]), int(self.pixels.shape[2]))

    def display_of(self, frame: int) -> Display:
        """The display chain of one frame."""
        return self.frame_display[frame] if self.frame_display else self.display
