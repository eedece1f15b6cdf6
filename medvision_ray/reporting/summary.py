"""Turn rows of the metrics table into what the report shows: headline figures and one table a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

METRIC_COLUMNS = (
    "subgroup",
    "subgroup_value",
    "class_name",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n_images",
    "n_patients",
    "dataset",
    "split",
)
NAMES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "sensitivity_at_90_specificity": "Sensitivity at specificity 0.90",
    "sensitivity_at_95_specificity": "Sensitivity at specificity 0.95",
    "cohen_kappa": "Cohen's kappa",
    "ece": "Expected calibration error",
    "brier": "Brier score",
    "log_loss": "Log loss",
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 (mm)",
    "hd95_px": "HD95 (pixels)",
    "lesion_sensitivity": "Lesion sensitivity",
    "false_positives_per_image": "False positives an image",
    "undrawn_masks": "Masks with nothing drawn",
    "lesions": "Lesions",
    "detected_lesions": "Lesions detected",
    "false_positive_lesions": "Drawn regions without a lesion",
    "images": "Images",
    "mask_images": "Images with a true mask",
    "missed_masks": "Missed masks",
    "empty_mask_images": "Images with an empty true mask",
    "spurious_masks": "Spurious masks",
    "failed_images": "Images without a prediction",
    "true_positives": "True positives",
    "false_positives": "False positives",
    "false_negatives": "False negatives",
    "true_negatives": "True negatives",
}
_MASK_COUNTS = frozenset({"mask_images", "missed_masks", "empty_mask_images", "spurious_masks", "undrawn_masks"})
_LESION_COUNTS = frozenset({"lesions", "detected_lesions", "false_positive_lesions"})
_LESION_RATES = frozenset({"lesion_sensitivity", "false_positives_per_image"})
_OVERLAPS = ("dice", "iou", "hd95", "surface_dice")  # names begin so; a unit or tolerance follows
_FINDING_COUNTS = frozenset({"true_positives", "false_positives", "false_negatives", "true_negatives"})
_COUNTS = _MASK_COUNTS | _LESION_COUNTS | _FINDING_COUNTS | {"failed_images", "images"}
_HEADLINES = (("all", "accuracy"), ("macro", "auroc"), ("macro", "recall"), ("macro", "f1"), ("all", "dice"))
_MOST_TILES = 4
_OVER_ALL = {"all": "all images", "macro": "mean over classes"}


@dataclass(frozen=True)
class Tile:
    """One headline figure as text; `interval` is empty where there is none."""

    name: str
    value: str
    interval: str
    basis: str


@dataclass(frozen=True)
class MetricTable:
    """Metrics of one dataset, split and subgroup: classes down, metrics across, cells as text.

    Attributes:
        title: names the dataset, split, subgroup and kind of metrics.
        metrics: column heads.
        rows: class name, images, patients, and a `(value, interval)` a metric.
    """

    title: str
    metrics: tuple[str, ...]
    rows: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...]


def headline(metrics: pd.DataFrame) -> tuple[str, list[Tile]]:
    """The sentence and the tiles on top of the page, from the whole test split where there is one.

    Args:
        metrics: rows with `METRIC_COLUMNS`, at least one.
    """
    group = one_split(metrics)
    first = group.iloc[0]
    by_key = {(row["class_name"], row["metric"]): row for _, row in group.iterrows()}
    tiles = [_tile(by_key[key]) for key in _HEADLINES if key in by_key][:_MOST_TILES]
    if ("all", "dice") in by_key and len(tiles) == _MOST_TILES:
        tiles[-1] = _tile(by_key["all", "dice"])
    return _group_title(first), tiles


def one_split(metrics: pd.DataFrame, *, whole: bool = True) -> pd.DataFrame:
    """Rows of the first test split, or of the first split where there is none; of `sources.evaluation_metrics` that is the newest.

    Args:
        whole: only those over the whole split, where it has any; else those of its subgroups too.
    """
    over_all = metrics[metrics["subgroup"] == "all"]
    rows = over_all if len(over_all) else metrics
    tested = rows[rows["split"] == "test"]
    first = (tested if len(tested) else rows).iloc[0]
    wanted = rows[rows["subgroup"] == first["subgroup"]] if whole else metrics
    found: pd.DataFrame = wanted[(wanted["dataset"] == first["dataset"]) & (wanted["split"] == first["split"])]
    return found


def metric_tables(metrics: pd.DataFrame) -> list[MetricTable]:
    """Every group's metrics: a table of those over all images, one of those by class, one of masks.

    The cells of a confusion matrix (`confusion:...`) are left to its figure.
    """
    tables: list[MetricTable] = []
    listed = metrics[~metrics["metric"].str.startswith("confusion:")]
    for _, group in listed.groupby(["dataset", "split", "subgroup", "subgroup_value"], sort=False, dropna=False):
        by_class = set(group.loc[~group["class_name"].isin(list(_OVER_ALL)), "metric"])
        apart = group["metric"].isin(by_class)
        lesions = group["metric"].isin(_LESION_COUNTS | _LESION_RATES)
        masks = group["metric"].isin(_MASK_COUNTS) | group["metric"].str.startswith(_OVERLAPS)
        parts = (
            ("over all images", group[~apart & ~masks & ~lesions]),
            ("by class", group[apart & ~masks & ~lesions]),
            ("masks", group[masks]),
            ("lesions", group[lesions]),
        )
        # How many images a group has stands in every table's second column.
        shown = ((part, kept if len(kept := rows[rows["metric"] != "images"]) else rows) for part, rows in parts)
        tables.extend(_table(rows, part) for part, rows in shown if len(rows))
    return tables


def metric_name(metric: str) -> str:
    """A metric's name for people."""
    return NAMES.get(metric, metric.replace("surface_dice_", "Surface Dice at ").replace("_", " "))


def number(value: object, digits: int = 3) -> str:
    """A number for the page: a dash where it is missing, thousands apart."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    figure = float(str(value))
    return f"{figure:,.0f}" if figure.is_integer() and digits == 0 else f"{figure:,.{digits}f}"


def _tile(row: pd.Series) -> Tile:
    over = ", mean over classes" if row["class_name"] == "macro" else ""
    return Tile(
        name=NAMES.get(row["metric"], row["metric"]) + over,
        value=_value(row),
        interval=_interval(row),
        basis=f"{'' if _interval(row) else 'no interval, '}{number(row['n_images'], 0)} images of {number(row['n_patients'], 0)} patients",
    )


def _table(rows: pd.DataFrame, part: str) -> MetricTable:
    metrics = list(dict.fromkeys(rows["metric"]))
    names = list(dict.fromkeys(rows["class_name"]))
    names.sort(key=lambda name: name not in _OVER_ALL)
    cells = {(row["class_name"], row["metric"]): row for _, row in rows.iterrows()}
    lines = []
    for name in names:
        found = [cells.get((name, metric)) for metric in metrics]
        present = [row for row in found if row is not None]
        values = tuple(("", "") if row is None else (_value(row), _interval(row)) for row in found)
        images, patients = (max(int(row[key]) for row in present) for key in ("n_images", "n_patients"))
        lines.append((_OVER_ALL.get(name, name), f"{images:,}", f"{patients:,}", values))
    heads = tuple(metric_name(metric) for metric in metrics)
    return MetricTable(f"{_group_title(rows.iloc[0])}: {part}", heads, tuple(lines))


def _group_title(row: pd.Series) -> str:
    title = f"{row['split']} split of {row['dataset']}"
    if row["subgroup"] == "all":
        return title
    value = "" if pd.isna(row["subgroup_value"]) else f" {row['subgroup_value']}"
    return f"{title}, subgroup {row['subgroup']}{value}"


def _value(row: pd.Series) -> str:
    if pd.isna(row["value"]):
        return "undefined"
    return number(float(row["value"]), 0 if row["metric"] in _COUNTS else 3)


def _interval(row: pd.Series) -> str:
    if pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]):
        return ""
    return f"{row['ci_low']:.3f} to {row['ci_high']:.3f}"
