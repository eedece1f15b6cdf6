"""Answers as rows of the tables: each commit is a run of its own, under the same protocol as a night's."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from medvision_ray import tables
from medvision_ray.archive.ids import ONLINE
from medvision_ray.archive.inventory import image_id
from medvision_ray.scoring.rows import SCORED
from medvision_ray.scoring.summary import RunIdentity, RunSummary, publish_run, reasons_of

JOB, ARCHIVE = "serve", "api"
"""What `runs` names as job and archive of these runs."""
_PREFIX = "online-"
_SETTLED_DAYS = 30
_AT_WORK = timedelta(minutes=15)
"""A commit of another replica may be under way for so long: the store is tried again for minutes."""
_STAGES = ("decode", "preprocess", "predict")


@dataclass(frozen=True)
class Batch:
    """Rows that are committed together, as one run.

    Attributes:
        identity: fixed before the first try, so that another try is the same run and commits nothing twice.
        rows: working rows (`scoring.rows`), scored and failed, of one model.
    """

    identity: RunIdentity
    classes: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def entry_of(request_id: str, data: bytes) -> dict[str, Any]:
    """What stands for a request where an archive's object has address and version.

    Every request is an object of its own: what is sent twice is answered twice, and has two rows with one `etag`.

    Args:
        data: the object; its sha256 is the `etag`. Takes 1 ms for some MB.
    """
    uri, etag = f"{ONLINE}{request_id}", hashlib.sha256(data).hexdigest()
    return {"image_id": image_id(uri, etag), "uri": uri, "etag": etag}


def new_batch(model_id: str, classes: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> Batch:
    """A batch under a run_key that nobody else has."""
    now = datetime.now(timezone.utc)
    run_key = f"{_PREFIX}{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
    return Batch(RunIdentity(run_key, JOB, model_id, ARCHIVE, now), classes, tuple(rows))


def publish_batch(output: str, batch: Batch, config: dict[str, Any]) -> None:
    """Commit a batch: predictions, failures, and last the run that names them; again for the same batch is a no-op.

    Raises:
        MedVisionError: the store refused; what is visible is completed by another try.
    """
    identity, scored = batch.identity, [row for row in batch.rows if row["status"] == SCORED]
    failed = [row for row in batch.rows if row["status"] != SCORED]
    run = {"run_key": identity.run_key, "run_date": identity.started_at.date(), "model_id": identity.model_id}
    for name, schema, rows in (
        ("predictions", tables.predictions_schema(batch.classes), scored),
        ("failures", tables.FAILURES, failed),
    ):
        if rows:
            table = pa.Table.from_pylist([{**row, **run} for row in rows], schema=schema)
            tables.commit(output, name, schema, table.to_batches(), identity.run_key)
    codes, ids = [row["error_code"] for row in failed], [row["image_id"] for row in failed]
    summary = RunSummary(
        run_key=identity.run_key,
        job=identity.job,
        model_id=identity.model_id,
        archive=identity.archive,
        listed=len(batch.rows),
        excluded=0,
        already_done=0,
        scored=len(scored),
        failed=len(failed),
        reasons=reasons_of(
            pa.chunked_array([pa.array(codes, pa.string())]), pa.chunked_array([pa.array(ids, pa.int64())])
        ),
        stage_seconds={
            stage: round(sum(row.get(f"{stage}_seconds") or 0.0 for row in batch.rows), 3) for stage in _STAGES
        },
        bytes_read=sum(row.get("bytes_read") or 0 for row in batch.rows),
        peak_memory_bytes=max((row.get("peak_memory_bytes") or 0 for row in batch.rows), default=0),
    )
    publish_run(output, identity, summary, config)


def settle(output: str, config: dict[str, Any], now: datetime | None = None) -> int:
    """Give rows whose process was killed before it named their run the run that they lack; answers how many runs.

    Their content is whole, as a commit is; only the last step of `publish_batch` is made up for.

    Raises:
        MedVisionError: the store refused.
    """
    now = now or datetime.now(timezone.utc)
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for table, when in (("predictions", "scored_at"), ("failures", "failed_at")):
        for row in _recent(output, table, when, (now - timedelta(days=_SETTLED_DAYS)).date()):
            empty = {"predictions": 0, "failures": 0, "last": row["last"]}
            found = counts.setdefault((row["run_key"], row["model_id"]), empty)
            found.update({table: row["count"], "last": max(found["last"], row["last"])})
    named = tables.read(output, "runs", ["run_key"], _ours()) if counts else None
    known = set(named["run_key"].to_pylist()) if named is not None else set()
    left = {key: found for key, found in counts.items() if key[0] not in known and found["last"] < now - _AT_WORK}
    for (run_key, model_id), found in left.items():
        scored, failed = found["predictions"], found["failures"]
        summary = RunSummary(run_key, JOB, model_id, ARCHIVE, scored + failed, 0, 0, scored, failed)
        publish_run(output, RunIdentity(run_key, JOB, model_id, ARCHIVE, found["last"]), summary, config)
    return len(left)


def _recent(output: str, table: str, when: str, since: date) -> list[dict[str, Any]]:
    """Of each run of ours its rows' count and the newest of their times."""
    condition = _ours() & (pads.field("run_date") >= since)
    rows = tables.read(output, table, ["run_key", "model_id", when], condition)
    if rows is None or not rows.num_rows:
        return []
    grouped = rows.group_by(["run_key", "model_id"]).aggregate([("run_key", "count"), (when, "max")])
    found = grouped.rename_columns(["run_key", "model_id", "count", "last"]).to_pylist()
    return [dict(row) for row in found]


def _ours() -> pads.Expression:
    """A range, which skips the files of nights unopened."""
    after = _PREFIX[:-1] + chr(ord(_PREFIX[-1]) + 1)
    return (pc.field("run_key") >= _PREFIX) & (pc.field("run_key") < after)
