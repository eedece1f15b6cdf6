"""The training table: recipes times seeds through the train and evaluate jobs, several at once, resumable.

Brain MRI: the hybrid against each of its tasks alone, at the same budget. Chest
X-rays: ImageNet weights against a random start. Rows of a label table whose image is not an image file are left out and
counted; chest X-rays get a val split by patient out of train. Validation alone chooses epochs and compares recipes; the
test split is scored once for each finished seed. Trainings share the machine as lanes: processes with a Ray of their own
that take the next run of the list, the most valuable first. Killed or out of time, the results file holds what is
finished; the same command goes on.

A recipe can be asked for fold by fold, `brain_hybrid@1of5` to `@5of5`: train and val patients in five, each model scored on
the fold that it was not trained on (which chose its epoch too).

    python benchmarks/training.py --output FOLDER [--jobs 4] [--time-limit SECONDS] [--recipes NAME ...] [--seeds 0 1 2]
                                  [--results FILE] [--validation-only] [--lite-weights FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facts import RESULTS, machine, print_table
from training_recipes import KNOWN, QUICK, RECIPES
from training_tables import brain_labels, chest_labels, summary

ROOT = Path(__file__).resolve().parents[1]
TABLES = {"brain": ("brain_mri", brain_labels), "chest": ("chest_xray", chest_labels)}
STORE_BYTES = 2 << 30
PACKAGES = ("torch", "torchvision", "ray", "segmentation-models-pytorch", "timm")


@dataclass(frozen=True)
class Campaign:
    """What every lane is told.

    Attributes:
        output: all trainings, records, predictions and logs.
        data: the folder of the data sets.
        lite_weights: a folder of what `lite_weights.py` makes, `lite0.safetensors` and so on.
        deadline: Unix time after which nothing is begun that would not end before it.
        cpus: of each lane.
        test: score the test split of what is trained; else its val split alone is looked at.
    """

    output: Path
    data: Path
    lite_weights: Path
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    deadline: float
    cpus: int
    quick: bool
    test: bool

    def tasks(self) -> list[tuple[str, str, int]]:
        """Kind, recipe and seed: all recipes once, then the further seeds, then folds (of one seed), val splits last."""
        whole = [(recipe, seed) for seed in self.seeds for recipe in self.recipes if fold_of(recipe) is None]
        folds = [(recipe, self.seeds[0]) for recipe in self.recipes if fold_of(recipe) is not None]
        val = whole if self.test else []
        return [("train", *run) for run in whole + folds] + [("val", *run) for run in val]

    def weights_file(self, name: str) -> Path:
        """Where the encoder's weights lie that a recipe names."""
        if name == "imagenet file":
            return self.data / "weights" / "mobilenet_v2_imagenet.safetensors"
        return self.lite_weights / f"{name.partition(' ')[0]}.safetensors"


def say(text: str, **_facts: Any) -> None:
    """A line of progress; the facts beside it are for JSON logs."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def data_of(recipe: str) -> str:
    """`brain` or `chest`: what a recipe's name begins with."""
    return recipe.partition("_")[0]


def base_of(recipe: str) -> str:
    """A recipe without its fold."""
    return recipe.partition("@")[0]


def fold_of(recipe: str) -> str | None:
    """`2of5` of `NAME@2of5`: train and val patients together, the second of five folds of them as val, no test split."""
    return recipe.partition("@")[2] or None


def known_recipe(name: str) -> str:
    """A name that may be asked for."""
    fold = fold_of(name)
    if base_of(name) not in KNOWN or not (fold is None or re.fullmatch("[1-9]of[2-9]", fold)):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(KNOWN)}, with @1of5 behind it for a fold")
    return name


def table_of(recipe: str) -> str:
    """Name of the label table that a recipe is trained on."""
    return "-".join([TABLES[data_of(recipe)][0], *filter(None, [fold_of(recipe)])])


def settings_of(plan: Campaign, recipe: str, seed: int) -> dict[str, Any]:
    """The train job of one run."""
    source = TABLES[data_of(recipe)][0]
    settings = {**KNOWN[base_of(recipe)], **(QUICK if plan.quick else {})}
    model = dict(settings["model"])
    if model["weights"] is not None:
        model["weights"] = str(plan.weights_file(model["weights"]))
    name = f"{recipe}-{seed}".replace("_", "-").replace("@", "-fold-")
    return {
        **settings,
        "model": model,
        "name": name,
        "seed": seed,
        "output": str(plan.output / "runs" / name),
        "labels": {"table": str(plan.output / "labels" / f"{table_of(recipe)}.csv"), "root": str(plan.data / source)},
        "workers": 1,
        "cpus_per_worker": max(1, plan.cpus - 1),
        "privacy": {"demo_key": True},
    }


def lane(plan: Campaign, number: int) -> None:
    """Take task after task until none is left that fits the time."""
    import torch

    from medvision_ray.cluster import ray_session
    from medvision_ray.config import RayConfig

    torch.set_num_threads(plan.cpus)  # of this process, which checks each bundle; the workers set their own
    with ray_session(RayConfig(num_cpus=plan.cpus, object_store_bytes=STORE_BYTES), dashboard=True):
        for kind, recipe, seed in plan.tasks():
            # The lane that trains a run comes to its val split later, so nothing is left out by not waiting here.
            if kind == "val" and not _record(plan, recipe, seed).exists():
                continue
            if not _claim(plan, f"{kind}-{recipe}-{seed}"):
                continue
            if time.time() + _expected_seconds(plan, kind, recipe) > plan.deadline:
                say(f"lane {number}: no time left for {kind} {recipe} {seed}")
                continue
            say(f"lane {number}: {kind} {recipe} {seed}")
            try:
                # The figures of the val split are in the history; its prediction rows are for calibration and thresholds.
                train_and_test(plan, recipe, seed) if kind == "train" else evaluate_split(plan, recipe, seed, "val")
            except Exception:  # the other runs go on; this one has no record
                say(f"lane {number}: {kind} {recipe} {seed} failed\n{traceback.format_exc()}")


def _claim(plan: Campaign, task: str) -> bool:
    """Whether this lane is the one to do a task."""
    try:
        (plan.output / "claims" / task).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _record(plan: Campaign, recipe: str, seed: int) -> Path:
    return plan.output / "records" / f"{recipe}-{seed}.json"


def _records(plan: Campaign) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((plan.output / "records").glob("*.json"))]
    order = {(recipe, seed): place for place, (_, recipe, seed) in enumerate(plan.tasks())}
    return sorted(found, key=lambda record: order.get((record["recipe"], record["seed"]), 0))


def _expected_seconds(plan: Campaign, kind: str, recipe: str) -> float:
    """From the finished runs of the same recipe, else of the same data; 0 where there is none yet."""
    seconds = "total" if kind == "train" else "test"
    records = [record for record in _records(plan) if data_of(record["recipe"]) == data_of(recipe)]
    same = [record for record in records if record["recipe"] == recipe] or records
    return max((record["seconds"][seconds] for record in same), default=0.0)


def train_and_test(plan: Campaign, recipe: str, seed: int) -> None:
    """Train one run, score the test split once, write the record."""
    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.train import train

    started = time.perf_counter()
    settings = settings_of(plan, recipe, seed)
    trained = train(build_job(TrainJob, settings, "the benchmark"), say)
    fitted = time.perf_counter()
    held = "val" if fold_of(recipe) else "test"
    metrics = evaluate_split(plan, recipe, seed, held) if plan.test else []
    ended = time.perf_counter()
    best = max(trained.history, key=lambda epoch: epoch["val_score"])
    rates = sorted(epoch["images_per_second"] for epoch in trained.history[1:] or trained.history)
    record = {
        "recipe": recipe,
        "seed": seed,
        "model_id": trained.bundle.model_id,
        "labels": trained.summary["labels"],
        "seconds": {**trained.summary.get("seconds", {}), "test": ended - fitted, "total": ended - started},
        "images_per_second": rates[len(rates) // 2],
        "best_epoch": best["epoch"],
        "validation": {key: value for key, value in best.items() if key.startswith("val_")},
        held: metrics,
        "history": trained.history,
    }
    write_json(_record(plan, recipe, seed), record)


def evaluate_split(plan: Campaign, recipe: str, seed: int, split: str) -> list[dict[str, Any]]:
    from medvision_ray.config import EvaluateJob, build_job
    from medvision_ray.evaluation.evaluate import evaluate

    settings = settings_of(plan, recipe, seed)
    question = {
        "output": settings["output"],
        "labels": settings["labels"],
        "bundle": f"{settings['output']}/bundles/{settings['name']}",
        "dataset": TABLES[data_of(recipe)][0],
        "split": split,
        "resamples": 100 if plan.quick else 1000,
        "scoring": {"placement": "fused"},  # one actor: a few hundred images are not worth a second process
        "privacy": {"demo_key": True},
    }
    found = evaluate(build_job(EvaluateJob, question, "the benchmark"), say)
    kept = plan.output / "predictions" / f"{settings['name']}-{split}.parquet"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(Path(found.details_uri.removeprefix("file://")).read_bytes())
    whole = [asdict(row) for row in found.metrics if row.subgroup == "all"]
    return [{key: value for key, value in row.items() if not key.startswith("subgroup")} for row in whole]


def write_json(path: Path, value: Any) -> None:
    """All or nothing, figures to five digits."""

    def short(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: short(part) for key, part in item.items()}
        if isinstance(item, (list, tuple)):
            return [short(part) for part in item]
        return float(f"{item:.5g}") if isinstance(item, float) else item

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(short(value), indent=1) + "\n")
    draft.replace(path)


def write_results(plan: Campaign, place: Path, facts: dict[str, Any]) -> None:
    """The whole results file, from the records and from what unfinished trainings have written."""
    records = _records(plan)
    finished = {(record["recipe"], record["seed"]) for record in records}
    unfinished = []
    for kind, recipe, seed in plan.tasks():
        name = settings_of(plan, recipe, seed)["name"]
        history = plan.output / "runs" / name / "training" / name / "metrics.jsonl"
        if kind == "train" and (recipe, seed) not in finished and history.exists():
            lines = [json.loads(line) for line in history.read_text().splitlines()]
            unfinished.append({"recipe": recipe, "seed": seed, "history": lines})
    recipes = {name: {**KNOWN[base_of(name)], **(QUICK if plan.quick else {})} for name in plan.recipes}
    protocol = (
        "Epochs and recipes are chosen on validation alone; the test split is scored once for each finished seed."
    )
    result = {**facts, "protocol": protocol, "recipes": recipes, "summary": summary(records)}
    write_json(place, {**result, "runs": records, "unfinished": unfinished})


def run_lanes(plan: Campaign, jobs: int, place: Path, facts: dict[str, Any]) -> None:
    """Start the lanes, write the results as they come, end the lanes at the deadline."""
    (plan.output / "logs").mkdir(exist_ok=True)
    processes = []
    for number in range(jobs):
        command = [sys.executable, *sys.argv, "--lane", str(number), "--deadline", str(plan.deadline)]
        with (plan.output / "logs" / f"lane-{number}.log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        time.sleep(2)  # two Rays that start in the same moment may choose the same ports
    seen = -1
    while any(process.poll() is None for process in processes) and time.time() < plan.deadline:
        time.sleep(2)
        count = len(_records(plan))
        if count != seen:
            seen = count
            write_results(plan, place, facts)
            say(f"{count} runs finished")
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # Ray ends its own processes then
    patience = time.time() + 20
    while any(process.poll() is None for process in processes) and time.time() < patience:
        time.sleep(0.5)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    write_results(plan, place, facts)


def main() -> None:
    """Prepare the label tables, run the lanes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=None, help="CPUs of each lane; all shared out where not given")
    parser.add_argument("--time-limit", type=float, default=86400.0)
    parser.add_argument("--recipes", nargs="+", type=known_recipe, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "training.json")
    parser.add_argument(
        "--validation-only", action="store_true", help="to choose between recipes: no test split is read"
    )
    parser.add_argument("--lite-weights", type=Path, default=ROOT / "benchmarks" / ".made" / "weights")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = Campaign(
        output=options.output.resolve(),
        data=Path(os.environ.get("MEDVISION_DATA", ROOT / "../shared/data")).resolve(),
        lite_weights=options.lite_weights.resolve(),
        recipes=tuple(options.recipes),
        seeds=tuple(options.seeds),
        deadline=options.deadline or time.time() + options.time_limit,
        cpus=options.cpus or max(2, (os.cpu_count() or 2) // options.jobs),
        quick=options.quick,
        test=not options.validation_only,
    )
    if options.lane is not None:
        lane(plan, options.lane)
        return
    facts = {"machine": machine(*PACKAGES), "jobs": options.jobs, "quick": plan.quick, "tables": {}}
    for recipe in plan.recipes:
        source, write = TABLES[data_of(recipe)]
        name = table_of(recipe)
        if name not in facts["tables"]:
            place = plan.output / "labels" / f"{name}.csv"
            facts["tables"][name] = write(plan.data / source, place, 48 if plan.quick else None, fold_of(recipe))
    _free_claims(plan)
    facts["machine"]["gpu"] = _gpu()
    run_lanes(plan, options.jobs, options.results, facts)
    shown = summary(_records(plan))["recipes"]
    header = ("recipe", "seeds", "val score", "accuracy", "macro F1", "AUROC", "Dice")
    names = ("val_score", "accuracy", "f1", "auroc", "dice")
    print_table(
        header, [(name, row["seeds"], *[_spread(row.get(key)) for key in names]) for name, row in shown.items()]
    )


def _spread(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} ± {value['sd']:.3f}"


def _free_claims(plan: Campaign) -> None:
    """Let go of what earlier lanes began and did not finish."""
    (plan.output / "claims").mkdir(parents=True, exist_ok=True)
    for kind, recipe, seed in plan.tasks():
        name = settings_of(plan, recipe, seed)["name"]
        done = plan.output / (f"records/{recipe}-{seed}.json" if kind == "train" else f"predictions/{name}-val.parquet")
        if not done.exists():
            (plan.output / "claims" / f"{kind}-{recipe}-{seed}").unlink(missing_ok=True)


def _gpu() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=False, capture_output=True, text=True
        )
    except OSError:
        return None
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
