"""Publish a run's rows: every object has exactly one, one commit a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from medvision_ray import storage, tables
from medvision_ray.archive.ids import is_in, sorted_distinct
from medvision_ray.archive.inventory import Inventory, failed_ids, id_between
from medvision_ray.errors import MedVisionError
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.rows import EFFORT_FIELDS, FAILED, SCORED, working_schema
from medvision_ray.scoring.summary import COMPLETE, DEADLINE, RunIdentity, RunSummary, reasons_of

_DECISION = "publish.json"
Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True)
class _Kept:
    """Which working rows count, and what is known of them without their content.

    Attributes:
        keep: one flag a working row, in file order.
        rows: image_id, status, error_code and cost of those that count.
        done_elsewhere: objects that another run of the model committed meanwhile.
        missing: objects without a row.
    """

    keep: Mask
    rows: pa.Table
    done_elsewhere: int
    missing: int


def publish_rows(
    output: str,
    identity: RunIdentity,
    classes: tuple[str, ...],
    folder: str,
    inventory: Inventory,
    *,
    may_miss: bool = False,
) -> RunSummary:
    """Check that every object has exactly one row, then commit predictions and failures.

    Must be called by one run of a model at a time: what other runs committed meanwhile is left out.
    The first call decides which rows the run has; a second one, after a kill, publishes the same.

    Args:
        may_miss: the run's time was over: objects without a row are left for a later run.

    Raises:
        MedVisionError: an object has no row, or a row no object; nothing is committed then.
    """
    files, may_miss, decided = _decision(folder, may_miss)
    schema = working_schema(classes)
    kept = _keep(output, identity, files, schema, inventory)
    if kept.missing and not may_miss:
        raise MedVisionError(
            f"Expected one row for each of {inventory.objects.num_rows} objects, but {kept.missing} have none. "
            "Nothing was published; please report this."
        )
    if not decided:
        decision = {"files": files.files, "may_miss": may_miss}
        storage.write_bytes(storage.join(folder, _DECISION), json.dumps(decision).encode())
    retried = _replaced_failures(output, identity, folder, kept) if inventory.retried else 0
    _commit(output, identity, classes, files, kept, retries=inventory.retried > 0)
    failures = kept.rows.filter(pc.equal(kept.rows["status"], FAILED))
    cost = {item.name: kept.rows[item.name] for item in EFFORT_FIELDS}
    counted = kept.rows.num_rows + kept.missing + kept.done_elsewhere
    return RunSummary(
        run_key=identity.run_key,
        job=identity.job,
        model_id=identity.model_id,
        archive=identity.archive,
        listed=counted + inventory.already_done,
        excluded=inventory.excluded + inventory.older,
        already_done=inventory.already_done + kept.done_elsewhere,
        scored=kept.rows.num_rows - failures.num_rows,
        failed=failures.num_rows,
        retried=retried,
        not_scored=kept.missing,
        state=DEADLINE if kept.missing else COMPLETE,
        reasons=reasons_of(failures["error_code"], failures["image_id"]),
        stage_seconds={
            stage: round(pc.sum(cost[f"{stage}_seconds"]).as_py() or 0.0, 3)
            for stage in ("read", "decode", "preprocess", "predict")
        },
        bytes_read=pc.sum(cost["bytes_read"]).as_py() or 0,
        peak_memory_bytes=pc.max(cost["peak_memory_bytes"]).as_py() or 0,
    )


def is_publishing(folder: str) -> bool:
    """Whether a run has begun to publish: then nothing more may be scored, since its commits are made once."""
    return storage.exists(storage.join(folder, _DECISION))


def _decision(folder: str, may_miss: bool) -> tuple[CommittedRows, bool, bool]:
    """The working files that make up the run, whether objects may be missing, and whether an earlier try said so."""
    files = CommittedRows(folder)
    if not is_publishing(folder):
        return files, may_miss, False
    decision = json.loads(storage.read_bytes(storage.join(folder, _DECISION)))
    files.files = decision["files"]
    return files, decision["may_miss"], True


def _keep(output: str, identity: RunIdentity, files: CommittedRows, schema: pa.Schema, inventory: Inventory) -> _Kept:
    """The first row of each object, in file order, that no other run has committed meanwhile."""
    expected = inventory.objects["image_id"].to_numpy()
    columns = ["image_id", "status", "error_code", *(item.name for item in EFFORT_FIELDS)]
    keys = (
        files.dataset(schema).to_table(columns=columns)
        if files.files
        else pa.table([pa.array([], schema.field(name).type) for name in columns], columns)
    )
    ids: Ids = keys["image_id"].to_numpy()
    strangers = ids[~is_in(ids, np.sort(expected))]
    if len(strangers):
        raise MedVisionError(
            f"Expected rows of the {len(expected)} objects of the run, but {len(strangers)} rows belong to no object. "
            "Nothing was published; please report this."
        )
    keep: Mask = np.zeros(len(ids), np.bool_)
    keep[np.unique(ids, return_index=True)[1]] = True
    # Where nothing is new there is nothing to look up: a million committed rows take seconds to read.
    elsewhere = _committed_elsewhere(output, identity, expected, retries=inventory.retried > 0)
    keep &= ~is_in(ids, elsewhere)
    done_elsewhere = int(is_in(expected, elsewhere).sum())
    kept = keys.filter(pa.array(keep))
    return _Kept(keep, kept, done_elsewhere, len(expected) - done_elsewhere - kept.num_rows)


def _committed_elsewhere(output: str, identity: RunIdentity, expected: Ids, *, retries: bool) -> Ids:
    """image_id that other runs of the model have committed; a retry replaces earlier failures and ignores them.

    Only those between the least and the largest expected one are read: those of a part of an archive lie close.
    """
    if not len(expected):
        return expected
    condition = (pads.field("model_id") == identity.model_id) & (pads.field("run_key") != identity.run_key)
    condition &= id_between((int(expected.min()), int(expected.max())))
    found = [
        rows["image_id"].to_numpy()
        for name in (["predictions"] if retries else ["predictions", "failures"])
        if (rows := tables.read(output, name, ["image_id"], condition)) is not None
    ]
    return sorted_distinct(found)


def _replaced_failures(output: str, identity: RunIdentity, folder: str, kept: _Kept) -> int:
    """How many earlier failures this run replaces: counted before the first commit and kept for a second try."""
    place = storage.join(folder, "replaced.json")
    earlier = failed_ids(output, identity.model_id)
    count = int(np.isin(earlier, kept.rows["image_id"].to_numpy()).sum())
    if not storage.create_exclusive(place, json.dumps(count).encode()):
        count = int(json.loads(storage.read_bytes(place)))
    return count


def _commit(
    output: str, identity: RunIdentity, classes: tuple[str, ...], files: CommittedRows, kept: _Kept, *, retries: bool
) -> None:
    """Predictions first: an object that is retried is for a moment in both tables, never in none."""
    constants = {
        "run_key": pa.scalar(identity.run_key),
        "run_date": pa.scalar(identity.started_at.date(), pa.date32()),
        "model_id": pa.scalar(identity.model_id),
    }
    if not kept.rows.num_rows:
        return
    for name, status, target in (
        ("predictions", SCORED, tables.predictions_schema(classes)),
        ("failures", FAILED, tables.FAILURES),
    ):
        # A function, not its generator: a commit that the store broke off is tried again from the first row.
        rows = partial(_stream, files.dataset(working_schema(classes)), kept.keep, status, target, constants)
        replacing = (identity.model_id, kept.rows["image_id"].to_numpy()) if retries and name == "failures" else None
        tables.commit(output, name, target, rows, identity.run_key, replacing=replacing)


def _stream(
    rows: pads.Dataset,
    keep: Mask,
    status: str,
    target: pa.Schema,
    constants: dict[str, pa.Scalar],
) -> Iterator[pa.RecordBatch]:
    """Rows of one status as batches of a table's schema; memory is bounded by a batch."""
    position = 0
    for batch in rows.scanner(use_threads=False).to_batches():
        mask = pa.array(keep[position : position + batch.num_rows])
        position += batch.num_rows
        chosen = batch.filter(mask)
        chosen = chosen.filter(pc.equal(chosen["status"], status))
        if chosen.num_rows:
            columns = [
                pa.repeat(constants[item.name], chosen.num_rows) if item.name in constants else chosen[item.name]
                for item in target
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=target)
