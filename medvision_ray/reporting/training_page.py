"""The report of a training: how the model learned, from what, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from medvision_ray.reporting.figures_of_runs import bars, training_speed
from medvision_ray.reporting.folds_section import Folds, folds_section
from medvision_ray.reporting.guards_section import Guarded, guards_section
from medvision_ray.reporting.page import Block, Details, Figure, Figures, Section, Table, Text, Tiles
from medvision_ray.reporting.sections import learning_curves, model_section, settings_details
from medvision_ray.reporting.summary import NAMES, Tile, number

_SHOWN_APART = ("labels", "leakage", "shortcuts", "members")
_TILES = ("val_accuracy", "val_f1", "val_auroc", "val_dice")


@dataclass(frozen=True, eq=False)
class Trained:
    """What the page shows.

    Attributes:
        model: facts about the model as name and value.
        history: a row per epoch; None where there is no record.
        trained: the bundle's facts of the training.
        metrics: the bundle's validation metrics.
        settings: other parts of the bundle that a reader may ask for, by heading.
        guards: name and facts of the training, of an ensemble those of each member.
        folds: of a cross-validation; None where it is none.
    """

    model: Sequence[tuple[str, str]] = ()
    history: pd.DataFrame | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guards: Sequence[Guarded] = ()
    folds: Folds | None = None


def training_sections(content: Trained) -> list[Section]:
    """The sections of the page, in order."""
    return [
        _short(content),
        _course(content),
        folds_section(content.folds),
        _data(content),
        guards_section(content.guards),
        _speed(content),
        model_section(content.model),
        _settings(content),
    ]


def _short(content: Trained) -> Section:
    tiles = []
    basis = "validation, whole split"
    for name in _TILES:
        value = content.metrics.get(name)
        if isinstance(value, int | float):
            plain = name.removeprefix("val_")
            over = ", mean over classes" if plain in ("f1", "auroc") else ""
            tiles.append(Tile(NAMES.get(plain, plain) + over, number(float(value)), "", basis))
    said = (
        "These are figures of the validation split, which chose this model, so they are better than on new patients. Only an "
        "evaluation on the test split says how good it is."
    )
    return Section(
        "short", "In short", [Text(said), Tiles(tiles)] if tiles else [Text("No validation metrics are recorded.")]
    )


def _course(content: Trained) -> Section:
    best = content.trained.get("best_epoch")
    history = content.history
    if history is None or history.empty:
        return Section("course", "How it learned", [Text("There is no record of this model's training.")])
    blocks: list[Block] = [Figures([learning_curves(history, best if isinstance(best, int) else None)])]
    columns = [str(name) for name in history if name != "epoch" and pd.api.types.is_numeric_dtype(history[str(name)])]
    rows = [[f"{row['epoch']:.0f}", *[number(row[name], 4) for name in columns]] for _, row in history.iterrows()]
    table = Table("Epochs", ("Epoch", *[name.replace("_", " ") for name in columns]), rows)
    return Section("course", "How it learned", [*blocks, Details("Every epoch as a table", [table])])


def _data(content: Trained) -> Section:
    labels = content.trained.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        return Section("data", "What it learned from", [])
    rows, names, values = [], [], []
    for split, facts in labels.items():
        if isinstance(facts, Mapping):
            counts = [number(facts.get(key), 0) for key in ("images", "patients", "with_mask", "unlabelled")]
            rows.append((str(split), *counts))
            for class_name, count in (facts.get("classes") or {}).items():
                if split == "train":
                    names.append(str(class_name))
                    values.append(float(count))
    heads = ("Split", "Images", "Patients", "With a mask", "Without a label")
    blocks: list[Block] = [Text("No patient is in two splits."), Table("Splits", heads, rows)]
    if names:
        said = ", ".join(f"{name} {value:,.0f}" for name, value in zip(names, values, strict=True))
        svg = bars(names, values, title="Train images by class", xlabel="images")
        blocks.append(
            Figures([Figure(svg, f"Train images by class: {said}.", "Rare classes are learned worse.", wide=True)])
        )
    return Section("data", "What it learned from", blocks)


def _speed(content: Trained) -> Section:
    history = content.history
    needed = {"seconds", "images_per_second", "wait_seconds"}
    if history is None or history.empty or not needed <= set(history):
        return Section("speed", "How fast", [])
    later = history.iloc[1:] if len(history) > 1 else history
    speed, share = later["images_per_second"].mean(), later["wait_seconds"].sum() / max(later["seconds"].sum(), 1e-9)
    said = f"{number(speed, 1)} images per second after the first epoch, {share:.1%} of the time waiting for data"
    figure = Figure(training_speed(history), f"{said}.", f"{said}. The first epoch also warms up.", wide=True)
    return Section("speed", "How fast", [Figures([figure])])


def _settings(content: Trained) -> Section:
    rest = {key: value for key, value in content.trained.items() if key not in _SHOWN_APART}
    figures = {key: value for key, value in content.metrics.items() if not isinstance(value, Mapping)}
    parts = {"Facts of the training": rest, "Validation metrics": figures, **content.settings}
    return Section("settings", "Settings", [settings_details(name, part) for name, part in parts.items() if part])
