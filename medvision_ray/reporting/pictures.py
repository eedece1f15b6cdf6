"""Which evaluated images a report shows, and how they become pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import DecodeConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.preprocess import ModelInput, prepare
from medvision_ray.operating_points import named_class
from medvision_ray.privacy import HASHED
from medvision_ray.reporting.overlays import Example
from medvision_ray.reporting.summary import number
from medvision_ray.scoring.masks import decode_mask

if TYPE_CHECKING:
    from medvision_ray.scoring.predictor import Predictor


def showable(details: pd.DataFrame | None) -> pd.DataFrame | None:
    """Evaluated images that a report may show: of one frame, at an address that is no pseudonym."""
    if details is None:
        return None
    single = details[(details["frames"] == 1) & ~details["uri"].str.startswith(HASHED)]
    return single if len(single) else None


def spread(details: pd.DataFrame, count: int) -> pd.DataFrame:
    """Images evenly over the Dice range, worst and best among them, so that nothing flatters."""
    ordered = details.sort_values(["dice", "image_id"])
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return ordered.iloc[places]


def worst(details: pd.DataFrame, bundle: Bundle, count: int) -> pd.DataFrame:
    """Half of them wrong classes, the surest first, then the lowest Dice."""
    certain = details.assign(probability=_stated(details, bundle))
    chosen = certain.iloc[:0]
    if bundle.classes and not bundle.multi_label:
        wrong = certain[(certain["true_label"] != "") & (certain["true_label"] != certain["predicted_label"])]
        chosen = wrong.sort_values(["probability", "image_id"], ascending=[False, True]).head(count // 2)
    rest = certain[~certain["image_id"].isin(chosen["image_id"]) & certain["dice"].notna()]
    return pd.concat([chosen, rest.sort_values(["dice", "image_id"]).head(count - len(chosen))])


def to_explain(details: pd.DataFrame, bundle: Bundle, count: int) -> pd.DataFrame:
    """Half of them the surest errors, the others right, in turn over the predicted classes."""
    certain = details.assign(probability=_stated(details, bundle)).sort_values("image_id")
    ordered = certain.sort_values("probability", ascending=False, kind="stable")
    wrong = ordered["true_label"] != ordered["predicted_label"]
    errors = ordered[wrong & (ordered["true_label"] != "")].head(count // 2)
    right = ordered[~wrong]
    turns = right.groupby("predicted_label").cumcount()
    return pd.concat([right.iloc[np.argsort(turns, kind="stable")].head(count - len(errors)), errors])


def worst_rows(chosen: pd.DataFrame) -> list[tuple[str, ...]]:
    """The worst cases as rows of `evaluation_page.WORST_HEADS`."""
    return [_worst_row(row) for row in chosen.itertuples()]


def _worst_row(row: Any) -> tuple[str, ...]:
    labels = [value if isinstance(value, str) and value else "–" for value in (row.true_label, row.predicted_label)]
    return str(row.image_id), *labels, number(row.probability), number(row.dice)


def examples(chosen: pd.DataFrame, bundle: Bundle, predictor: Predictor | None = None) -> tuple[list[Example], int]:
    """The images as pictures, those that can't be read counted; with a predictor, with heat of the predicted class."""
    found = [_example(bundle, row, predictor) for row in chosen.itertuples()]
    shown = [each for each in found if each is not None]
    return shown, len(found) - len(shown)


def _stated(details: pd.DataFrame, bundle: Bundle) -> NDArray[np.floating]:
    """Probability of the class that is named, which class offsets may make another than the likeliest; NaN without classes."""
    if not bundle.classes:
        return np.full(len(details), np.nan)
    probabilities = details[tables.probability_columns(bundle.classes)].to_numpy(np.float64)
    if bundle.multi_label:
        return np.asarray(probabilities.max(axis=1))
    index = {name: place for place, name in enumerate(bundle.classes)}
    named = details["predicted_label"].map(index)
    stated = probabilities[np.arange(len(details)), named.fillna(0).to_numpy(np.int64)]
    return np.where(named.isna(), np.nan, stated)


def _example(bundle: Bundle, row: Any, predictor: Predictor | None) -> Example | None:
    try:
        ready = _ready(bundle, row.uri)
        true = _true_mask(ready, row.mask_uri) if isinstance(row.mask_uri, str) else None
    except (DecodeError, StorageError, ValueError):  # gone, changed, with burned-in text, or a mask of another size
        return None
    predicted = None
    if bundle.architecture.segmentation and (row.mask is not None or row.mask_box is None):  # else drawn and not kept
        box = tuple(int(v) for v in row.mask_box) if row.mask_box is not None else None
        mask = decode_mask(row.mask, box, (int(row.height), int(row.width)))
        predicted = ready.transform.mask_to_model(mask).astype(bool)
    heat = _heat(bundle, ready, predictor) if predictor is not None else None
    middle = ready.pixels.shape[1] // 2 if bundle.preprocess.slices > 1 else 0
    parts = [None if part is None else _cut(ready, part) for part in (predicted, true, heat)]
    return Example(_cut(ready, ready.pixels[0, middle]), parts[0], parts[1], _caption(bundle, row), parts[2])


def _ready(bundle: Bundle, uri: str) -> ModelInput:
    limits = DecodeConfig()
    image = decode(storage.read_bytes(uri, max_bytes=limits.max_bytes), limits)
    if image.source_format == "dicom" and image.header.may_contain_text:  # other formats cannot tell
        raise ValueError("Expected an image without burned-in text, but its header says that it may have some.")
    return prepare(image, bundle.preprocess)


def _true_mask(ready: ModelInput, uri: str) -> NDArray[np.bool_]:
    limits = DecodeConfig()
    pixels = decode(storage.read_bytes(uri, max_bytes=limits.max_bytes), limits).pixels[0]
    return ready.transform.mask_to_model(pixels != 0).astype(bool)


def _heat(bundle: Bundle, ready: ModelInput, predictor: Predictor) -> NDArray[np.float32]:
    probabilities = predictor.predict(ready.pixels[:1]).probabilities
    classes = None if probabilities is None else named_class(probabilities, bundle.class_offsets)
    heat: NDArray[np.float32] = predictor.explain(ready.pixels[:1], classes)[0]
    return heat


def _cut(ready: ModelInput, grid: NDArray[Any]) -> NDArray[Any]:
    """Without the padding of the model's grid."""
    to = ready.transform
    return np.ascontiguousarray(grid[to.top : to.top + to.height, to.left : to.left + to.width])


def _caption(bundle: Bundle, row: Any) -> str:
    dice = f", Dice {row.dice:.2f}" if row.dice == row.dice else ""
    if not bundle.classes:
        return f"mask only{dice}"
    stated = getattr(row, "probability", None)
    sure = "" if stated is None or np.isnan(stated) else f" ({stated:.2f})"
    if bundle.multi_label:
        return f"predicted {row.predicted_label or 'nothing'}{sure}{dice}"
    return f"true {row.true_label or 'not known'}, predicted {row.predicted_label}{sure}{dice}"
