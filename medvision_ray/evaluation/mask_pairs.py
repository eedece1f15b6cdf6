"""Each image's true and predicted mask, read, and measured against each other on the image's own grid."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.config import EvaluateJob
from medvision_ray.errors import LabelError, MedVisionError
from medvision_ray.evaluation.lesions import match_lesions
from medvision_ray.evaluation.mask_detail import MaskDetail
from medvision_ray.evaluation.surfaces import surface_agreement
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.geometry import SpacingSource
from medvision_ray.learning.splits import row_numbers
from medvision_ray.scoring.masks import decode_mask

_THREADS = 4
_NOTHING = (math.nan,) * 8
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MaskPairs:
    """What was measured on `n` pairs of masks; NaN where there is no true mask.

    Attributes:
        overlap: shape `(n,)`, pixels in both masks.
        predicted_area: shape `(n,)`, pixels.
        true_area: shape `(n,)`, pixels.
        detail: outlines and lesions.
    """

    overlap: Floats
    predicted_area: Floats
    true_area: Floats
    detail: MaskDetail


def measure_masks(job: EvaluateJob, scored: pd.DataFrame) -> MaskPairs:
    """Read and compare the masks of images of one frame.

    Args:
        scored: a row an image, with its `row` of the label table from 0, `mask_uri`, the predicted mask, and the spacing.

    Raises:
        LabelError: a true mask has another shape than its image, or several frames.
        MedVisionError: masks were drawn and not kept.
    """
    _check_kept(scored)
    spacings = [true_spacing_mm(row.spacing_mm, row.spacing_source) for row in scored.itertuples()]

    def measure_one(entry: tuple[Any, tuple[float, float] | None]) -> tuple[float, ...]:
        row, spacing = entry
        if not isinstance(row.mask_uri, str) or row.frames != 1:
            return _NOTHING
        truth, predicted = _masks(job, row)
        areas = float((truth & predicted).sum()), float(predicted.sum()), float(truth.sum())
        tolerance = job.surface_tolerance_mm if spacing else job.surface_tolerance_px
        surface = surface_agreement(truth, predicted, spacing or (1.0, 1.0), tolerance)
        found = match_lesions(truth, predicted, job.lesion_iou)
        return (*areas, *surface, found.true, found.detected, found.false_positives)

    with ThreadPoolExecutor(_THREADS) as pool:
        rows = list(pool.map(measure_one, zip(scored.itertuples(), spacings, strict=True)))
    overlap, predicted_area, true_area, hd95, surface_dice, lesions, detected, spurious = (
        np.array(rows, dtype=float).reshape(-1, len(_NOTHING)).T
    )
    detail = MaskDetail(
        in_mm=np.array([spacing is not None for spacing in spacings], dtype=np.bool_),
        hd95=hd95,
        surface_dice=surface_dice,
        lesions=lesions,
        detected=detected,
        false_positives=spurious,
        tolerance_mm=job.surface_tolerance_mm,
        tolerance_px=job.surface_tolerance_px,
    )
    return MaskPairs(overlap, predicted_area, true_area, detail)


def true_spacing_mm(spacing: Any, source: Any) -> tuple[float, float] | None:
    """Distance between rows and between columns where it is true in the patient, else None.

    Args:
        spacing: a row's `spacing_mm`.
        source: a row's `spacing_source`; null in rows of earlier versions.

    Examples:
        >>> true_spacing_mm([0.5, 0.7], "pixel_spacing"), true_spacing_mm([0.14, 0.14], "imager")
        ((0.5, 0.7), None)
    """
    if not isinstance(source, str) or spacing is None or not SpacingSource(source).true_in_patient:
        return None
    return float(spacing[0]), float(spacing[1])


def _check_kept(scored: pd.DataFrame) -> None:
    """What was drawn and not kept must not pass for nothing drawn."""
    compared = scored["mask_uri"].notna() & (scored["frames"] == 1)
    lost = int((compared & scored["mask_box"].notna() & scored["mask"].isna()).sum())
    if lost:
        raise MedVisionError(
            f"Expected the predicted masks of {int(compared.sum())} images with a true one, but {lost} rows were written with "
            "`save_masks: false`. Measure into an output of its own, where the images are scored again."
        )


def _masks(job: EvaluateJob, row: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    shape = (int(row.height), int(row.width))
    data = storage.read_bytes(row.mask_uri, max_bytes=job.decode.max_bytes)
    mask = decode(data, job.decode)
    if mask.frames != 1:
        raise LabelError(
            f"Expected a mask of one frame like its image, but got {mask.frames} ({row_numbers([row.row])})."
        )
    truth = mask.pixels[0] != 0
    if truth.shape != shape:
        raise LabelError(
            f"Expected a mask of {shape} pixels like its image, but got {truth.shape} ({row_numbers([row.row])})."
        )
    box = tuple(int(value) for value in row.mask_box) if row.mask_box is not None else None
    return truth, decode_mask(row.mask, box, shape)
