"""What could make a model look better than it is, as its training found it: leakage between splits, and shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medvision_ray.reporting.figures_of_groups import Estimate, intervals
from medvision_ray.reporting.page import Block, Details, Figure, Figures, Section, Table, Text
from medvision_ray.reporting.summary import number

_NAME, _TITLE = "guards", "Could it look better than it is"
_CHANCE = 0.5
_MOST_PAIRS = 20
_SPLITS = ("train", "val", "test")
Guarded = tuple[str, Mapping[str, Any]]
"""A training's name, and the facts of it (`trained` of its bundle)."""


def guards_section(trainings: Sequence[Guarded]) -> Section:
    """Leakage guards and the shortcut probe.

    Args:
        trainings: of the model; of each member of an ensemble.
    """
    looked = [(name, facts) for name, facts in trainings if isinstance(facts.get("leakage"), Mapping)]
    if not looked:
        return Section(_NAME, _TITLE, [Text("The model was trained by a version that did not record its guards.")])
    return Section(_NAME, _TITLE, [*_leakage(looked, several=len(trainings) > 1), *_shortcuts(looked)])


def _leakage(trainings: Sequence[Guarded], *, several: bool) -> list[Block]:
    pairs = sum((facts["leakage"]["near_duplicates"] or {}).get("pairs", 0) for _, facts in trainings)
    not_looked = [name for name, facts in trainings if facts["leakage"]["near_duplicates"] is None]
    said = "A patient, or the very same pixels, in two splits would have been refused. "
    if pairs:
        said += (
            f"{pairs:,} pairs of images in different splits look nearly the same: metrics on these images are too good."
        )
    elif not_looked:
        said += "Near-duplicates were not looked for (labels.near_duplicates: off)."
    else:
        said += "No two images of different splits look nearly the same."
    heads = ("Training", *_LEAK_HEADS) if several else _LEAK_HEADS
    rows = [((name,) if several else ()) + _leak_row(facts["leakage"]) for name, facts in trainings]
    blocks: list[Block] = [Text(said), Table("Leakage guards", heads, rows, left=int(several))]
    examples = [
        (name, *_pair_row(pair))
        for name, facts in trainings
        for pair in (facts["leakage"]["near_duplicates"] or {}).get("examples", [])
    ]
    if examples:
        table = Table("The nearest pairs", ("Training", *_PAIR_HEADS), examples[:_MOST_PAIRS], left=3)
        text = Text("Rows of the label table, the first below the header being 1. Of 256 bits, up to 32 may differ.")
        blocks.append(Details("Which images look nearly the same", [text, table]))
    return blocks


_LEAK_HEADS = (
    "Patients in two splits",
    "Exact copies in two splits",
    "Exact copies within a split",
    "Near-duplicates in two splits",
    "Images compared",
)
_PAIR_HEADS = ("Rows", "Splits", "Differing bits")


def _leak_row(leakage: Mapping[str, Any]) -> tuple[str, ...]:
    within = leakage["exact_copies_within_a_split"]
    near = leakage["near_duplicates"]
    by_split = ", ".join(f"{split} {within[split]:,}" for split in _SPLITS if within.get(split))
    found = ("not looked for", "–")
    if near is not None:
        images = ", ".join(f"{count:,} of {split}" for split, count in near["images"].items() if count)
        found = (f"{near['pairs']:,} pairs" + (f" ({images})" if images else ""), f"{near['compared']:,}")
    return (
        number(leakage["patients_in_two_splits"], 0),
        number(leakage["exact_copies_across_splits"], 0),
        by_split or "0",
        *found,
    )


def _pair_row(pair: Mapping[str, Any]) -> tuple[str, str, str]:
    rows, splits = pair["rows"], pair["splits"]
    return " and ".join(map(str, rows)), " and ".join(splits), str(pair["distance"])


def _shortcuts(trainings: Sequence[Guarded]) -> list[Block]:
    """The probe of each training; alike ones, as of an ensemble of one table, once."""
    found: dict[str, Guarded] = {}
    for name, facts in trainings:
        probe = facts.get("shortcuts")
        if isinstance(probe, Mapping):
            found.setdefault(repr(probe), (name, probe))
    if not found:
        return [Text("Whether the acquisition alone tells the label was not looked at: the model tells no classes.")]
    blocks: list[Block] = []
    for name, probe in found.values():
        blocks.append(Text((f"{name}: " if len(found) > 1 else "") + str(probe["sentence"]).replace("`", "")))
        lines = [
            Estimate(
                _line(family, class_name), item["auroc"], item["ci_low"], item["ci_high"], emphasised=family == "all"
            )
            for family, classes in probe["classes"].items()
            for class_name, item in classes.items()
        ]
        if lines:
            blocks.append(Figures([_probe_figure(lines)]))
        if probe["alike"]:
            blocks.append(Text(f"Alike in all images, so they tell nothing: {', '.join(probe['alike'])}."))
    return blocks


def _line(family: str, class_name: str) -> str:
    return f"{'all facts' if family == 'all' else family}: {class_name}"


def _probe_figure(lines: Sequence[Estimate]) -> Figure:
    svg = intervals(
        lines, title="Told from the acquisition alone", xlabel="AUROC without pixels (0.5 is chance)", reference=_CHANCE
    )
    said = "; ".join(f"{each.name} {number(each.value, 2)}" for each in lines)
    caption = (
        "How well a small forest tells each class from how the image was made, without a pixel, with 95 % intervals over "
        "patients; the line is chance. Right of it a network can learn the scanner in place of the disease."
    )
    return Figure(svg, f"AUROC of the shortcut probe: {said}.", caption, wide=True)
