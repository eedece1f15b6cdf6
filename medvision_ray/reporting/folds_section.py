"""A cross-validation: its folds side by side, and all of its images measured together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medvision_ray.reporting.page import Block, Cell, Section, Table, Text
from medvision_ray.reporting.summary import NAMES, metric_tables, number

OUT_OF_FOLD = "out_of_fold"
"""`split` of pooled out-of-fold metrics."""

WHAT_IT_IS = (
    "Out of fold: each image was predicted by the model of its own fold, which had not seen its patient. The ensemble of all "
    "folds has seen every one of these patients, so it is not measured here; the test split, or new patients, can do that."
)
_NAME, _TITLE = "folds", "Cross-validation"
_SHOWN = ("val_accuracy", "val_f1", "val_auroc", "val_dice", "val_loss")


@dataclass(frozen=True, eq=False)
class Folds:
    """What is known of a cross-validation.

    Attributes:
        summary: content of `folds.json`.
        metrics: rows of the metrics table with `split` `out_of_fold` and the columns of `summary.METRIC_COLUMNS`.
    """

    summary: Mapping[str, Any]
    metrics: pd.DataFrame | None = None


def folds_section(folds: Folds | None) -> Section:
    """The folds and what they are worth together; empty where the model is no cross-validation's."""
    if folds is None:
        return Section(_NAME, _TITLE, [])
    rows, mean, std = (folds.summary.get(key) or {} for key in ("folds", "mean", "std"))
    shown = [name for name in _SHOWN if name in mean]
    heads = ("Fold", "Images", "Patients", "Best epoch", *[_head(name) for name in shown])
    lines: list[list[Cell]] = [
        [
            str(row["fold"]),
            *[number(row[key], 0) for key in ("images", "patients", "best_epoch")],
            *[number(row["metrics"].get(name)) for name in shown],
        ]
        for row in rows
    ]
    lines.append(["mean", "", "", "", *[(number(mean[name]), f"± {number(std[name])}") for name in shown]])
    said = (
        "Each fold's model on the fold that it was not trained on, and that chose its epoch. ± is the standard deviation over "
        "folds, whose training data overlap: it is no interval."
    )
    blocks: list[Block] = [Text(said), Table("Folds", heads, lines)]
    if folds.metrics is None or folds.metrics.empty:
        return Section(_NAME, _TITLE, [*blocks, Text("Pooled out-of-fold metrics are not recorded.")])
    whole = folds.metrics[folds.metrics["subgroup"] == "all"]
    blocks.append(Text(f"{WHAT_IT_IS} Below a value stands its 95 % interval over patients."))
    for table in metric_tables(whole):
        cells: list[list[Cell]] = [[name, images, patients, *values] for name, images, patients, values in table.rows]
        blocks.append(Table(table.title, ("Class", "Images", "Patients", *table.metrics), cells))
    return Section(_NAME, _TITLE, blocks)


def _head(name: str) -> str:
    plain = name.removeprefix("val_")
    return NAMES.get(plain, plain.capitalize())
