"""Recipes over folds by patient: each one's models as an ensemble on the test split, and the recipes against each other out of fold.

What a data set without patients to spare for a val split gains by it: every train and val patient teaches all models of a recipe but
one, and is predicted by that one. So recipes are compared over all of these patients, where the test split has few. Each fold chose
its model's epoch, for all recipes alike: out-of-fold levels flatter a little, differences tell. The test figures are of patients that no
model has seen, and each ensemble is scored on them once, with the mask threshold that it chose out of fold (and class offsets, where a
recipe asks for them; `test_likeliest` are those of the likeliest class in the same rows). Killed at any moment, the same command goes on.

    python benchmarks/training_ensemble.py --output FOLDER [--recipes brain_hybrid_cpu ...] [--folds 5] [--seed 0] [--no-test] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from facts import RESULTS, machine, print_table
from training import (
    PACKAGES,
    ROOT,
    STORE_BYTES,
    TABLES,
    Campaign,
    data_of,
    evaluate_split,
    known_recipe,
    say,
    write_json,
)
from training import settings_of as single_settings
from training_pairs import PAIRED_RESAMPLES, compare, figures, model_rows


def main() -> None:
    """Train the folds of each recipe, score the test split, compare, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--recipes", nargs="+", type=known_recipe, default=["brain_hybrid_cpu"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "training_ensemble.json")
    parser.add_argument("--lite-weights", type=Path, default=ROOT / "benchmarks" / ".made" / "weights")
    parser.add_argument("--no-test", action="store_true", help="the test split is not read")
    parser.add_argument("--quick", action="store_true", help="to try the script")
    options = parser.parse_args()
    if len({data_of(recipe) for recipe in options.recipes}) > 1:
        parser.error("Expected recipes of one data set, since they are compared on the same images.")
    plan = Campaign(
        output=options.output.resolve(),
        data=Path(os.environ.get("MEDVISION_DATA", ROOT / "../shared/data")).resolve(),
        lite_weights=options.lite_weights.resolve(),
        recipes=tuple(options.recipes),
        seeds=(options.seed,),
        deadline=0.0,
        cpus=os.cpu_count() or 2,
        quick=options.quick,
        test=not options.no_test,
    )
    source, write_labels = TABLES[data_of(options.recipes[0])]
    labels = plan.output / "labels" / f"{source}.csv"
    facts = {
        "machine": machine(*PACKAGES),
        "quick": plan.quick,
        "folds": options.folds,
        "table": write_labels(plan.data / source, labels, 48 if plan.quick else None, None),
    }
    before = json.loads(options.results.read_text())["recipes"] if options.results.exists() else {}
    done: dict[str, Any] = {}
    rows: dict[str, pd.DataFrame] = {}
    pairs: dict[str, Any] = {}
    for recipe in options.recipes:
        done[recipe], rows[recipe] = run(plan, recipe, options.folds, before.get(recipe, {}))
        first = options.recipes[0]
        if recipe != first:
            pairs[f"{first} against {recipe}"] = compare([rows[first]], [rows[recipe]], PAIRED_RESAMPLES)
        write_json(options.results, {**facts, "recipes": {**before, **done}, "pairs": pairs})
    show(done, pairs)


def settings_of(plan: Campaign, recipe: str, folds: int) -> dict[str, Any]:
    """The train job: all cores to one fold at a time, since two at once share the way to memory."""
    settings = single_settings(plan, recipe, plan.seeds[0])
    ray = {"num_cpus": plan.cpus, "object_store_bytes": STORE_BYTES}
    return {**settings, "folds": folds, "cpus_per_worker": plan.cpus, "ray": ray}


def run(plan: Campaign, recipe: str, folds: int, before: dict[str, Any]) -> tuple[dict[str, Any], pd.DataFrame]:
    """One recipe: its facts, and its out-of-fold rows as `training_pairs` takes them.

    Args:
        before: what is recorded of the recipe; of the same ensemble the test split is not scored again.
    """
    from medvision_ray import tables
    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.folds import cross_validate
    from medvision_ray.learning.history import read_history

    settings = settings_of(plan, recipe, folds)
    trained = cross_validate(build_job(TrainJob, settings, "the benchmark"), say)
    model = trained.bundle.model_id
    test, likeliest = [], {}
    if plan.test:
        known = before.get("test", []) if before.get("model_id") == model else []
        test = known or evaluate_split(plan, recipe, plan.seeds[0], "test")
        rows = model_rows(plan.output, f"{settings['name']}-test", TABLES[data_of(recipe)][0])
        likeliest = figures([rows], np.arange(len(rows)))
    members = []
    for row in trained.summary["folds"]:
        bundle = load_bundle(row["bundle"])
        kept = {key: row[key] for key in ("fold", "model_id", "images", "patients", "best_epoch", "metrics")}
        history = read_history(f"{settings['output']}/training/{bundle.name}/metrics.jsonl")
        seconds = sum(epoch["seconds"] for epoch in history)
        members.append({**kept, "seconds": seconds})
    measured = tables.read(settings["output"], "metrics").to_pandas()
    ours = (measured["model_id"] == model) & (measured["subgroup"] == "all") & (measured["split"] == "out_of_fold")
    pooled = measured[ours][["class", "metric", "value", "ci_low", "ci_high", "n_images", "n_patients"]]
    facts = {
        "settings": _shown(settings),
        "model_id": model,
        "folds": members,
        "class_offsets": {"values": trained.bundle.class_offsets, **trained.bundle.trained.get("class_offsets", {})},
        "mask_threshold": {"value": trained.bundle.mask_threshold, **trained.bundle.trained.get("mask_threshold", {})},
        "out_of_fold": json.loads(pooled.to_json(orient="records")),
        "test": test,
        "test_likeliest": likeliest,
    }
    predictions = pd.read_parquet(trained.summary["out_of_fold"].removeprefix("file://"))
    predictions["patient"] = predictions["patient_number"].astype(str)
    return facts, predictions


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without places of this machine."""
    shown = {key: value for key, value in settings.items() if key not in ("output", "labels", "privacy")}
    weights = shown["model"]["weights"]
    return {**shown, "model": {**shown["model"], "weights": None if weights is None else Path(weights).name}}


def show(done: dict[str, Any], pairs: dict[str, Any]) -> None:
    """The headline figures of each recipe, then the pairs."""
    wanted = (("all", "accuracy"), ("macro", "f1"), ("macro", "auroc"), ("all", "dice"))
    lines: list[tuple[object, ...]] = []
    for recipe, facts in done.items():
        for split, name in (("out_of_fold", "class"), ("test", "class_name")):
            found = {(row[name], row["metric"]): row for row in facts[split]}
            for key in wanted:
                if key in found:
                    row = found[key]
                    lines.append((recipe, split, key[1], row["value"], row["ci_low"], row["ci_high"]))
    print_table(("recipe", "split", "metric", "value", "from", "to"), lines)
    differences = [
        (pair, metric, row["value"], row["baseline"], row["difference"], *row["interval"])
        for pair, found in pairs.items()
        for metric, row in found["figures"].items()
    ]
    print_table(("pair", "metric", "value", "other", "difference", "from", "to"), differences)


if __name__ == "__main__":
    main()
