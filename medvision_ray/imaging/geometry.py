"""Where the pixels of a slice or of a stack of slices lie in the patient, and whether slices make a stack at all.

Coordinates are DICOM's patient system (PS3.3 C.7.6.2.1.1): x to the patient's left, y to the back,
z to the head (LPS), in mm; NIfTI's is RAS, the same with x and y turned round. Names say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from medvision_ray.imaging.errors import DecodeError, ErrorCode

Vector = tuple[float, float, float]
Floats = NDArray[np.float64]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Positions are rounded in files, each coordinate to 0.1 mm at worst; a missing slice or a tilt makes far more of it.
_ORIENTATION_TOLERANCE = 1e-4
_SPACING_SHARE = 1e-3
_GAP_MM, _GAP_SHARE, _GAP_LIMIT = 0.1, 0.01, 0.25
_SHIFT_MM, _SHIFT_SHARE = 0.15, 1e-3
_SAME_PLACE_MM = 1e-3


class SpacingSource(str, Enum):
    """Where a pixel spacing comes from, and by that where it holds (DICOM PS3.3 10.7)."""

    PIXEL_SPACING = "pixel_spacing"
    """PixelSpacing of a slice through the patient."""
    CALIBRATED = "calibrated"
    """PixelSpacing of a projection that is corrected for magnification, true at one depth."""
    UNVERIFIED = "unverified"
    """PixelSpacing of a projection, a screen capture or the like that does not tell where it holds."""
    IMAGER = "imager"
    """ImagerPixelSpacing, or a PixelSpacing that repeats it: at the detector, where the patient is magnified."""
    NOMINAL_SCANNED = "nominal_scanned"
    """NominalScannedPixelSpacing: on the film that was scanned."""
    AFFINE = "affine"
    """The affine of a NIfTI header."""
    NONE = "none"
    """The object has no spacing, or several of them (ultrasound regions)."""

    @property
    def true_in_patient(self) -> bool:
        """Whether areas in mm2 may be computed with it."""
        return self in (SpacingSource.PIXEL_SPACING, SpacingSource.CALIBRATED, SpacingSource.AFFINE)


@dataclass(frozen=True)
class Geometry:
    """Where a slice lies, or a stack of parallel slices at equal distances.

    Attributes:
        origin_lps_mm: centre of the first pixel of the first slice.
        across_lps: unit vector along a row, in which columns count up.
        down_lps: unit vector along a column, in which rows count up.
        spacing_mm: distance between rows and between columns.
        step_lps_mm: from a slice to the next one; None for a single slice.
        space: names the frame of reference; only good for comparing, and no identifier.
    """

    origin_lps_mm: Vector
    across_lps: Vector
    down_lps: Vector
    spacing_mm: tuple[float, float]
    step_lps_mm: Vector | None = None
    space: str = ""

    @property
    def normal_lps(self) -> Vector:
        """Unit vector across x down."""
        return _vector(np.cross(self.across_lps, self.down_lps))

    @property
    def slice_spacing_mm(self) -> float | None:
        """Distance between the centres of neighbouring slices; None for a single slice."""
        return None if self.step_lps_mm is None else float(np.linalg.norm(self.step_lps_mm))

    def affine_lps(self) -> Floats:
        """Index `(column, row, slice, 1)` to LPS in mm, shape `(4, 4)`; of a single slice the step is the unit normal."""
        affine = np.eye(4)
        affine[:3, 0] = np.multiply(self.across_lps, self.spacing_mm[1])
        affine[:3, 1] = np.multiply(self.down_lps, self.spacing_mm[0])
        affine[:3, 2] = self.normal_lps if self.step_lps_mm is None else self.step_lps_mm
        affine[:3, 3] = self.origin_lps_mm
        return affine

    def affine_ras(self) -> Floats:
        """The same to RAS, as in NIfTI, shape `(4, 4)`."""
        return np.asarray(LPS_TO_RAS @ self.affine_lps())

    def corners_lps_mm(self, shape: tuple[int, int, int]) -> Floats:
        """Centres of the eight corner voxels, shape `(8, 3)`.

        Args:
            shape: slices, rows and columns.
        """
        ends = np.array(np.meshgrid(*[(0, side - 1) for side in shape[::-1]], (1,), indexing="ij")).reshape(4, -1)
        return np.asarray((self.affine_lps() @ ends)[:3].T)


def geometry_of_affine(affine_lps: Floats, single: bool) -> Geometry:
    """The geometry whose `affine_lps` this is.

    Args:
        affine_lps: index `(column, row, slice, 1)` to LPS in mm; no column is zero.
        single: there is one slice only.
    """
    columns = affine_lps[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    return Geometry(
        origin_lps_mm=_vector(affine_lps[:3, 3]),
        across_lps=_vector(columns[:, 0] / lengths[0]),
        down_lps=_vector(columns[:, 1] / lengths[1]),
        spacing_mm=(float(lengths[1]), float(lengths[0])),
        step_lps_mm=None if single else _vector(columns[:, 2]),
    )


def stack_slices(slices: Sequence[Geometry]) -> tuple[tuple[int, ...], Geometry]:
    """Order single slices along their normal (DICOM PS3.3 C.7.6.2.1.1), from the lowest to the highest.

    Returns:
        Indices of the slices in that order, and the geometry of the stack.

    Raises:
        DecodeError: MIXED_FRAMES_OF_REFERENCE, MIXED_SIZES (of pixels), MIXED_ORIENTATION,
            DUPLICATE_POSITION, GANTRY_TILT or SLICE_GAP: they make no box without distortion.
    """
    _require_alike(slices)
    first = slices[0]
    if len(slices) == 1:
        return (0,), first
    normal = np.asarray(first.normal_lps)
    origins = np.array([item.origin_lps_mm for item in slices])
    heights = (origins - origins[0]) @ normal
    order = np.argsort(heights, kind="stable")
    heights, origins = heights[order] - heights[order[0]], origins[order]
    gaps = np.diff(heights)
    _require_distinct(gaps)
    _require_straight(origins - origins[0] - heights[:, None] * normal, heights)
    _require_even(gaps)
    step = _vector(normal * heights[-1] / (len(slices) - 1))
    lowest = slices[int(order[0])]
    return tuple(int(i) for i in order), replace(lowest, step_lps_mm=step)


def _require_alike(slices: Sequence[Geometry]) -> None:
    first, count = slices[0], len(slices)
    spaces = {item.space for item in slices}
    if len(spaces) > 1:
        raise DecodeError(ErrorCode.MIXED_FRAMES_OF_REFERENCE, slices=count, frames_of_reference=len(spaces))
    spacing = np.array([item.spacing_mm for item in slices])
    if (np.abs(spacing / spacing[0] - 1) > _SPACING_SHARE).any():
        raise DecodeError(ErrorCode.MIXED_SIZES, slices=count, field="PixelSpacing")
    for axis in ("across_lps", "down_lps"):
        vectors = np.array([getattr(item, axis) for item in slices])
        off = np.abs(vectors - getattr(first, axis)).max(axis=1) > _ORIENTATION_TOLERANCE
        if off.any():
            raise DecodeError(ErrorCode.MIXED_ORIENTATION, slices=count, differing=int(off.sum()))


def _require_distinct(gaps: Floats) -> None:
    same = gaps < _SAME_PLACE_MM + _GAP_SHARE * float(np.median(gaps))
    if same.any():
        raise DecodeError(ErrorCode.DUPLICATE_POSITION, slices=len(gaps) + 1, duplicates=int(same.sum()))


def _require_straight(sideways: Floats, heights: Floats) -> None:
    """Slices lie above one another: none is shifted within its plane against the first."""
    shift = np.linalg.norm(sideways, axis=1)
    over = shift - (_SHIFT_MM + _SHIFT_SHARE * heights)
    worst = int(np.argmax(over))
    if over[worst] > 0:
        degrees = float(np.degrees(np.arctan2(shift[worst], heights[worst])))
        raise DecodeError(
            ErrorCode.GANTRY_TILT,
            slices=len(heights),
            shift_mm=round(float(shift[worst]), 3),
            tilt_degrees=round(degrees, 2),
        )


def _require_even(gaps: Floats) -> None:
    usual = float(np.median(gaps))
    uneven = np.abs(gaps - usual) > min(_GAP_MM + _GAP_SHARE * usual, _GAP_LIMIT * usual)
    if uneven.any():
        raise DecodeError(
            ErrorCode.SLICE_GAP,
            slices=len(gaps) + 1,
            usual_mm=round(usual, 3),
            smallest_mm=round(float(gaps.min()), 3),
            largest_mm=round(float(gaps.max()), 3),
            uneven=int(uneven.sum()),
        )


def _vector(values: NDArray[np.floating]) -> Vector:
    return float(values[0]), float(values[1]), float(values[2])
