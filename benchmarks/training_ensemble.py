"""A recipe over folds by patient, its models as an ensemble, and the test split scored once with that.

What a data set without patients to spare for a val split gains: every train and val patient teaches all models but one. Killed
at any moment, the same command goes on. The out-of-fold figures are of train and val patients and flatter a little (each
fold chose its model's epoch); the test figures are of patients that no model has seen.

    python benchmarks/training_ensemble.py --output FOLDER [--recipe brain_hybrid_cpu] [--folds 5] [--seed 0] [--no-test] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Train the folds, score the test split, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--recipe", type=known_recipe, default="brain_hybrid_cpu")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "training_ensemble.json")
    parser.add_argument("--lite-weights", type=Path, default=ROOT / "benchmarks" / ".made" / "weights")
    parser.add_argument("--no-test", action="store_true", help="the test split is not read")
    parser.add_argument("--quick", action="store_true", help="to try the script")
    options = parser.parse_args()
    plan = Campaign(
        output=options.output.resolve(),
        data=Path(os.environ.get("MEDVISION_DATA", ROOT / "../shared/data")).resolve(),
        lite_weights=options.lite_weights.resolve(),
        recipes=(options.recipe,),
        seeds=(options.seed,),
        deadline=0.0,
        cpus=os.cpu_count() or 2,
        quick=options.quick,
        test=not options.no_test,
    )
    source, write_labels = TABLES[data_of(options.recipe)]
    labels = write_labels(
        plan.data / source, plan.output / "labels" / f"{source}.csv", 48 if plan.quick else None, None
    )
    found = run(plan, options.recipe, options.seed, options.folds)
    facts = {"machine": machine(*PACKAGES), "quick": plan.quick, "table": labels, "recipe": options.recipe}
    settings = settings_of(plan, options.recipe, options.seed, options.folds)
    shown = {key: settings[key] for key in settings if key not in ("output", "labels", "privacy")}
    shown["model"] = {**shown["model"], "weights": single_weights(shown["model"])}
    write_json(options.results, {**facts, "settings": shown, **found})
    rows = [(row["metric"], row["class_name"], row["value"], row["ci_low"], row["ci_high"]) for row in found["test"]]
    print_table(("metric", "class", "value", "from", "to"), rows)


def single_weights(model: dict[str, Any]) -> str | None:
    """A weights file by its name alone."""
    return None if model["weights"] is None else Path(model["weights"]).name


def settings_of(plan: Campaign, recipe: str, seed: int, folds: int) -> dict[str, Any]:
    """The train job: all cores to one fold at a time, since two at once share the way to memory."""
    settings = single_settings(plan, recipe, seed)
    ray = {"num_cpus": plan.cpus, "object_store_bytes": STORE_BYTES}
    return {**settings, "folds": folds, "cpus_per_worker": plan.cpus, "ray": ray}


def run(plan: Campaign, recipe: str, seed: int, folds: int) -> dict[str, Any]:
    """What came of it: a row a fold, pooled out-of-fold figures, the ensemble's test figures."""
    from medvision_ray import tables
    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.folds import cross_validate

    started = time.perf_counter()
    settings = settings_of(plan, recipe, seed, folds)
    trained = cross_validate(build_job(TrainJob, settings, "the benchmark"), say)
    fitted = time.perf_counter()
    test = evaluate_split(plan, recipe, seed, "test") if plan.test else []
    kept = ("fold", "model_id", "images", "patients", "best_epoch", "metrics")
    rows = []
    for row in trained.summary["folds"]:
        member = load_bundle(row["bundle"])
        threshold = {"value": member.mask_threshold, **member.trained.get("mask_threshold", {})}
        rows.append({**{key: row[key] for key in kept}, "mask_threshold": threshold})
    pooled = tables.read(settings["output"], "metrics").to_pandas()
    ours = (pooled["model_id"] == trained.bundle.model_id) & (pooled["subgroup"] == "all")
    pooled = pooled[ours & (pooled["split"] == "out_of_fold")]
    shown = pooled[["class", "metric", "value", "ci_low", "ci_high", "n_images", "n_patients"]]
    return {
        "model_id": trained.bundle.model_id,
        "seconds": {"train": fitted - started, "test": time.perf_counter() - fitted},
        "folds": rows,
        "out_of_fold": json.loads(shown.to_json(orient="records")),
        "mean": trained.summary["mean"],
        "std": trained.summary["std"],
        "test": test,
    }


if __name__ == "__main__":
    main()
