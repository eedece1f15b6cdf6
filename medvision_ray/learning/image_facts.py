"""What is known of a training image beside its pixels: geometry, scanner, brightness. Named as columns of `predictions`."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from medvision_ray.config import PrivacyConfig
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.intensity import INPUT_COLUMNS, input_statistics
from medvision_ray.imaging.preprocess import ModelInput
from medvision_ray.privacy import Pseudonymiser

_HEADER_TEXTS = ("manufacturer", "manufacturer_model", "body_part", "view", "patient_sex", "patient_age_band")
_HEADER_NUMBERS = ("kvp", "slice_thickness_mm")

FACTS = pa.struct(
    [
        *[pa.field(name, pa.int32()) for name in ("height", "width", "frames")],
        *[pa.field(name, pa.float64()) for name in ("row_spacing_mm", "column_spacing_mm", *_HEADER_NUMBERS)],
        *[pa.field(name, pa.string()) for name in ("modality", "source_format", *_HEADER_TEXTS)],
        *[pa.field(name, pa.float64()) for name in INPUT_COLUMNS],
    ]
)


def header_reader(privacy: PrivacyConfig) -> Pseudonymiser:
    """What reads headers as the site's policy allows. Its key is thrown away: training keeps no keys of patients."""
    return Pseudonymiser(os.urandom(32), privacy.model_copy(update={"study_date": "omit"}))


def image_facts(image: MedicalImage, prepared: ModelInput) -> dict[str, Any]:
    """The fields of `FACTS`; None where the image does not say, or the policy keeps it."""
    rows, columns = image.shape
    spacing = image.spacing_mm or (None, None)
    return {
        "height": rows,
        "width": columns,
        "frames": image.frames,
        "row_spacing_mm": spacing[0],
        "column_spacing_mm": spacing[1],
        "modality": image.modality,
        "source_format": image.source_format,
        **{name: getattr(image.header, name) for name in (*_HEADER_TEXTS, *_HEADER_NUMBERS)},
        **input_statistics(prepared.pixels),
    }
