"""Draw docs/figures/*.svg from the recorded results of trainings; nothing is measured here.

python benchmarks/draw_results.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from facts import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training_folds import best_of_folds, difference

from medvision_ray.reporting.plotting import INK, PALETTE, SOFT, styled, to_svg

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
OURS, OTHER = PALETTE[0], PALETTE[1]
TEST_PANELS = (
    ("Brain MRI: accuracy", ("all", "accuracy"), "brain", ((0.952, "published, other images"),)),
    ("Brain MRI: Dice", ("all", "dice"), "brain", ((0.775, "published, other images"),)),
    ("Chest X-rays: accuracy", ("all", "accuracy"), "chest", ((0.864, "published"), (0.911, "with ImageNet"))),
    ("Chest X-rays: AUROC", ("macro", "auroc"), "chest", ((0.956, "published"), (0.980, "with ImageNet"))),
)
PAIRED = (
    ("training_ensemble_tasks", "brain_hybrid_cpu against brain_classification_cpu", "classification alone"),
    ("training_pairs", "brain-hybrid against brain-classification", "classification alone"),
    ("training_pairs", "brain-hybrid against brain-segmentation", "segmentation alone"),
)
"""Each with the results that hold it, and what the hybrid is compared with."""
WHOSE = {"training_ensemble_tasks": "out of fold", "training_pairs": "test"}
PAIRED_METRICS = {"accuracy": "accuracy", "macro F1": "macro F1", "macro AUROC": "macro AUROC", "dice": "Dice"}


def main() -> None:
    """Write each figure."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in (("transfer", transfer), ("test", test), ("hybrid", hybrid)):
        with styled():
            place = FIGURES / f"{name}.svg"
            place.write_bytes(to_svg(draw()))
            sys.stdout.write(f"{place}\n")


def transfer() -> Figure:
    """Validation F1 by epoch of chest X-rays, from ImageNet weights and from a random start, otherwise the same recipe."""
    runs = [*recorded("training")["runs"], *recorded("training_seeds")["runs"]]
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for recipe, name, colour in (("chest_transfer", "ImageNet weights", OURS), ("chest_random", "random start", OTHER)):
        of_recipe = [run for run in runs if run["recipe"] == recipe]
        for run in of_recipe:
            history = run["history"]
            scores = [epoch["val_f1"] for epoch in history]
            axes.plot([epoch["epoch"] for epoch in history], scores, color=colour, marker="o", markersize=3)
        last = of_recipe[0]["history"][-1]
        text = f"{name}, seeds {', '.join(str(run['seed']) for run in of_recipe)}"
        offset = 10 if recipe == "chest_transfer" else -30
        axes.annotate(
            text,
            (last["epoch"], last["val_f1"]),
            (0, offset),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(title="Chest X-rays, 521 validation images", xlabel="epoch", ylabel="macro F1", ylim=(0.4, 1.02))
    return figure


def test() -> Figure:
    """Headline figures on the test splits with 95 % intervals, beside what is published."""
    models = {"brain": brain_models(), "chest": chest_models()}
    figure = Figure(figsize=(9, 5.2))
    for axes, (title, key, data, published) in zip(figure.subplots(2, 2).flat, TEST_PANELS, strict=True):
        rows = [(name, *figure_of(found, key)) for name, found in models[data]]
        whiskers(axes, rows)
        for place, (value, name) in enumerate(published):
            axes.axvline(value, color=OTHER, linestyle=(0, (5, 2)), linewidth=1.2)
            side: Any = ("left", " ") if len(published) > 1 and place == 0 else ("right", "")
            label = f"{side[1]}{name} {value:.3f} "
            axes.annotate(label, (value, -1.3 + 0.4 * place), ha=side[0], va="center", fontsize=8, color=OTHER)
        axes.set(title=title, ylim=(len(rows) - 0.4, -1.6))
    return figure


def brain_models() -> list[tuple[str, list[dict[str, Any]]]]:
    """Test rows of each brain hybrid: of single networks (GPU, 256 px) and of ensembles of folds (two cores, 224 px)."""
    single = [run for run in recorded("training_seeds")["runs"] if run["recipe"] == "brain_hybrid"]
    folds = [(0, "training_ensemble_earlier"), (1, "training_ensemble_seed1")]
    return [
        *[(f"one network, seed {run['seed']}", run["test"]) for run in single],
        *[(f"five folds, seed {seed}", recorded(name)["recipes"]["brain_hybrid_cpu"]["test"]) for seed, name in folds],
    ]


def chest_models() -> list[tuple[str, list[dict[str, Any]]]]:
    """Test rows of the three ensembles of folds, as they decided."""
    names = {6: "training_ensemble_chest", 7: "training_ensemble_chest_seed7", 8: "training_ensemble_chest_seed8"}
    rules = {6: ", class offsets"}
    return [
        (f"seed {seed}{rules.get(seed, '')}", recorded(name)["recipes"]["chest_cpu"]["test"])
        for seed, name in names.items()
    ]


def hybrid() -> Figure:
    """The hybrid against each task alone, paired over patients; of another encoder, over folds."""
    rows = []
    for name, pair, rival in PAIRED:
        found = recorded(name)["pairs"][pair]
        rows += [
            (
                f"{text} against {rival}, {found['patients']} patients, {WHOSE[name]}",
                row["difference"],
                *row["interval"],
            )
            for metric, text in PAIRED_METRICS.items()
            if (row := found["figures"].get(metric)) is not None
        ]
    lite = difference(
        best_of_folds(recorded("training_lite")), "brain_lite_hybrid", "brain_lite_segmentation", "val_dice"
    )
    name = f"Dice against segmentation alone, another encoder, {len(lite.each)} folds"
    figure = Figure(figsize=(9, 4.0))
    axes = figure.subplots()
    rows.append((name, lite.mean, *lite.interval))
    whiskers(axes, rows, sign="+")
    axes.axvline(0, color=SOFT, linewidth=1.2)
    axes.set(title="Brain MRI: what the hybrid gains and loses", ylim=(len(rows) - 0.5, -0.7))
    return figure


def whiskers(axes: Axes, rows: list[tuple[str, float, float, float]], sign: str = "") -> None:
    """A point and its interval a row, the first at the top; `sign` is that of a format, `+` for differences."""
    for place, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color=OURS, linewidth=2)
        axes.plot(value, place, "o", color=OURS, markersize=6)
        axes.annotate(
            f"{value:{sign}.3f}", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def figure_of(rows: list[dict[str, Any]], key: tuple[str, str]) -> tuple[float, float, float]:
    """Value and interval of a class and metric."""
    row = next(row for row in rows if (row["class_name"], row["metric"]) == key)
    return row["value"], row["ci_low"], row["ci_high"]


def recorded(name: str) -> dict[str, Any]:
    """The results of this name."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


if __name__ == "__main__":
    main()
