"""Recipes against each other fold by fold, from the validation histories that `training.py` records.

Each fold of a recipe (`NAME@2of5`) counts with its best epoch by `val_score`; a fold that stopped early in either recipe is left
out. The epoch was chosen on the fold itself, for both recipes alike, so levels flatter and differences tell.

    python benchmarks/training_folds.py [benchmarks/results/training_lite.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
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


def main() -> None:
    """Print means, the mean difference and its 95 % interval (Student, over folds)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "training_lite.json")
    found = best_of_folds(json.loads(parser.parse_args().results.read_text()))
    rows = []
    for ours, theirs, metrics in PAIRS:
        folds = sorted(found[ours].keys() & found[theirs].keys())
        for metric in metrics:
            pairs = [(found[ours][fold][metric], found[theirs][fold][metric]) for fold in folds]
            differences = [one - other for one, other in pairs]
            middle = statistics.mean(differences)
            reach = student.ppf(0.975, len(folds) - 1) * statistics.stdev(differences) / len(folds) ** 0.5
            levels = [f"{statistics.mean(side):.3f}" for side in zip(*pairs, strict=True)]
            each = " ".join(f"{value:+.3f}" for value in differences)
            rows.append(
                (theirs, metric, *levels, f"{middle:+.3f} [{middle - reach:+.3f}, {middle + reach:+.3f}]", each)
            )
    print_table(("against", "metric", PAIRS[0][0], "other", "difference", "each fold"), rows)


if __name__ == "__main__":
    main()
