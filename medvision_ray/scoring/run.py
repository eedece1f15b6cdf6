"""The run protocol: freeze, score, reconcile, publish, clean. Each step may be killed at any moment.

Running the same command again finishes the run: the frozen inventory says what belongs to it, the
committed rows say what is done, and the tables know which run has published.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import Inventory, freeze, list_archive, only_new, read_frozen
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import EvaluateJob, FailureBudget, ScoreJob
from medvision_ray.errors import MedVisionError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.scoring.objects import Failure
from medvision_ray.scoring.pipeline import CommittedRows, plan, score_pass
from medvision_ray.scoring.progress import ProgressLine
from medvision_ray.scoring.publish import RunIdentity, RunSummary, publish_rows, publish_run, published_run
from medvision_ray.scoring.rows import failed_row, to_table, working_schema
from medvision_ray.scoring.worker import WorkerSettings

Say = Callable[[str], None]
_PASSES = 3


@dataclass(frozen=True)
class RunPlan:
    """What a run is asked to do, whichever job asks for it.

    Attributes:
        name: name of the job, first part of the run's key.
        archive: names what is scored; runs of the same name, model and archive are numbered.
        job: output, bundle, scoring, limits, budget, pseudonyms and Ray are taken from it.
        run_key: names the run; None derives it.
    """

    name: str
    archive: str
    job: ScoreJob | EvaluateJob
    run_key: str | None = None


def score(job: ScoreJob, say: Say) -> RunSummary:
    """Score what is new in an archive and publish it.

    Raises:
        MedVisionError: the run cannot go on; nothing of it is visible in the tables before it is whole.
    """
    run = RunPlan("score", storage.absolute(job.archive.uri), job, job.run_key)

    def inventory(bundle: Bundle) -> Inventory:
        return only_new(list_archive(job.archive), job.output, bundle.model_id, job.archive.limit)

    return execute(run, inventory, say)


def execute(run: RunPlan, inventory_of: Callable[[Bundle], Inventory], say: Say) -> RunSummary:
    """Run the protocol for an inventory that is made only if the run has none frozen yet."""
    seconds: dict[str, float] = {}
    bundle = load_bundle(run.job.bundle)
    pseudonymiser = load_pseudonymiser(run.job.privacy)
    run_key = run.run_key or _derive_run_key(run, bundle)
    folder = storage.join(run.job.output, "runs", run_key)
    finished = published_run(run.job.output, run_key)
    if finished is not None:
        storage.delete_tree(folder)
        say(f"Run {run_key} is published already; nothing to do.")
        return replace(finished, over_budget=_over(run.job.budget, finished))
    started = time.monotonic()
    inventory, identity = _freeze(run, bundle, run_key, folder, inventory_of)
    seconds["list"] = time.monotonic() - started
    total = inventory.objects.num_rows
    say(f"{total} objects to score, {inventory.already_done} already done, {inventory.excluded} excluded by pattern.")
    settings = WorkerSettings(run.job.bundle, folder, run.job.scoring, run.job.decode, pseudonymiser)
    started = time.monotonic()
    rate = _score_missing(run, bundle.classes, inventory, settings, say)
    seconds["score"] = time.monotonic() - started
    started = time.monotonic()
    summary = publish_rows(run.job.output, identity, bundle.classes, folder, inventory)
    seconds["publish"] = time.monotonic() - started
    summary = replace(summary, seconds={k: round(v, 3) for k, v in seconds.items()}, images_per_second=rate)
    publish_run(run.job.output, identity, summary, run.job.model_dump(mode="json"))
    storage.delete_tree(folder)
    say(summary.sentence())
    return replace(summary, over_budget=_over(run.job.budget, summary))


def _derive_run_key(run: RunPlan, bundle: Bundle) -> str:
    """`JOB-HASH-NUMBER`: the number of runs of this job, model and archive that are published already."""
    text = f"{run.name}\0{bundle.model_id}\0{run.archive}"
    base = f"{run.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    rows = tables.read(run.job.output, "runs", ["run_key"])
    keys = rows["run_key"].to_pylist() if rows is not None else []
    return f"{base}-{sum(key.startswith(base + '-') for key in keys) + 1:05d}"


def _freeze(
    run: RunPlan, bundle: Bundle, run_key: str, folder: str, inventory_of: Callable[[Bundle], Inventory]
) -> tuple[Inventory, RunIdentity]:
    """The inventory and the identity of the run's first start, from an earlier attempt where there was one."""
    place, facts_place = storage.join(folder, "inventory.parquet"), storage.join(folder, "run.json")
    known = storage.exists(place)
    inventory = read_frozen(place) if known else freeze(inventory_of(bundle), place, run.job.scoring.block_rows)
    facts = {"started_at": datetime.now(timezone.utc).isoformat(), "model_id": bundle.model_id}
    if not storage.create_exclusive(facts_place, json.dumps(facts).encode()):
        facts = json.loads(storage.read_bytes(facts_place))
    if facts["model_id"] != bundle.model_id:
        raise MedVisionError(
            f"Expected the bundle {facts['model_id']} with which this run was started, but got {bundle.model_id}. "
            "Give the run another `run_key`, or finish it with the bundle it began with."
        )
    started_at = datetime.fromisoformat(facts["started_at"])
    return inventory, RunIdentity(run_key, run.name, bundle.model_id, run.archive, started_at)


def _missing(folder: str, inventory: Inventory, classes: tuple[str, ...]) -> pa.Table:
    done = CommittedRows(folder)
    if not done.files:
        return inventory.objects
    ids = done.dataset(working_schema(classes)).to_table(columns=["image_id"])["image_id"].to_numpy()
    return inventory.objects.filter(pa.array(~np.isin(inventory.objects["image_id"].to_numpy(), ids)))


def _score_missing(
    run: RunPlan, classes: tuple[str, ...], inventory: Inventory, settings: WorkerSettings, say: Say
) -> float | None:
    """Passes over what has no committed row yet; what no pass brings through becomes a failure row."""
    from ray.exceptions import RayError

    folder = settings.run_folder
    missing = _missing(folder, inventory, classes)
    first = missing.num_rows
    if first == 0:
        return None
    seconds = 0.0
    with ray_session(run.job.ray):
        for _ in range(_PASSES):
            attempt, number = _next_attempt(folder)
            todo = storage.join(attempt, "todo.parquet")
            placement = plan(settings, missing.num_rows)
            blocks = max(
                math.ceil(missing.num_rows / run.job.scoring.block_rows), min(placement.actors, missing.num_rows)
            )
            sink = io.BytesIO()
            pq.write_table(missing, sink, row_group_size=math.ceil(missing.num_rows / blocks))
            storage.write_bytes(todo, sink.getvalue())
            with ProgressLine(folder, inventory.objects.num_rows, say) as line:
                try:
                    score_pass(todo, attempt, settings, placement, blocks)
                except RayError as error:
                    say(f"Pass {number} lost its workers ({type(error).__name__}); looking at what is missing.")
            seconds += line.busy_seconds
            before, missing = missing.num_rows, _missing(folder, inventory, classes)
            if missing.num_rows == 0:
                break
            if missing.num_rows == before:
                raise MedVisionError(
                    "A whole pass scored nothing: the workers could not start. See the Ray worker logs; "
                    "the run can be finished with the same command."
                )
    if missing.num_rows:
        _give_up(folder, missing, classes)
    return (first - missing.num_rows) / seconds if seconds > 0 else None


def _next_attempt(folder: str) -> tuple[str, int]:
    number = 1
    while storage.exists(storage.join(folder, "attempts", f"{number:04d}")):
        number += 1
    return storage.join(folder, "attempts", f"{number:04d}"), number


def _give_up(folder: str, missing: pa.Table, classes: tuple[str, ...]) -> None:
    """Failure rows for objects that no pass brought through, written as one more attempt."""
    lost = Failure.of(DecodeError(ErrorCode.WORKER_CRASH, Stage.PREDICT, attempts=_PASSES))
    rows = to_table([failed_row(entry, lost, _PASSES) for entry in missing.to_pylist()], classes)
    attempt, _ = _next_attempt(folder)
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    storage.write_bytes(storage.join(attempt, "rows", "lost.parquet"), sink.getvalue())
    storage.write_bytes(storage.join(attempt, "checkpoint", "lost.parquet"), b"")


def _over(budget: FailureBudget, summary: RunSummary) -> bool:
    total = summary.scored + summary.failed
    return total > 0 and summary.failed > budget.max_failure_fraction * total
