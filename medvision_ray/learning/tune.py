"""The tune job: trials of a train job through Ray Tune, the worse ones stopped early, the best as a train job's file.

Ray Tune keeps its state as pickles, which are never loaded here: a search resumes from the trials' own histories and
checkpoints. A trial that is started again tells the scheduler its past epochs first, so its rungs are as they were.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from medvision_ray import storage
from medvision_ray.cluster import cluster_cpus, cluster_gpus, ray_session
from medvision_ray.config import TrainJob, TuneJob
from medvision_ray.errors import MedVisionError, UsageError
from medvision_ray.learning.alone import HISTORY, train_alone
from medvision_ray.learning.history import describe, read_history
from medvision_ray.learning.identity import config_hash_of
from medvision_ray.learning.ingest import DecodedImages, check_images, decode_images
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.learning.loop import TrainPlan, new_state
from medvision_ray.learning.search_space import draw_trials, trial_job
from medvision_ray.learning.train import Progress, training_plan
from medvision_ray.native import reuse_freed_memory

BEST, TRIALS = "best.yaml", "trials.parquet"
METRIC = "val_score"
_ERROR = "error.txt"
_SETTINGS = {"search", "samples", "asha", "seed"}
# Ray Tune is not to write result files of its own, change folders, or take the interrupt for a normal end.
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True, eq=False)
class TuneResult:
    """What a search gives.

    Attributes:
        best_uri: the best configuration, a train job's YAML file.
        trials: a row a trial, best first: `trial`, `state` (`finished`, `stopped`, `failed`), `epochs`, `best_epoch`,
            `val_score` and other validation figures of that epoch, `seconds`, and a column an option that varied.
        summary: `name`, `already_done`, `best` (its row) and counts by state.
    """

    best_uri: str
    trials: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Trials:
    """What every trial gets; sent to it once through the object store."""

    plans: list[TrainPlan]
    datasets: list[Any]
    dataset_of: list[int]
    gpu: bool


def tune(job: TuneJob, progress: Progress = lambda line: None) -> TuneResult:
    """Search for a better configuration; the same job again resumes, or finds it done.

    Trials train on the train split and are judged by `val_score` on val; rows of the test split are not even read. A
    trial is one process whose batch is that of all `workers` of the train job. Results lie under OUTPUT/tuning/NAME.

    Raises:
        UsageError: the name belongs to another search; ConfigError: a drawn configuration is none.
        MedVisionError: every trial failed, or a trial does not fit the cluster.
    """
    base = job.train
    drawn = draw_trials(job)
    jobs = [trial_job(base, values, f"trial {number} of the search") for number, values in enumerate(drawn)]
    settings = job.model_dump(mode="json", include=_SETTINGS)
    key = hashlib.sha256(json.dumps([settings, config_hash_of(base)], sort_keys=True).encode()).hexdigest()
    name = job.name or f"tune-{key[:8]}"
    folder = storage.join(base.output, "tuning", name)
    _claim(folder, name, key)
    if storage.exists(storage.join(folder, BEST)):
        rows = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, TRIALS)))).to_pylist()
        return _result(folder, name, rows, already_done=True)
    table = load_labels(base.labels)
    table = table.take(np.flatnonzero(table.splits != "test"))
    with ray_session(base.ray):
        gpu = _check_cluster(base)
        trials = _prepare(folder, jobs, table, gpu)
        progress(f"{name}: {len(jobs)} trials of at most {max(one.epochs for one in jobs)} epochs")
        failed = _run(job, base, folder, trials, progress)
    rows = [_row(trials.plans[number], number, values, number in failed) for number, values in enumerate(drawn)]
    rows = ranked(rows)
    if rows[0]["state"] == "failed" or rows[0][METRIC] is None:
        raise MedVisionError(
            f"Expected a trial of `{name}` to come to its end, but all {len(rows)} failed. The reason of a trial is in {_ERROR} in "
            f"its folder under {folder}/trials, or in Ray's logs."
        )
    _write(folder, base, jobs, rows)
    return _result(folder, name, rows, already_done=False)


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials, the best first; one that failed after a good epoch is not the best: the same settings would fail again."""
    return sorted(
        rows, key=lambda row: (row["state"] == "failed", row[METRIC] is None, -(row[METRIC] or 0.0), row["trial"])
    )


def _result(folder: str, name: str, rows: list[dict[str, Any]], *, already_done: bool) -> TuneResult:
    counts = {state: sum(row["state"] == state for row in rows) for state in ("finished", "stopped", "failed")}
    best = storage.join(folder, BEST)
    summary = {"name": name, "already_done": already_done, "best_config": best, "best": rows[0], **counts}
    return TuneResult(best, rows, summary)


def _claim(folder: str, name: str, key: str) -> None:
    place = storage.join(folder, "tuning.json")
    if storage.create_exclusive(place, json.dumps({"key": key}).encode()):
        return
    if json.loads(storage.read_bytes(place)).get("key") != key:
        raise UsageError(
            f"Expected the train job and search space that search `{name}` began with, but they changed. A new search needs a "
            "new name: set `name`, or leave it out to have one derived."
        )


def _check_cluster(base: TrainJob) -> bool:
    """Whether trials use a GPU each."""
    gpus, cpus = cluster_gpus(), cluster_cpus()
    if base.use_gpu is True and not gpus:
        raise MedVisionError(
            "Expected a GPU for each trial (`use_gpu: true`), but the cluster has none. Set it to auto."
        )
    if base.cpus_per_worker > cpus:
        raise MedVisionError(
            f"Expected {base.cpus_per_worker:g} CPUs for a trial (`cpus_per_worker`), but the cluster has {cpus:g}. Lower it."
        )
    return bool(base.use_gpu) and gpus > 0


def _prepare(folder: str, jobs: list[TrainJob], table: LabelTable, gpu: bool) -> _Trials:
    """Decode the images once for each preprocessing, and build each network once so that what can't be is said now."""
    decoded: dict[str, DecodedImages] = {}
    built: set[str] = set()
    plans: list[TrainPlan] = []
    dataset_of: list[int] = []
    for number, job in enumerate(jobs):
        key = job.preprocess.model_dump_json()
        if key not in decoded:
            decoded[key] = decode_images(table, job)
            check_images(table, decoded[key], job.max_failure_fraction)
        alone = job.model_copy(update={"workers": 1, "batch_size": job.batch_size * job.most_workers})
        plan = training_plan(alone, storage.join(folder, "trials", f"{number:03}"), table, decoded[key])
        architecture = f"{plan.architecture.model_dump_json()} {key}"
        if architecture not in built:
            new_state(plan, torch.device("cpu"), with_weights=True)
            built.add(architecture)
        plans.append(plan)
        dataset_of.append(list(decoded).index(key))
    return _Trials(plans, [one.dataset for one in decoded.values()], dataset_of, gpu)


def _run(job: TuneJob, base: TrainJob, folder: str, trials: _Trials, progress: Progress) -> set[int]:
    """Run all trials to their end, or to where the scheduler stops them; the numbers of those that were lost."""
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks quote any exception's text
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    state = storage.join(folder, "ray")
    storage.delete_tree(state)
    filesystem, path = storage.filesystem(folder)
    scheduler = None
    if job.asha.enabled:
        longest = max(plan.job.epochs for plan in trials.plans)
        grace = min(job.asha.grace_epochs, longest)
        scheduler = ASHAScheduler(max_t=longest, grace_period=grace, reduction_factor=job.asha.reduction)
    resources = {"cpu": base.cpus_per_worker, **({"gpu": 1} if trials.gpu else {})}
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(_trial, trials=trials), resources),
        param_space={"trial": ray_tune.grid_search(list(range(len(trials.plans))))},
        tune_config=ray_tune.TuneConfig(
            metric=METRIC, mode="max", scheduler=scheduler, max_concurrent_trials=job.at_once
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=base.max_restarts),
            callbacks=[_teller(progress)],
        ),
    )
    found = tuner.fit()
    storage.delete_tree(state)
    return {int(one.config["trial"]) for one in found if one.error is not None}


def _teller(progress: Progress) -> Any:
    """A callback of Ray Tune's that tells each new epoch of each trial."""
    from ray.tune import Callback

    class Teller(Callback):  # type: ignore[misc]  # Ray's classes are untyped
        """Lives in the driver; Ray Tune also pickles it with its state, without the way to tell."""

        def __init__(self, tell: Callable[[str], None] | None) -> None:
            self._tell = tell

        def __getstate__(self) -> dict[str, Any]:
            return {"_tell": None}

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            if self._tell is not None and not result["told_again"]:
                self._tell(f"trial {trial.config['trial']}: {describe(result, int(result['epochs']))}")

    return Teller(progress)


def _trial(config: dict[str, Any], trials: _Trials) -> None:
    """What Ray Tune runs for a trial."""
    from ray import tune as ray_tune

    plan = trials.plans[config["trial"]]
    facts = {"epochs": plan.job.epochs}
    for line in read_history(storage.join(plan.folder, HISTORY)):
        ray_tune.report({**line, **facts, "told_again": True})
    torch.set_num_threads(max(1, int(plan.job.cpus_per_worker)))
    reuse_freed_memory()
    dataset = trials.datasets[trials.dataset_of[config["trial"]]]
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    try:
        for line in train_alone(plan, tables, torch.device("cuda" if trials.gpu else "cpu")):
            ray_tune.report({**line, **facts, "told_again": False})
    except MedVisionError as error:  # such as a loss that is not finite: another try would end the same way
        storage.write_bytes(storage.join(plan.folder, _ERROR), str(error).encode())


def _row(plan: TrainPlan, number: int, values: dict[str, Any], lost: bool) -> dict[str, Any]:
    history = read_history(storage.join(plan.folder, HISTORY))
    best = max(history, key=lambda line: float(line[METRIC]), default=None)
    job = plan.job
    stale = job.patience > 0 and best is not None and len(history) - best["epoch"] >= job.patience
    state = "finished" if len(history) >= job.epochs or stale else "stopped"
    if lost or storage.exists(storage.join(plan.folder, _ERROR)):
        state = "failed"
    figures = {key: value for key, value in (best or {}).items() if key.startswith("val_") and key != METRIC}
    return {
        "trial": number,
        "state": state,
        "epochs": len(history),
        "best_epoch": best["epoch"] if best else None,
        METRIC: float(best[METRIC]) if best else None,
        **figures,
        "seconds": sum(line["seconds"] for line in history),
        **{
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in values.items()
        },
    }


def _write(folder: str, base: TrainJob, jobs: list[TrainJob], rows: list[dict[str, Any]]) -> None:
    """The table, then the best configuration, which says that the search is done."""
    names = dict.fromkeys(key for row in rows for key in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(storage.join(folder, TRIALS), sink.getvalue())
    best = jobs[rows[0]["trial"]].model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    head = (
        f"# Trial {rows[0]['trial']} of {len(rows)}: {METRIC} {rows[0][METRIC]:.4f} at epoch {rows[0]['best_epoch']}.\n"
    )
    text = head + yaml.safe_dump(best, sort_keys=False, width=120)
    storage.write_bytes(storage.join(folder, BEST), text.encode())
    for row in rows:
        place = storage.join(folder, "trials", f"{row['trial']:03}", f"checkpoint-{row['epochs']}")
        storage.delete_tree(place)


def _column(values: list[Any]) -> pa.Array:
    """One type a column: text where an option's values are of several."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return pa.array([float(v) if v is not None and kinds == {int, float} else v for v in values])
    return pa.array([None if value is None else str(value) for value in values])
