"""The report of a night: what a scoring run did, what failed, how fast it was, what it predicted, and whether that drifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from medvision_ray.reporting.figures_of_runs import bars, probability_histograms
from medvision_ray.reporting.page import Block, Facts, Figure, Figures, Section, Table, Text, Tiles
from medvision_ray.reporting.sections import failure_blocks, model_section, moment, settings_details
from medvision_ray.reporting.summary import Tile, number

STAGES = ("list", "read", "decode", "preprocess", "predict", "write")
GROUPS = ("modality", "manufacturer", "patient_sex", "patient_age_band", "body_part")
DRIFT_METRICS = ("drift_psi", "drift_ks", "drift_shifted")
_COUNTS = ("listed", "excluded", "already_done", "scored", "failed", "retried", "not_scored")
_MOST_GROUPS = 20
_NOTABLE_PSI, _LARGE_PSI = 0.1, 0.25
_GB = 1e9


@dataclass(frozen=True, eq=False)
class Night:
    """What the page shows.

    Attributes:
        run: the run's row of the table `runs`.
        classes: names.
        probabilities: of the run's objects, `(n, classes)`; None where the run scored nothing or has no classes.
        predictions: the run's rows of predictions with `predicted_label`, `mask_fraction`, `frames` and `GROUPS`; None without.
        failures: the run's rows of failures.
        drift: the run's rows of metrics with `DRIFT_METRICS`; None without.
        model: facts about the model as name and value.
        versions: of libraries, by name.
    """

    run: Mapping[str, Any]
    classes: Sequence[str] = ()
    probabilities: np.ndarray[Any, Any] | None = None
    predictions: pd.DataFrame | None = None
    failures: pd.DataFrame | None = None
    drift: pd.DataFrame | None = None
    model: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, Any] | None = None


def night_sections(content: Night) -> list[Section]:
    """The sections of the page, in order."""
    return [
        _short(content),
        Section("failures", "What failed", failure_blocks(content.failures)),
        _speed(content),
        _predicted(content),
        _groups(content),
        _drift(content),
        model_section(content.model),
        Section("settings", "Versions", [settings_details("Libraries", content.versions)] if content.versions else []),
    ]


def _short(content: Night) -> Section:
    run = content.run
    scored, failed = (int(run.get(key) or 0) for key in ("scored", "failed"))
    tried = scored + failed
    share = f"{failed / tried:.2%} of {tried:,} tried" if tried else "nothing was tried"
    tiles = [
        Tile("Scored", number(scored, 0), "", f"of {number(run.get('listed'), 0)} listed"),
        Tile("Failed", number(failed, 0), "", share),
        Tile("Already done", number(run.get("already_done"), 0), "", "by earlier runs of this model"),
        Tile("Images per second", number(run.get("images_per_second"), 1), "", "of the scoring pass"),
    ]
    state = run.get("state")
    ended = {"complete": "It is complete.", "deadline": "Its time was over first; the next run goes on with the rest."}
    facts = [
        ("Run", str(run.get("run_key"))),
        ("Started", moment(run.get("started_at"))),
        ("Finished", moment(run.get("finished_at"))),
        ("Took", f"{number(run.get('seconds'), 1)} s"),
        (
            "Counts",
            ", ".join(
                f"{name.replace('_', ' ')} {number(run.get(name), 0)}" for name in _COUNTS if _known(run.get(name))
            ),
        ),
    ]
    said = f"Every listed object ended as one row, scored or failed. {ended.get(str(state), '')}".strip()
    return Section("short", "In short", [Text(said), Tiles(tiles), Facts(facts)])


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)


def _speed(content: Night) -> Section:
    seconds: dict[str, Any] = {name: content.run.get(f"{name}_seconds") for name in STAGES}
    known = {name: float(value) for name, value in seconds.items() if _known(value)}
    if not known:
        return Section("speed", "How fast", [])
    said = ", ".join(f"{name} {value:,.1f} s" for name, value in known.items())
    svg = bars(
        list(known), list(known.values()), title="Seconds by stage, over all workers", xlabel="seconds", digits=1
    )
    slowest = max(known, key=lambda name: known[name])
    caption = f"Sums over objects in the threads that did the work, so they exceed the run's own time. `{slowest}` takes the most."
    facts = []
    if _known(content.run.get("bytes_read")):
        facts.append(("Read", f"{float(content.run['bytes_read']) / _GB:,.2f} GB"))
    if _known(content.run.get("peak_memory_bytes")):
        facts.append(("Largest worker", f"{float(content.run['peak_memory_bytes']) / _GB:,.2f} GB of memory"))
    blocks: list[Block] = [Figures([Figure(svg, f"Seconds by stage: {said}.", caption, wide=True)])]
    return Section("speed", "How fast", [*blocks, Facts(facts)] if facts else blocks)


def _predicted(content: Night) -> Section:
    rows = content.predictions
    if rows is None or rows.empty:
        return Section("predicted", "What it predicted", [Text("This run has no predictions.")])
    drawn = []
    if content.probabilities is not None and len(content.classes):
        median = np.nanmedian(content.probabilities, axis=0)
        said = ", ".join(f"{name} {value:.2f}" for name, value in zip(content.classes, median, strict=True))
        caption = (
            "A heap in the middle is a model that is unsure; a night that looks unlike other nights is worth a look."
        )
        svg = probability_histograms(content.probabilities, content.classes)
        drawn.append(Figure(svg, f"How often each probability was given. Medians: {said}.", caption, wide=True))
    counts = rows["predicted_label"].replace("", "nothing").dropna().value_counts().head(_MOST_GROUPS)
    if len(counts):
        said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        svg = bars([str(name) for name in counts.index], list(counts), title="Objects by prediction", xlabel="objects")
        drawn.append(Figure(svg, f"Objects by prediction: {said}.", "Predictions, not diagnoses.", wide=True))
    facts = [("Objects of several frames", f"{int((rows['frames'] > 1).sum()):,}")]
    masks = rows["mask_fraction"].dropna()
    if len(masks):
        facts.append(("Objects with a mask", f"{int((masks > 0).sum()):,} of {len(masks):,}"))
        if (masks > 0).any():
            facts.append(("Median size of these masks", f"{masks[masks > 0].median():.2%} of the frame"))
    return Section("predicted", "What it predicted", [Figures(drawn), Facts(facts)] if drawn else [Facts(facts)])


def _groups(content: Night) -> Section:
    rows = content.predictions
    if rows is None or rows.empty:
        return Section("groups", "Of whom", [])
    blocks: list[Block] = []
    for name in GROUPS:
        if name in rows and rows[name].notna().any():
            values = rows[name].fillna("unknown")
            counts = values.value_counts()
            lines = [_group_row(rows[values == value], str(value)) for value in counts.index[:_MOST_GROUPS]]
            if len(counts) > _MOST_GROUPS:
                lines.append(
                    (f"{len(counts) - _MOST_GROUPS} others", number(int(counts[_MOST_GROUPS:].sum()), 0), "", "")
                )
            heads = (
                name.replace("_", " ").capitalize(),
                "Objects",
                "Mean probability of the prediction",
                "With a mask",
            )
            blocks.append(Table(f"By {name.replace('_', ' ')}", heads, lines))
    return Section("groups", "Of whom", blocks)


def _group_row(rows: pd.DataFrame, name: str) -> tuple[str, str, str, str]:
    sure = rows["predicted_probability"].mean()
    masks = rows["mask_fraction"].dropna()
    marked = f"{(masks > 0).mean():.0%}" if len(masks) else "–"
    return name, f"{len(rows):,}", number(float(sure)) if _known(sure) else "–", marked


def _drift(content: Night) -> Section:
    name, title = "drift", "Does it look like the training"
    rows = content.drift
    if rows is None or rows.empty:
        return Section(
            name, title, [Text("This run was not compared with the training: there are no drift rows of it.")]
        )
    by_feature: dict[str, dict[str, Any]] = {}
    for _, row in rows.iterrows():
        feature = row["subgroup_value"] if _known(row["subgroup_value"]) else row["class_name"]
        by_feature.setdefault(str(feature), {"n": row["n_images"]})[row["metric"]] = row["value"]
    ordered = sorted(by_feature.items(), key=lambda item: -float(item[1].get("drift_psi") or 0.0))
    shifted = [feature for feature, found in ordered if found.get("drift_shifted") == 1]
    psi = [(feature, float(found["drift_psi"])) for feature, found in ordered if _known(found.get("drift_psi"))]
    said = f"Shifted: {', '.join(shifted)}." if shifted else "No feature is marked as shifted."
    if any(value >= _LARGE_PSI and feature not in shifted for feature, value in psi):
        said += " A PSI over 0.25 that is not marked is one that chance reaches with so few patients."
    blocks: list[Block] = [Text(said)]
    if psi:
        marks = ((_NOTABLE_PSI, "notable"), (_LARGE_PSI, "large"))
        top = psi[:_MOST_GROUPS]
        svg = bars(
            [f for f, _ in top],
            [v for _, v in top],
            title="Population stability index",
            xlabel="PSI",
            digits=2,
            marks=marks,
        )
        alt = ", ".join(f"{feature} {value:.2f}" for feature, value in top)
        caption = (
            "How far this run lies from the training images, feature by feature: below 0.1 is usual, over 0.25 another population "
            "if the patients are many."
        )
        blocks.append(Figures([Figure(svg, f"PSI by feature: {alt}.", caption, wide=True)]))
    lines = [
        (
            feature,
            *[number(found.get(metric)) for metric in DRIFT_METRICS[:2]],
            "shifted" if feature in shifted else "",
            number(found["n"], 0),
        )
        for feature, found in ordered
    ]
    return Section(name, title, [*blocks, Table("Drift by feature", ("Feature", "PSI", "KS", "", "Images"), lines)])
