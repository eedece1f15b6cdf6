"""A fingerprint out of prediction rows: what an ensemble, whose members' trainings differ, can be held against."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.fingerprint import (
    CATEGORIES,
    MASK_FRACTION,
    NUMBERS,
    Fingerprint,
    Reference,
    reference_of_categories,
    reference_of_numbers,
)

_SPACINGS = ("row_spacing_mm", "column_spacing_mm")
_READ = ("image_id", "frames", "spacing_mm", *CATEGORIES, *(name for name in NUMBERS if name not in _SPACINGS))


def fingerprint_of_rows(output: str, bundle: Bundle, scored: pd.DataFrame) -> Fingerprint:
    """Facts and scores of images of the val split, as a scoring run would write them; scores of objects of one frame.

    Args:
        output: folder or prefix that holds tables/.
        bundle: whose predictions they are.
        scored: `image_id` and `patient` of images that have a prediction; no patient enters the fingerprint.
    """
    scores = [*tables.probability_columns(bundle.classes), MASK_FRACTION]
    ids = pa.array(scored["image_id"].to_numpy(np.int64))
    condition = (pads.field("model_id") == bundle.model_id) & pads.field("image_id").isin(ids)
    rows = tables.read(output, "predictions", [*_READ, *scores], condition)
    if rows is None:
        return Fingerprint({})
    frame = rows.to_pandas().merge(scored[["image_id", "patient"]], on="image_id", validate="one_to_one")
    for place, name in enumerate(_SPACINGS):
        frame[name] = [None if pair is None else pair[place] for pair in frame["spacing_mm"]]
    single = frame[frame["frames"] == 1]
    found: dict[str, Reference | None] = {}
    for name in (*NUMBERS, *scores):
        part = single if name in scores else frame
        values = part[name].to_numpy(np.float64, na_value=np.nan)
        found[name] = reference_of_numbers(values.tolist(), part["patient"].tolist(), "val")
    for name in CATEGORIES:
        texts = [value if isinstance(value, str) else None for value in frame[name].to_numpy(object)]
        found[name] = reference_of_categories(texts, frame["patient"].tolist(), "val")
    return Fingerprint({name: reference for name, reference in found.items() if reference is not None})
