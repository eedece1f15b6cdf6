"""Recipes of `training.py` against each other on the same test images: the mean over their seeds, paired over patients.

Reads the prediction rows that `training.py` keeps below its output (`predictions/`, `labels/`); nothing is scored again.
`soft vote` is one model made of a recipe's seeds: the mean of their probabilities.

    python benchmarks/training_pairs.py --output FOLDER [--resamples 500] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from facts import RESULTS
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from medvision_ray.evaluation.intervals import bootstrap_intervals

PAIRS = (
    ("brain-hybrid", "brain-classification", "brain_mri"),
    ("brain-hybrid", "brain-segmentation", "brain_mri"),
    ("chest-transfer", "chest-random", "chest_xray"),
)
PAIRED_RESAMPLES = 500


def recipe_rows(output: Path, recipe: str, table: str) -> list[pd.DataFrame]:
    """The test rows of each seed, all in the same order, with each image's patient."""
    paths = sorted((output / "predictions").glob(f"{recipe}-[0-9]*-test.parquet"))
    return [model_rows(output, path.stem, table) for path in paths]


def model_rows(output: Path, name: str, table: str) -> pd.DataFrame:
    """The rows of one model, such as `brain-hybrid-0-test`."""
    labels = pd.read_csv(output / "labels" / f"{table}.csv", dtype=str)
    patients = dict(zip(labels["image"], labels["patient_id"], strict=True))
    rows = pd.read_parquet(output / "predictions" / f"{name}.parquet").sort_values("uri", ignore_index=True)
    rows["patient"] = [patients[uri.partition(f"/{table}/")[2]] for uri in rows["uri"]]
    return rows


def figures(seeds: list[pd.DataFrame], images: NDArray[np.intp]) -> dict[str, float]:
    """Means over the seeds, and of the soft vote, on some images (with repetition)."""
    one = seeds[0].iloc[images]
    columns = [name for name in one.columns if name.startswith("p_")]
    result = {}
    if columns and one[[*columns, "true_label"]].notna().all(axis=None):
        classes = [name.removeprefix("p_") for name in columns]
        truth = np.array([classes.index(label) for label in one["true_label"]])
        each = [rows[columns].to_numpy(np.float64)[images] for rows in seeds]
        votes = [("", each), (" of the soft vote", [np.mean(each, axis=0)])]
        for name, probabilities in votes[: len(seeds)]:
            result |= {
                f"{key}{name}": value for key, value in _classification(truth, probabilities, len(classes)).items()
            }
    if "dice" in one and one["dice"].notna().any():
        result["dice"] = float(np.mean([rows["dice"].to_numpy()[images].mean() for rows in seeds]))
    return result


def _classification(truth: NDArray[np.intp], seeds: list[NDArray[np.float64]], classes: int) -> dict[str, float]:
    def mean(measure: Callable[[NDArray[np.float64]], float]) -> float:
        return float(np.mean([measure(probabilities) for probabilities in seeds]))

    every = range(classes)
    one_vs_rest = [
        [
            roc_auc_score(truth == k, probabilities[:, k]) if 0 < (truth == k).sum() < len(truth) else np.nan
            for k in every
        ]
        for probabilities in seeds
    ]
    return {
        "accuracy": mean(lambda p: accuracy_score(truth, p.argmax(axis=1))),
        "macro F1": mean(
            lambda p: f1_score(truth, p.argmax(axis=1), labels=list(every), average="macro", zero_division=0)
        ),
        "macro AUROC": float(np.nanmean(one_vs_rest)),
    }


def compare(seeds: list[pd.DataFrame], baseline: list[pd.DataFrame], resamples: int) -> dict[str, Any]:
    """Figures of both, their differences, and 95 % percentile intervals over patients, drawn alike for both."""
    first = seeds[0]
    assert all(rows["uri"].equals(first["uri"]) for rows in [*seeds, *baseline])
    every = np.arange(len(first))
    ours, theirs = figures(seeds, every), figures(baseline, every)
    shared = [key for key in ours if key in theirs]

    def statistic(weights: NDArray[np.float64]) -> dict[tuple[str, str], NDArray[np.float64]]:
        drawn = [np.repeat(every, row.astype(int)) for row in weights]
        pairs = [(figures(seeds, images), figures(baseline, images)) for images in drawn]
        return {("all", key): np.array([one[key] - other[key] for one, other in pairs]) for key in shared}

    limits = bootstrap_intervals(statistic, first["patient"].to_numpy(str), resamples=resamples, seed=0)
    return {
        "seeds": [len(seeds), len(baseline)],
        "images": len(first),
        "patients": int(first["patient"].nunique()),
        "figures": {
            key: {
                "value": ours[key],
                "baseline": theirs[key],
                "difference": ours[key] - theirs[key],
                "interval": list(limits.get(("all", key), (None, None))),
            }
            for key in shared
        },
    }


def main() -> None:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--resamples", type=int, default=PAIRED_RESAMPLES)
    parser.add_argument("--results", type=Path, default=RESULTS / "training_pairs.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"resamples": options.resamples, "pairs": {}}
    for recipe, baseline, table in PAIRS:
        ours, theirs = recipe_rows(options.output, recipe, table), recipe_rows(options.output, baseline, table)
        if not (ours and theirs):
            continue
        found = compare(ours, theirs, options.resamples)
        result["pairs"][f"{recipe} against {baseline}"] = found
        print(f"{recipe} against {baseline}: {found['seeds']} seeds, {found['patients']} patients")
        for key, row in found["figures"].items():
            low, high = row["interval"]
            print(
                f"  {key:<28} {row['value']:.4f} {row['baseline']:.4f} {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
