"""Out-of-fold predictions: what a fold's model says of the images of that fold, which it was not trained on."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.feed import Examples, Integers, Truth, plain_batches
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.mask_threshold import scores_by_threshold
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.rows import decide

GROUPS = ("modality", "manufacturer", "patient_sex", "patient_age_band")
"""What is known of an image and may be told: columns of `predictions`."""
PIXELS = ("overlap_pixels", "mask_pixels", "true_mask_pixels")

BY_THRESHOLD = "dice_by_threshold"
"""What Dice would be with another mask threshold, one of `mask_threshold.CANDIDATES` after the other."""


@dataclass(frozen=True, eq=False)
class FoldRows:
    """The rows of a fold before its model has spoken; no patient is in it.

    Attributes:
        truth: labels of the whole table.
        schema: of the finished rows.
        entries: one an image, those that failed to decode too.
    """

    truth: Truth
    schema: pa.Schema
    entries: list[dict[str, Any]]


def schema(table: LabelTable) -> pa.Schema:
    """Columns of the table of out-of-fold predictions."""
    truth = (
        [("true_label", pa.string())]
        if table.targets is None
        else [(f"t_{name}", pa.float32()) for name in table.classes]
    )
    return pa.schema(
        [
            ("row", pa.int64()),  # of the label table, the first below the header being 1
            ("image_id", pa.int64()),  # as in `predictions`
            ("uri", pa.string()),
            ("patient_key", pa.string()),  # as in `predictions`; null without the site's key
            ("patient_number", pa.int64()),  # 0, 1, ... in the order of the label table: whose images belong together
            *[(name, pa.int32()) for name in ("height", "width", "frames")],
            *[(name, pa.string()) for name in GROUPS],
            ("fold", pa.int32()),
            ("model_id", pa.string()),
            ("error_code", pa.string()),  # null where the image was scored
            *truth,
            ("predicted_label", pa.string()),
            ("predicted_probability", pa.float32()),
            *[(column, pa.float32()) for column in tables.probability_columns(table.classes)],
            ("true_mask_fraction", pa.float64()),  # null without a true mask
            ("mask_fraction", pa.float64()),
            ("dice", pa.float64()),  # null where both masks are empty, or no true one is known
            *[(name, pa.int64()) for name in PIXELS],  # on the model's grid; null without a true mask
            (BY_THRESHOLD, pa.list_(pa.float32())),  # `scores_by_threshold`; null without a true mask
        ]
    )


def fold_rows(
    table: LabelTable,
    rows: Integers,
    number: int,
    error_codes: Sequence[str],
    names: Pseudonymiser | None,
    *,
    facts: Sequence[Mapping[str, Any] | None] = (),
) -> FoldRows:
    """What is known of a fold's images.

    Args:
        rows: of the label table, from 0, that the fold holds.
        number: of the fold, from 1.
        error_codes: of each row of the label table; empty where it was decoded.
        names: pseudonyms of addresses where the site wants them.
        facts: of each row of the label table, `image_facts.FACTS`; None where it failed.
    """
    told = ("height", "width", "frames", *GROUPS)
    entries = [
        {
            "row": int(row) + 1,
            "uri": names.address(table.uris[row]) if names else table.uris[row],
            "fold": number,
            "error_code": error_codes[row] or None,
            **_truth(table, int(row)),
            **{name: known[name] for name in told if (known := facts[row] if facts else None) is not None},
        }
        for row in rows
    ]
    return FoldRows(Truth(table.labels, table.targets), schema(table), entries)


def predict_fold(predictor: Predictor, examples: Examples, fold: FoldRows, batch_size: int) -> pa.Table:
    """A fold's rows with predictions; those that failed to decode keep their error code alone."""
    bundle = predictor.bundle
    entry_of = {entry["row"] - 1: {**entry, "model_id": bundle.model_id} for entry in fold.entries}
    usable = np.array([row for row, entry in entry_of.items() if entry["error_code"] is None], dtype=np.int64)
    for part in plain_batches(usable, batch_size=batch_size):
        batch = examples.batch(part)
        predicted = predictor.predict(batch.images.cpu().numpy())
        masks, has_mask = batch.masks.cpu().numpy() > 0, batch.has_mask.cpu().numpy()
        for place, row in enumerate(part):
            entry = entry_of[int(row)]
            if predicted.probabilities is not None:
                entry.update(_classified(bundle, predicted.probabilities[place]))
            if predicted.masks is not None:
                true = masks[place] if has_mask[place] else None
                entry.update(_segmented(predicted.masks[place] >= bundle.mask_threshold, true))
                if true is not None:
                    entry[BY_THRESHOLD] = scores_by_threshold(predicted.masks[place][None], true[None])[0].tolist()
    return pa.Table.from_pylist(list(entry_of.values()), schema=fold.schema)


def _truth(table: LabelTable, row: int) -> dict[str, Any]:
    if table.targets is None:
        return {"true_label": table.classes[table.labels[row]] if table.labels[row] >= 0 else None}
    values = table.targets[row]
    return {
        f"t_{name}": None if math.isnan(value) else float(value)
        for name, value in zip(table.classes, values, strict=True)
    }


def _classified(bundle: Bundle, probabilities: NDArray[np.float32]) -> dict[str, Any]:
    label, probability = decide(bundle, probabilities)
    columns = tables.probability_columns(bundle.classes)
    return {
        "predicted_label": label,
        "predicted_probability": probability,
        **dict(zip(columns, probabilities.tolist(), strict=True)),
    }


def _segmented(mask: NDArray[np.bool_], true: NDArray[np.bool_] | None) -> dict[str, Any]:
    fractions: dict[str, Any] = {"mask_fraction": float(mask.mean())}
    if true is None:
        return fractions
    fractions["true_mask_fraction"] = float(true.mean())
    areas = np.array([(mask & true).sum(), mask.sum(), true.sum()])
    fractions.update(zip(PIXELS, areas.tolist(), strict=True))
    if mask.any() or true.any():
        fractions["dice"] = float(dice_per_image(*areas[:, None].astype(np.float64))[0])
    return fractions


def predict_task(uri: str, dataset: Any, fold: FoldRows, options: dict[str, Any]) -> bytes:
    """What a Ray task runs: `predict_fold` of the bundle at `uri`, as the bytes of a Parquet file."""
    import torch

    torch.set_num_threads(max(1, int(options["cpus"])))
    bundle, batch_size = load_bundle(uri), options["batch_size"]
    tables_of = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    examples = Examples(tables_of, fold.truth, bundle.preprocess.channels, bundle.preprocess.size)
    predictor = Predictor(bundle, options["precision"], batch_frames=batch_size)
    return parquet_bytes(predict_fold(predictor, examples, fold, batch_size))


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def is_current(place: str, table: LabelTable) -> bool:
    """Whether a fold's predictions are there, with the columns that this version writes."""
    if not storage.exists(place):
        return False
    return bool(pq.read_schema(io.BytesIO(storage.read_bytes(place))).equals(schema(table)))


def identified(rows: pa.Table, table: LabelTable, names: Pseudonymiser | None, key: Pseudonymiser | None) -> pa.Table:
    """The rows with what names images and patients as `predictions` does: `image_id`, `patient_key`, `patient_number`.

    Args:
        names: pseudonyms of addresses where the site wants them.
        key: the site's; None leaves `patient_key` null. A patient of the label table has the key of the same Patient ID
            (0010,0020) without an issuer.
    """
    of_row = [row - 1 for row in rows["row"].to_pylist()]
    ids = list_uris([table.uris[row] for row in of_row], names).objects["image_id"]
    patients = [table.patients[row] for row in of_row]
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(table.patients))}
    columns = {
        "image_id": ids,
        "patient_key": pa.array([key.patient(patient) if key else None for patient in patients], pa.string()),
        "patient_number": pa.array([numbers[patient] for patient in patients], pa.int64()),
    }
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
    return rows


def join_folds(places: Iterable[str], expected_rows: Integers) -> pa.Table:
    """The tables of all folds as one, in the order of the label table.

    Args:
        places: addresses of the folds' Parquet files.
        expected_rows: of the label table, from 0.

    Raises:
        MedVisionError: an image is not there exactly once.
    """
    joined = pa.concat_tables([pq.read_table(io.BytesIO(storage.read_bytes(place))) for place in places])
    joined = joined.sort_by("row")
    if joined["row"].to_pylist() != (np.sort(expected_rows) + 1).tolist():
        raise MedVisionError(
            f"Expected each of {len(expected_rows)} train and val images once in the out-of-fold predictions, but they hold "
            f"{joined.num_rows} rows of others or of some twice. Delete the folds' folders under training/ and run again."
        )
    return joined
