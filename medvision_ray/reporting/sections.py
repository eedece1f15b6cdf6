"""Parts that several reports have: the model, its training, its runs and failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medvision_ray.imaging.errors import SENTENCES, ErrorCode
from medvision_ray.reporting.figures_of_runs import bars, training_curves
from medvision_ray.reporting.page import Block, Details, Facts, Figure, Figures, Section, Table, Text
from medvision_ray.reporting.summary import number

RUN_COLUMNS = ("run_key", "started_at", "listed", "already_done", "scored", "failed", "seconds", "images_per_second")
_RUN_HEADS = ("Run", "Started", "Listed", "Already done", "Scored", "Failed", "Seconds", "Images per second")
_OTHER_CODE = "A reason that this version does not know."
_MOST_RUNS = 50
_SHOWN_IDS = 3


def checked(table: pd.DataFrame | None, columns: tuple[str, ...], name: str) -> pd.DataFrame | None:
    """The table, or None where it is empty.

    Raises:
        ValueError: it lacks a column.
    """
    if table is None or table.empty:
        return None
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"Expected the {name} of a report to have the columns {columns}, but {missing} are missing.")
    return table


def model_section(facts: Sequence[tuple[str, str]]) -> Section:
    """What the model is."""
    return Section("model", "Model", [Facts(facts) if facts else Text("There are no facts about the model.")])


def training_section(history: pd.DataFrame | None, best_epoch: int | None) -> Section:
    """How it learned."""
    if history is None or history.empty:
        return Section("training", "Training", [Text("There is no record of this model's training.")])
    return Section("training", "Training", [Figures([learning_curves(history, best_epoch)])])


def learning_curves(history: pd.DataFrame, best_epoch: int | None) -> Figure:
    """Loss, scores and learning rate with words on their course."""
    last = history.iloc[-1]
    parts = [f"{len(history)} epochs"]
    for column, name in (("train_loss", "train loss"), ("val_loss", "validation loss"), ("val_accuracy", "accuracy")):
        if column in history and history[column].notna().any():
            parts.append(f"{name} from {number(history[column].iloc[0])} to {number(last[column])}")
    kept = f" The dotted line is epoch {best_epoch}, whose weights were kept." if best_epoch is not None else ""
    caption = (
        "Where validation loss rises while train loss falls, the model learns its training images by heart." + kept
    )
    return Figure(training_curves(history, best_epoch), f"Learning curves: {', '.join(parts)}.", caption, wide=True)


def runs_section(runs: pd.DataFrame | None, failures: pd.DataFrame | None) -> Section:
    """What the model's runs did, newest first, and why objects failed."""
    table = checked(runs, RUN_COLUMNS, "runs")
    if table is None:
        return Section("runs", "Runs", [Text("This model has no finished run.")])
    newest = table.sort_values("started_at", ascending=False)
    rows = [_run_row(run) for _, run in newest.head(_MOST_RUNS).iterrows()]
    left = len(newest) - len(rows)
    blocks: list[Block] = [
        Text("Listed = already done + scored + failed. An object that failed has a reason, below."),
        Table("Runs, newest first", _RUN_HEADS, rows, left=2),
    ]
    if left:
        blocks.append(Text(f"{left} earlier runs are in the table `runs`."))
    return Section("runs", "Runs", [*blocks, *failure_blocks(failures)])


def failure_blocks(failures: pd.DataFrame | None) -> list[Block]:
    """Failed objects by reason.

    Args:
        failures: rows of the failures table with `error_code`, `stage` and `image_id`; None where there is no record.
    """
    if failures is None:
        return [Text("There is no record of failures.")]
    if failures.empty:
        return [Text("No object has failed.")]
    counts = failures["error_code"].map(_code).value_counts()
    sentences = {code.value: sentence for code, sentence in SENTENCES.items()}
    rows = []
    for code, count in counts.items():
        those = failures[failures["error_code"].map(_code) == code]
        ids = ", ".join(str(value) for value in those["image_id"].head(_SHOWN_IDS))
        stages = ", ".join(sorted(those["stage"].dropna().astype(str).unique()))
        rows.append((str(code), sentences.get(str(code), _OTHER_CODE), stages, ids, number(int(count), 0)))
    text = ", ".join(f"{code} {count}" for code, count in counts.items())
    svg = bars([str(code) for code in counts.index], list(counts), title="Failed objects by reason", xlabel="objects")
    heads = ("Code", "Meaning", "Stage", f"image_id of up to {_SHOWN_IDS}", "Objects")
    return [
        Figures([Figure(svg, f"Failed objects by reason: {text}.", "Each failed object has one reason.", wide=True)]),
        Table("Failures by reason", heads, rows, left=4),
        Text("The failures table has the addresses of all of them; this page, which is handed on, has none."),
    ]


def mapping_facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as names and values; lists in one line."""
    found: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            found.extend(mapping_facts(value, f"{name}: ") or [(name, "none")])
        elif isinstance(value, float):
            found.append((name, f"{value:.3g}" if 0 < abs(value) < 0.001 else number(value, 4)))
        else:
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return found


def settings_details(summary: str, mapping: Mapping[str, Any]) -> Details:
    """A mapping that few readers want, shown when asked for."""
    facts = mapping_facts(mapping)
    return Details(summary, [Facts(facts) if facts else Text("None recorded.")])


def moment(value: object) -> str:
    """A time to the minute."""
    return f"{value:%Y-%m-%d %H:%M}" if isinstance(value, pd.Timestamp) and not pd.isna(value) else str(value)


def _code(value: object) -> str:
    return value.value if isinstance(value, ErrorCode) else str(value)


def _run_row(run: pd.Series) -> list[str]:
    counts = [number(run[name], 0) for name in ("listed", "already_done", "scored", "failed")]
    speed = [number(run[name], 1) for name in ("seconds", "images_per_second")]
    return [str(run["run_key"]), moment(run["started_at"]), *counts, *speed]
