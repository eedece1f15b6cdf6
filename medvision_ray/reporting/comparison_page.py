"""The report of a comparison: two models on the same images, what differs and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvision_ray.reporting.figures_of_groups import Estimate, intervals
from medvision_ray.reporting.page import Block, Details, Facts, Figure, Figures, Section, Table, Text, Tiles
from medvision_ray.reporting.summary import NAMES, Tile, metric_name, number

_LOWER_IS_BETTER = ("ece", "brier", "log_loss", "hd95", "false_positives", "missed", "spurious", "undrawn")
_HEADLINES = (("all", "accuracy"), ("macro", "auroc"), ("macro", "f1"), ("all", "dice"))
_OVER_ALL = {"all": "all images", "macro": "mean over classes"}


@dataclass(frozen=True, eq=False)
class Compared:
    """What the page shows.

    Attributes:
        comparisons: content of the compare job's JSON files, one a dataset and split.
        model: facts about the model as name and value.
        baseline: of the one it is compared with.
    """

    comparisons: Sequence[Mapping[str, Any]]
    model: Sequence[tuple[str, str]]
    baseline: Sequence[tuple[str, str]]


def comparison_sections(content: Compared) -> list[Section]:
    """The sections of the page: the models, then for each dataset and split what differs."""
    sections = []
    for number_, facts in enumerate(content.comparisons):
        where = f"{facts['split']} split of {facts['dataset']}"
        suffix = f"-{number_}" if number_ else ""
        sections += [
            Section(f"short{suffix}", f"In short: {where}", _short(facts)),
            Section(f"differences{suffix}", f"Differences: {where}", _differences(facts)),
            Section(f"tests{suffix}", f"Tests: {where}", _tests(facts)),
        ]
    models = Section(
        "models",
        "The two models",
        [
            Details("Model", [Facts(content.model)]),
            Details("Baseline", [Facts(content.baseline)]),
        ],
    )
    return [*sections, models]


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith(_LOWER_IS_BETTER)


def verdict(row: Mapping[str, Any]) -> str:
    """What a difference says: `better` or `worse` where its interval leaves 0 out, else `no clear difference`."""
    low, high = row["ci_low"], row["ci_high"]
    if low is None or high is None or low <= 0 <= high:
        return "no clear difference"
    return "better" if (low > 0) != lower_is_better(row["metric"]) else "worse"


def _short(facts: Mapping[str, Any]) -> list[Block]:
    by_key = {(row["class_name"], row["metric"]): row for row in facts["differences"]}
    found = [by_key[key] for key in _HEADLINES if key in by_key and by_key[key]["difference"] is not None]
    said = (
        f"{facts['model_id']} against {facts['baseline_id']} on the same {facts['images']:,} images of {facts['patients']:,} patients. "
        "A difference is model minus baseline; its 95 % interval draws the same patients for both."
    )
    left = facts.get("left_out") or 0
    more = (
        [Text(f"{left:,} images of the split are left out: one of the models has no prediction of them.")]
        if left
        else []
    )
    return [Text(said), *more, Tiles([_tile(row) for row in found])]


def _tile(row: Mapping[str, Any]) -> Tile:
    over = ", mean over classes" if row["class_name"] == "macro" else ""
    basis = f"{number(row['value'])} against {number(row['baseline'])}: {verdict(row)}"
    return Tile(NAMES.get(row["metric"], row["metric"]) + over, f"{row['difference']:+.3f}", _interval(row), basis)


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["ci_low"] is None else f"{row['ci_low']:+.3f} to {row['ci_high']:+.3f}"


def _differences(facts: Mapping[str, Any]) -> list[Block]:
    rows = facts["differences"]
    whole = [row for row in rows if row["class_name"] in _OVER_ALL and row["difference"] is not None]
    unit = [row for row in whole if not row["metric"].startswith("hd95") and row["metric"] != "log_loss"]
    lines = [
        Estimate(
            _name(row) + (" ↓" if lower_is_better(row["metric"]) else ""),
            row["difference"],
            row["ci_low"],
            row["ci_high"],
            verdict(row),
        )
        for row in unit
    ]
    said = "; ".join(f"{each.name} {each.value:+.3f}, {each.note}" for each in lines)
    svg = intervals(lines, title="Difference, model minus baseline", xlabel="difference", reference=0.0, limits=False)
    caption = (
        "Dots with 95 % intervals; the dashed line is no difference; of metrics marked ↓ less is better. Where an interval "
        "crosses the line, these patients cannot tell which model is better. So many metrics are shown that one of twenty "
        "may leave 0 out by chance."
    )
    cells = [
        (
            _OVER_ALL.get(row["class_name"], row["class_name"]),
            _name(row),
            number(row["value"]),
            number(row["baseline"]),
            ("–", "") if row["difference"] is None else (f"{row['difference']:+.3f}", _interval(row)),
            verdict(row) if row["difference"] is not None else "undefined",
        )
        for row in rows
    ]
    heads = ("Class", "Metric", "Model", "Baseline", "Difference", "Reading")
    table = Table("Every metric", heads, cells, left=2)
    return [
        Figures([Figure(svg, f"Differences: {said}.", caption, wide=True)]),
        Details("Every metric as a table", [table]),
    ]


def _name(row: Mapping[str, Any]) -> str:
    return metric_name(row["metric"])


def _tests(facts: Mapping[str, Any]) -> list[Block]:
    aurocs: list[tuple[str, ...]] = [
        (
            name,
            number(test["auroc"]),
            number(test["baseline"]),
            number(test["standard_error"], 4),
            number(test["z"], 2),
            number(test["p"], 4),
        )
        for name, test in facts["auroc_tests"].items()
    ]
    accuracies: list[tuple[str, ...]] = [
        (_OVER_ALL.get(name, name), f"{test['only_model']:,}", f"{test['only_baseline']:,}", number(test["p"], 4))
        for name, test in facts["accuracy_tests"].items()
    ]
    blocks: list[Block] = []
    if aurocs:
        tested = ("Class", "Model", "Baseline", "Standard error", "z", "p")
        blocks.append(Table("AUROC (DeLong, components summed over patients)", tested, aurocs))
    if accuracies:
        counted = ("Over", "Only the model right", "Only the baseline right", "p")
        blocks.append(Table("Right and wrong (McNemar, exact, images taken for independent)", counted, accuracies))
    return blocks or [Text("There is nothing to test: the models do not both classify.")]
