"""Recipes against each other fold by fold, from the validation histories that `training.py` records.

Each fold of a recipe (`NAME@2of5`) counts with its best epoch by `val_score`; a fold that stopped early in either recipe is left
out. The epoch was chosen on the fold itself, for both recipes alike, so levels flatter and differences tell.

    python benchmarks/training_folds.py [benchmarks/results/training_lite.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import RESULTS, print_table
from scipy.stats import t as student

PAIRS = (
    ("brain_lite_hybrid", "brain_lite_classification", ("val_accuracy", "val_f1", "val_auroc")),
    ("brain_lite_hybrid", "brain_lite_segmentation", ("val_dice",)),
)


def best_of_folds(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The best epoch of each whole run: by recipe and fold."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in [*result["runs"], *result["unfinished"]]:
        recipe, _, fold = run["recipe"].partition("@")
        if fold and len(run["history"]) == result["recipes"][run["recipe"]]["epochs"]:
            found.setdefault(recipe, {})[fold] = max(run["history"], key=lambda epoch: float(epoch["val_score"]))
    return found


@dataclass(frozen=True)
class Difference:
    """One recipe less another, over the folds of both.

    Attributes:
        levels: their means.
        each: the difference in each fold.
        interval: 95 %, Student's, over folds.
    """

    levels: tuple[float, float]
    each: tuple[float, ...]
    mean: float
    interval: tuple[float, float]


def difference(found: dict[str, dict[str, dict[str, float]]], ours: str, theirs: str, metric: str) -> Difference:
    """The difference in a metric over the folds that `best_of_folds` has of both recipes."""
    folds = sorted(found[ours].keys() & found[theirs].keys())
    pairs = [(found[ours][fold][metric], found[theirs][fold][metric]) for fold in folds]
    each = tuple(one - other for one, other in pairs)
    middle = statistics.mean(each)
    reach = float(student.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / len(each) ** 0.5
    levels = statistics.mean(one for one, _ in pairs), statistics.mean(other for _, other in pairs)
    return Difference(levels, each, middle, (middle - reach, middle + reach))


def main() -> None:
    """Print means, the mean difference and its interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "training_lite.json")
    found = best_of_folds(json.loads(parser.parse_args().results.read_text()))
    rows = []
    for ours, theirs, metrics in PAIRS:
        for metric in metrics:
            of_pair = difference(found, ours, theirs, metric)
            levels = [f"{level:.3f}" for level in of_pair.levels]
            each = " ".join(f"{value:+.3f}" for value in of_pair.each)
            low, high = of_pair.interval
            rows.append((theirs, metric, *levels, f"{of_pair.mean:+.3f} [{low:+.3f}, {high:+.3f}]", each))
    print_table(("against", "metric", PAIRS[0][0], "other", "difference", "each fold"), rows)


if __name__ == "__main__":
    main()
