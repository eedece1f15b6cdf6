"""The report of an evaluation: how good a model is, where it is right and wrong, for whom, with examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medvision_ray.reporting import figures
from medvision_ray.reporting.figures_of_groups import Estimate, dice_by_size, intervals, size_groups
from medvision_ray.reporting.folds_section import OUT_OF_FOLD, WHAT_IT_IS, Folds, folds_section
from medvision_ray.reporting.guards_section import Guarded, guards_section
from medvision_ray.reporting.overlays import Example
from medvision_ray.reporting.page import Block, Cell, Details, Figure, Figures, Gallery, Section, Table, Text, Tiles
from medvision_ray.reporting.sections import checked, model_section, runs_section, training_section
from medvision_ray.reporting.summary import METRIC_COLUMNS, MetricTable, headline, metric_tables, number, one_split

_MOST_GROUPS = 40
_SUBGROUP_METRICS = (
    ("all", "accuracy", "Accuracy"),
    ("macro", "auroc", "AUROC, mean over classes"),
    ("all", "dice", "Dice"),
)


_BEFORE_HANDING_ON = (
    "Look at the pictures before this page is handed on: a face, or letters in an image whose file cannot say that it has "
    "some, may tell whose they are. With `examples: 0` the page has none."
)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Everything that the page shows. A part that is None or empty is replaced by a sentence that says so.

    Attributes:
        model: facts about the model as name and value, in order.
        metrics: a row per metric with `summary.METRIC_COLUMNS`.
        scored: labelled predictions; None without.
        predicted: predicted class index, shape `(n,)`; None for findings.
        dice: of each image, shape `(n,)`; None without masks.
        mask_share: the true mask's share of each image; None where it is not known.
        spread: examples over the whole range of Dice.
        worst: examples that went wrong most, see `pictures.worst`.
        worst_rows: the same as rows of `WORST_HEADS`.
        explained: examples with heat.
        unread: pictures that could not be read.
        history: a row per epoch.
        best_epoch: whose weights were kept.
        runs: a row per run with `sections.RUN_COLUMNS`.
        failures: rows of the failures table.
        guards: name and facts of the training, of an ensemble those of each member.
        folds: of a cross-validation; None where it is none.
    """

    model: Sequence[tuple[str, str]] = ()
    metrics: pd.DataFrame | None = None
    scored: figures.Scored | None = None
    predicted: NDArray[np.integer] | None = None
    dice: NDArray[np.floating] | None = None
    mask_share: NDArray[np.floating] | None = None
    spread: Sequence[Example] = ()
    worst: Sequence[Example] = ()
    worst_rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    explained: Sequence[Example] = ()
    unread: int = 0
    history: pd.DataFrame | None = None
    best_epoch: int | None = None
    runs: pd.DataFrame | None = None
    failures: pd.DataFrame | None = None
    guards: Sequence[Guarded] = ()
    folds: Folds | None = None


WORST_HEADS = ("image_id", "True", "Predicted", "Probability", "Dice")


def evaluation_sections(content: Evaluated) -> list[Section]:
    """The sections of the page, in order.

    Raises:
        ValueError: the runs or metrics lack a column.
    """
    metrics = checked(content.metrics, METRIC_COLUMNS, "metrics")
    return [
        _short(metrics),
        _classification(content),
        _segmentation(content, metrics),
        _subgroups(metrics),
        _examples(content),
        _all_metrics(metrics),
        folds_section(content.folds),
        guards_section(content.guards),
        training_section(content.history, content.best_epoch),
        runs_section(content.runs, content.failures),
        model_section(content.model),
    ]


def _short(metrics: pd.DataFrame | None) -> Section:
    basis, tiles = headline(metrics) if metrics is not None else ("", [])
    if not tiles:
        return Section(
            "short", "In short", [Text("There is no headline: this model has no evaluation with an overall metric.")]
        )
    said = (
        f"Measured on the {basis}, and so are the figures below. Intervals are over patients, not over images: they say how far "
        "another sample of "
    )
    blocks: list[Block] = [Text(said + "such patients may lie, not how another hospital's will."), Tiles(tiles)]
    if metrics is not None:
        whole = one_split(metrics)
        if (whole["split"] == OUT_OF_FOLD).all():
            blocks.append(Text(WHAT_IT_IS))
        failed = whole[whole["metric"] == "failed_images"]["value"]
        if len(failed) and failed.iloc[0] > 0:
            blocks.append(Text(f"{failed.iloc[0]:,.0f} images of the split have no prediction and are in no figure."))
    return Section("short", "In short", blocks)


def _classification(content: Evaluated) -> Section:
    name, title, scored = "classification", "Where it is right and wrong, and how sure", content.scored
    if scored is None or not scored.labels.size or not len(scored.classes):
        return Section(name, title, [Text("There are no labelled predictions to draw curves from.")])
    drawn = []
    if content.predicted is not None and scored.labels.ndim == 1:
        drawn.append(_confusion(scored, content.predicted))
    band = " The band is a 95 % interval over patients at each point." if figures.roc_bands(scored) else ""
    marks = " Marks are the points to decide at." if scored.points else ""
    roc = figures.curves(scored, kind="roc")
    drawn.append(
        Figure(
            figures.roc_curves(scored),
            f"ROC curves. AUROC: {_areas(roc)}.",
            "A curve nearer the upper left corner tells a class from the rest better; the dashed line is chance."
            + band
            + marks,
        )
    )
    drawn.append(
        Figure(
            figures.precision_recall_curves(scored),
            f"Precision-recall curves. Average precision: {_areas(figures.curves(scored, kind='precision_recall'))}.",
            "How many alarms are right (precision) when so many of the ill are found (recall). It depends on how "
            "common a class is among these images." + marks,
        )
    )
    drawn += _reliability(scored)
    return Section(name, title, [Figures(drawn), *_points_table(scored)])


def _confusion(scored: figures.Scored, predicted: NDArray[np.integer]) -> Figure:
    labels = scored.labels.astype(np.int64)
    counts = figures.count_confusion(labels, predicted, len(scored.classes))
    right, total = int(np.trace(counts)), int(counts.sum())
    return Figure(
        figures.confusion_matrix(labels, predicted, scored.classes),
        f"Confusion matrix: {right} of {total} images are on the diagonal, predicted as they are labelled.",
        "Rows are what is true, columns what was predicted; percentages are of a row. Off the diagonal are the errors.",
        wide=len(scored.classes) > 5,
    )


def _points_table(scored: figures.Scored) -> list[Block]:
    rows = []
    for name, thresholds in scored.points.items():
        for index, class_name in enumerate(scored.classes):
            if not math.isnan(thresholds[index]):
                truth, scores, _ = scored.one(index)
                rate, sensitivity, precision = figures.at_threshold(truth, scores, float(thresholds[index]))
                figures_of = [number(value) for value in (float(thresholds[index]), sensitivity, 1 - rate, precision)]
                rows.append((name, class_name, *figures_of))
    heads = ("Point", "Class", "Threshold", "Sensitivity", "Specificity", "Precision")
    title = "Points to decide at, chosen on validation, on these images"
    return [Table(title, heads, rows, left=2)] if rows else []


def _reliability(scored: figures.Scored) -> list[Figure]:
    confidence, right = figures.confidences(scored, scored.probabilities)
    if not confidence.size:
        return []
    middle, share, _, _ = figures.reliability_points(confidence, right)
    points = "; ".join(f"{share[i]:.0%} right at {middle[i]:.0%}" for i in range(len(middle)))
    has = scored.calibrated is not None and not np.isnan(scored.calibrated).all()
    after = "" if has else " These predictions have no calibrated probabilities, so only the raw ones are shown."
    caption = (
        "Can its probabilities be believed: on the dashed line it is right as often as it says, below it is too sure of itself. "
        "ECE is the mean distance from the line. Larger marks stand for more images, bars are 95 % intervals as if images were "
        "independent." + after
    )
    return [Figure(figures.reliability(scored), f"Reliability diagram, raw: {points}.", caption)]


def _segmentation(content: Evaluated, metrics: pd.DataFrame | None) -> Section:
    name, title = "masks", "How well it draws"
    if content.dice is None or np.isnan(content.dice).all():
        return Section(name, title, [])
    groups = size_groups(content.dice, content.mask_share)
    said = "; ".join(
        f"{group}: {len(values)} images, median {np.median(values):.2f}" for group, values in groups if len(values)
    )
    missed = int(np.count_nonzero(content.dice == 0))
    caption = (
        "A dot is an image with a true mask, the box its middle half, the thick line the median. A rim of one pixel "
        f"costs a small mask more than a large one. {missed:,} of {np.count_nonzero(~np.isnan(content.dice)):,} images have a Dice of 0."
    )
    figure = Figure(dice_by_size(content.dice, content.mask_share), f"Dice by size of the true mask. {said}.", caption)
    found = metric_tables(one_split(metrics)) if metrics is not None else []
    tables = [_as_table(table) for table in found if table.title.endswith((": masks", ": lesions"))]
    return Section(name, title, [Figures([figure]), *tables])


def _subgroups(metrics: pd.DataFrame | None) -> Section:
    """A figure a metric over all subgroups, and the tables behind."""
    name, title = "subgroups", "For whom"
    if metrics is None:
        return Section(name, title, [])
    split = one_split(metrics, whole=False)
    if (split["subgroup"] == "all").all():
        return Section(name, title, [])
    drawn = [figure for key in _SUBGROUP_METRICS if (figure := _group_figure(split, *key)) is not None]
    said = (
        "Each group measured by itself, beside all images (orange). A wide interval means few patients, not that a group is "
        "served as well as the others. Groups of too few patients are counted and not measured."
    )
    tables = [
        Details(f"Tables by {str(group).replace('_', ' ')}", [_as_table(table) for table in metric_tables(rows)])
        for group, rows in split[split["subgroup"] != "all"].groupby("subgroup", sort=False)
    ]
    return Section(name, title, [Text(said), *([Figures(drawn)] if drawn else []), *tables])


def _group_figure(split: pd.DataFrame, class_name: str, metric: str, title: str) -> Figure | None:
    rows = split[(split["class_name"] == class_name) & (split["metric"] == metric)]
    parts = rows[rows["subgroup"] != "all"].head(_MOST_GROUPS)
    parts = parts.iloc[np.lexsort((parts["subgroup_value"].map(_group_order), parts["subgroup"].astype(str)))]
    if parts.empty or rows["value"].isna().all():
        return None
    whole = rows[rows["subgroup"] == "all"]
    lines = [_estimate(row, "all images", emphasised=True) for _, row in whole.iterrows()]
    lines += [
        _estimate(row, f"{row['subgroup']}: {row['subgroup_value']}".replace("_", " ")) for _, row in parts.iterrows()
    ]
    reference = lines[0].value if len(whole) else None
    said = "; ".join(f"{each.name} {number(each.value, 2)}" for each in lines)
    caption = "Dots with 95 % intervals over patients; at the right, images and patients."
    svg = intervals(lines, title=f"{title} by group", xlabel=f"{title} (0 to 1)", reference=reference)
    return Figure(svg, f"{title} by group: {said}.", caption, wide=True)


def _group_order(value: object) -> int:
    """`empty` and `under` before what lies between, `over` behind it; others as they come."""
    places = {"empty": 0, "under": 1, "over": 3}
    return next((place for word, place in places.items() if str(value).startswith(word)), 2)


def _estimate(row: pd.Series, name: str, *, emphasised: bool = False) -> Estimate:
    value, low, high = (None if pd.isna(row[key]) else float(row[key]) for key in ("value", "ci_low", "ci_high"))
    note = f"{row['n_images']:,} / {row['n_patients']:,}"
    return Estimate(name, value, low, high, note, emphasised)


def _examples(content: Evaluated) -> Section:
    blocks: list[Block] = []
    if content.spread or content.worst or content.explained:
        blocks.append(Text(_BEFORE_HANDING_ON))
    if content.spread:
        blocks.append(Gallery("From the worst to the best Dice, evenly", content.spread))
    if content.worst:
        blocks.append(Gallery("Worst cases: sure and wrong, then the lowest Dice", content.worst))
    if content.worst_rows:
        blocks.append(
            Details("The worst cases as a table", [Table("Worst cases", WORST_HEADS, content.worst_rows, left=3)])
        )
    if content.explained:
        said = (
            "Grad-CAM of the predicted class (its form by place, HiResCAM): bright is where the deepest features speak for it. "
            "It shows what the model used, coarsely, and not whether that is right; a bright place outside the finding is a "
            "reason to look closer."
        )
        blocks += [Text(said), Gallery("Why it said so", content.explained)]
    if content.unread:
        blocks.append(
            Text(
                f"{content.unread} chosen images could not be read here, or may have burned-in text, and are not shown."
            )
        )
    return Section("examples", "Examples", blocks or [Text("There are no example images.")])


def _all_metrics(metrics: pd.DataFrame | None) -> Section:
    if metrics is None:
        return Section("metrics", "All metrics", [Text("This model has not been evaluated.")])
    whole = metric_tables(metrics[metrics["subgroup"] == "all"])
    shown, more = whole[:2], whole[2:]
    said = "A value, and below it its 95 % interval over patients. Undefined means that no image could tell."
    rest = [Details("Masks, lesions and other splits", [_as_table(table) for table in more])] if more else []
    return Section("metrics", "All metrics", [Text(said), *[_as_table(table) for table in shown], *rest])


def _as_table(table: MetricTable) -> Table:
    rows: list[Sequence[Cell]] = [(name, images, patients, *cells) for name, images, patients, cells in table.rows]
    return Table(table.title, ("Class", "Images", "Patients", *table.metrics), rows)


def _areas(drawn: Sequence[figures.Curve]) -> str:
    return ", ".join(f"{each.name} {'undefined' if math.isnan(each.area) else f'{each.area:.3f}'}" for each in drawn)
