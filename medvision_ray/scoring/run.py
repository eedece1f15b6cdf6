"""The run protocol: freeze, score, reconcile, publish, clean. Each step may be killed at any moment.

Running the same command again finishes the run: the frozen inventory says what belongs to it, the
committed rows say what is done, and the tables know which run has published.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medvision_ray import storage, tables
from medvision_ray.archive.ids import is_in
from medvision_ray.archive.inventory import Inventory, freeze, list_archive, only_new, read_frozen
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import DriftConfig, EvaluateJob, ScoreJob
from medvision_ray.errors import CredentialsError, MedVisionError, StorageError, UsageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.logs import Reporter
from medvision_ray.privacy import Pseudonymiser, address_pseudonymiser, load_pseudonymiser
from medvision_ray.scoring.attempts import forgive_attempts, unfinished_blocks
from medvision_ray.scoring.drift import judge_drift, read_drift
from medvision_ray.scoring.lease import lease
from medvision_ray.scoring.pipeline import CommittedRows, cut_blocks, plan, score_pass
from medvision_ray.scoring.progress import ProgressLine
from medvision_ray.scoring.publish import is_publishing, publish_rows
from medvision_ray.scoring.rows import failed_row, to_table, working_schema, write_rows
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.summary import RunIdentity, RunSummary, over_budget, publish_run, published_run

_PASSES = 3
_EMPTY_PASSES = 2  # the second finds the markers of the first and works with care
_PUBLISH_WAIT_SECONDS = 1800.0


@dataclass(frozen=True)
class RunPlan:
    """What a run is asked to do, whichever job asks for it.

    Attributes:
        name: name of the job, first part of the run's key.
        archive: names what is scored; runs of the same name, model and archive are numbered.
        job: output, bundle, scoring, limits, budget, pseudonyms and Ray are taken from it.
        run_key: names the run; None derives it.
        max_hours: stop beginning objects after this time; None is no limit.
        drift: hold the run against the training's images; None does not.
        part: of the archive, as in `archive.part`; the runs of a part are numbered by themselves.
    """

    name: str
    archive: str
    job: ScoreJob | EvaluateJob
    run_key: str | None = None
    max_hours: float | None = None
    drift: DriftConfig | None = None
    part: str | None = None

    @property
    def subject(self) -> str:
        """What is scored, in words."""
        return f"part {self.part} of {self.archive}" if self.part else self.archive


def score(job: ScoreJob, say: Reporter) -> RunSummary:
    """Score what is new in an archive and publish it.

    Raises:
        UsageError: an option names an error code that there is none of.
        LeaseHeldError: another run works on this archive with this model.
        MedVisionError: the run cannot go on; nothing of it is visible in the tables before it is whole.
    """
    _check_codes(job)
    archive = storage.absolute(job.archive.uri)
    run = RunPlan("score", archive, job, job.run_key, job.max_hours, job.drift, job.archive.part)
    return execute(run, lambda bundle: _new_objects(job, bundle), say)


def preview(job: ScoreJob) -> dict[str, Any]:
    """Counts of what `score` would do now; nothing is written and Ray is not started."""
    _check_codes(job)
    bundle = load_bundle(job.bundle)
    found = _new_objects(job, bundle)
    return {
        "model_id": bundle.model_id,
        "archive": storage.absolute(job.archive.uri),
        "to_score": found.objects.num_rows,
        "bytes": pc.sum(found.objects["size"]).as_py() or 0,
        "retried": found.retried,
        "already_done": found.already_done,
        "excluded": found.excluded,
        "older": found.older,
        "duplicates": found.duplicates,
        "volumes": found.volumes,
    }


def _new_objects(job: ScoreJob, bundle: Bundle) -> Inventory:
    listed = list_archive(job.archive, address_pseudonymiser(job.privacy))
    return only_new(listed, job.output, bundle.model_id, job.archive.limit, retry_failed=job.retry_failed)


def _check_codes(job: ScoreJob) -> None:
    known = [code.value for code in ErrorCode]
    retried = job.retry_failed if isinstance(job.retry_failed, tuple) else ()
    for option, codes in (("budget.by_code", tuple(job.budget.by_code)), ("retry_failed", retried)):
        for code in codes:
            if code not in known:
                raise UsageError(
                    f"Expected error codes in `{option}`, but got {code!r}; the codes are {', '.join(known)}."
                )


def execute(run: RunPlan, inventory_of: Callable[[Bundle], Inventory], say: Reporter) -> RunSummary:
    """Run the protocol for an inventory that is made only if the run has none frozen yet."""
    deadline = time.time() + run.max_hours * 3600 if run.max_hours is not None else None
    bundle = load_bundle(run.job.bundle)
    pseudonymiser = load_pseudonymiser(run.job.privacy)
    base = _base_key(run, bundle)
    with _saying_how_to_go_on(), lease(run.job.output, base, f"scoring {run.subject} with {bundle.model_id}") as held:
        run_key = run.run_key or _next_run_key(run, base)
        folder = storage.join(run.job.output, "runs", run_key)
        finished = published_run(run.job.output, run_key)
        if finished is not None:
            storage.delete_tree(folder)
            say(f"Run {run_key} is published already; nothing to do.")
            if run.drift is not None:
                finished = replace(finished, drift=read_drift(run.job.output, run_key, run.drift))
            return replace(finished, over_budget=over_budget(run.job.budget, finished))
        started = time.monotonic()
        inventory, identity = _freeze(run, bundle, folder, inventory_of, pseudonymiser)
        seconds = {"list": time.monotonic() - started}
        say(
            f"{inventory.objects.num_rows} objects to score, {inventory.already_done} already done, "
            f"{inventory.excluded} excluded by pattern, {inventory.older} older, {inventory.retried} tried again.",
            run_key=run_key,
            model_id=bundle.model_id,
            total=inventory.objects.num_rows,
        )
        settings = WorkerSettings(
            run.job.bundle, folder, run.job.scoring, run.job.decode, pseudonymiser, run.name, deadline
        )
        started = time.monotonic()
        rate = _score_missing(run, bundle.classes, inventory, settings, say)
        seconds["score"] = time.monotonic() - started
        held.assert_held()
        summary = _publish(run, bundle, identity, inventory, settings, seconds=seconds, rate=rate)
        storage.delete_tree(folder)
        tables.tidy(run.job.output)
    for line in (summary.sentence(), *summary.details()):
        say(line)
    return replace(summary, over_budget=over_budget(run.job.budget, summary))


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if not error.transient:
            raise
        raise StorageError(f"{error} What is scored is kept; the same command finishes the run.") from None


def _publish(
    run: RunPlan,
    bundle: Bundle,
    identity: RunIdentity,
    inventory: Inventory,
    settings: WorkerSettings,
    *,
    seconds: dict[str, float],
    rate: float | None,
) -> RunSummary:
    """Rows, then the run's own row; one run of a model at a time, so that no object is published twice."""
    output = run.job.output
    started = time.monotonic()
    waiting = f"publishing rows of {bundle.model_id}"
    with lease(output, f"publish-{bundle.model_id}", waiting, wait_seconds=_PUBLISH_WAIT_SECONDS):
        summary = publish_rows(
            output, identity, bundle.classes, settings.run_folder, inventory, may_miss=settings.past_deadline
        )
        if run.drift is not None:
            fields = tuple(run.job.privacy.header_fields)
            summary = replace(summary, drift=judge_drift(output, bundle, identity, run.drift, fields))
        seconds["publish"] = time.monotonic() - started
        summary = replace(summary, seconds={k: round(v, 3) for k, v in seconds.items()}, images_per_second=rate)
        publish_run(output, identity, summary, run.job.model_dump(mode="json", exclude={"on_finish", "logging"}))
    return summary


def _base_key(run: RunPlan, bundle: Bundle) -> str:
    text = "\0".join([run.name, bundle.model_id, run.archive, *([run.part] if run.part else [])])
    return f"{run.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _next_run_key(run: RunPlan, base: str) -> str:
    """`JOB-HASH-NUMBER`: the number of runs of this job, model and archive that are published already.

    A run that was killed after it was published and before it was cleaned is cleaned here.
    """
    rows = tables.read(run.job.output, "runs", ["run_key"])
    keys = rows["run_key"].to_pylist() if rows is not None else []
    published = sum(key.startswith(base + "-") for key in keys)
    if published:
        storage.delete_tree(storage.join(run.job.output, "runs", f"{base}-{published:05d}"))
    return f"{base}-{published + 1:05d}"


def _freeze(
    run: RunPlan, bundle: Bundle, folder: str, inventory_of: Callable[[Bundle], Inventory], names: Pseudonymiser
) -> tuple[Inventory, RunIdentity]:
    """The inventory and the identity of the run's first start, from an earlier attempt where there was one."""
    run_key = folder.rsplit("/", 1)[-1]
    place, facts_place = storage.join(folder, "inventory.parquet"), storage.join(folder, "run.json")
    known = storage.exists(place)
    inventory = read_frozen(place) if known else freeze(inventory_of(bundle), place, run.job.scoring.block_rows)
    facts: dict[str, Any] = {
        "started_at": datetime.now(timezone.utc).isoformat(),
        "model_id": bundle.model_id,
        "archive": run.archive,
        "part": run.part,
        "pseudonyms": names.fingerprint,
    }
    if not storage.create_exclusive(facts_place, json.dumps(facts).encode()):
        facts = json.loads(storage.read_bytes(facts_place))
    for name, ours in (("model_id", bundle.model_id), ("archive", run.archive), ("part", run.part)):
        if facts.get(name) != ours:
            raise MedVisionError(
                f"Expected {name} {facts.get(name)}, with which the run {run_key} was started, but got {ours}. "
                "Give this run another `run_key`, or finish that one as it began."
            )
    if facts.get("pseudonyms", names.fingerprint) != names.fingerprint:
        raise MedVisionError(
            f"Expected the pseudonym key and `privacy.uri` with which the run {run_key} was started, but one of them "
            "is another. Give this run another `run_key`, or finish that one as it began."
        )
    started_at = datetime.fromisoformat(facts["started_at"])
    return inventory, RunIdentity(run_key, run.name, bundle.model_id, run.archive, started_at)


def _missing(folder: str, inventory: Inventory, classes: tuple[str, ...]) -> pa.Table:
    done = CommittedRows(folder)
    if not done.files:
        return inventory.objects
    ids = done.dataset(working_schema(classes)).to_table(columns=["image_id"])["image_id"].to_numpy()
    return inventory.objects.filter(pa.array(~is_in(inventory.objects["image_id"].to_numpy(), np.sort(ids))))


def _score_missing(
    run: RunPlan, classes: tuple[str, ...], inventory: Inventory, settings: WorkerSettings, say: Reporter
) -> float | None:
    """Passes over what has no committed row yet; what no pass brings through becomes a failure row."""
    folder = settings.run_folder
    missing = _missing(folder, inventory, classes)
    first = missing.num_rows
    if first == 0 or settings.past_deadline or is_publishing(folder):
        return None
    from ray.exceptions import RayError  # slow: not for a night with nothing new

    forgive_attempts(folder)
    seconds, empty = 0.0, 0
    with ray_session(run.job.ray):
        for number in range(1, _PASSES + 1):
            placement = plan(run.job.scoring, missing.num_rows)
            actors = max(placement.scorers, placement.preparers)
            blocks = cut_blocks(missing, run.job.scoring.block_rows, actors, unfinished_blocks(folder))
            with ProgressLine(folder, inventory.objects.num_rows, say, run.name) as line:
                try:
                    score_pass(blocks, settings, placement)
                except RayError as error:
                    _stop_where_the_store_is_away(error)
                    say(f"Pass {number} lost its workers ({type(error).__name__}); looking at what is missing.")
            seconds += line.busy_seconds
            before, missing = missing.num_rows, _missing(folder, inventory, classes)
            if missing.num_rows == 0 or settings.past_deadline:
                break
            empty = empty + 1 if missing.num_rows == before else 0
            if empty == _EMPTY_PASSES:
                raise MedVisionError(
                    f"{empty} whole passes scored nothing: the workers could not start. See the Ray worker logs; "
                    "the run can be finished with the same command."
                )
    if missing.num_rows and not settings.past_deadline:
        _give_up(settings, missing, classes)
    return (first - missing.num_rows) / seconds if seconds > 0 else None


def _stop_where_the_store_is_away(error: Exception) -> None:
    """End the run where its workers could not reach a store: more passes would turn an outage into failure rows."""
    text = str(error)  # Ray carries the text of a cause, not its type
    if CredentialsError.__name__ in text:
        raise StorageError(
            "The store no longer accepts the credentials of this job's workers. Renew them; the same command finishes "
            "the run.",
            code="credentials",
        ) from None
    if StorageError.__name__ in text:
        raise StorageError(
            "The archive's store or that of the output stopped answering this job's workers, after every retry. What is "
            "scored is kept; the same command finishes the run."
        ) from None


def _give_up(settings: WorkerSettings, missing: pa.Table, classes: tuple[str, ...]) -> None:
    """Failure rows for objects that no pass brought through."""
    from medvision_ray.scoring.objects import Failure  # loads every decoder: not for a run that loses nothing

    lost = Failure.of(DecodeError(ErrorCode.WORKER_CRASH, Stage.PREDICT, attempts=_PASSES))
    entries = [{**entry, "uri": settings.pseudonymiser.address(entry["uri"])} for entry in missing.to_pylist()]
    write_rows(to_table([failed_row(entry, lost, _PASSES) for entry in entries], classes), settings.run_folder)
