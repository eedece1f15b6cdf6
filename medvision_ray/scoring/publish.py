"""Publish a run: every object has exactly one row, one commit a table, the runs table last."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

import medvision_ray
from medvision_ray import tables
from medvision_ray.archive.inventory import Inventory
from medvision_ray.errors import MedVisionError
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.rows import FAILED, SCORED, working_schema


@dataclass(frozen=True)
class RunSummary:
    """What a run did; `seconds` are of this process, `images_per_second` of its scoring pass alone."""

    run_key: str
    job: str
    model_id: str
    archive: str
    listed: int
    excluded: int
    already_done: int
    scored: int
    failed: int
    failures_by_code: dict[str, int]
    seconds: dict[str, float]
    images_per_second: float | None
    over_budget: bool

    def sentence(self) -> str:
        """One line for a person."""
        reasons = ", ".join(f"{count} {code}" for code, count in self.failures_by_code.items())
        rate = f", {self.images_per_second:.1f} images/s" if self.images_per_second else ""
        return (
            f"Run {self.run_key}: {self.listed} listed, {self.already_done} already done, {self.scored} scored, "
            f"{self.failed} failed{f' ({reasons})' if reasons else ''}{rate}."
        )


@dataclass(frozen=True)
class RunIdentity:
    """What names a run in every row: kept from its first start, so that a resumed run is the same run."""

    run_key: str
    job: str
    model_id: str
    archive: str
    started_at: datetime


def publish_rows(
    output: str, identity: RunIdentity, classes: tuple[str, ...], folder: str, inventory: Inventory
) -> RunSummary:
    """Check that every object has exactly one row, then commit predictions and failures.

    Raises:
        MedVisionError: an object has no row, or a row no object; nothing is committed then.
    """
    schema = working_schema(classes)
    files = CommittedRows(folder)
    keys = files.dataset(schema).to_table(columns=["image_id", "status", "error_code"]) if files.files else None
    keep = _first_rows(keys)
    kept = keys.filter(pa.array(keep)) if keys is not None else None
    _assert_complete(inventory, kept)
    constants = {
        "run_key": pa.scalar(identity.run_key),
        "run_date": pa.scalar(identity.started_at.date(), pa.date32()),
        "model_id": pa.scalar(identity.model_id),
    }
    if files.files:
        for name, status, target in (
            ("predictions", SCORED, tables.predictions_schema(classes)),
            ("failures", FAILED, tables.FAILURES),
        ):
            rows = _stream(files.dataset(schema), keep, status, target, constants)
            tables.commit(output, name, target, rows, identity.run_key)
    codes = kept.filter(pc.field("status") == FAILED)["error_code"].value_counts() if kept is not None else []
    by_code = sorted(
        ((str(i["values"]), int(i["counts"].as_py())) for i in codes), key=lambda item: (-item[1], item[0])
    )
    failed = sum(count for _, count in by_code)
    return RunSummary(
        run_key=identity.run_key,
        job=identity.job,
        model_id=identity.model_id,
        archive=identity.archive,
        listed=inventory.objects.num_rows + inventory.already_done,
        excluded=inventory.excluded,
        already_done=inventory.already_done,
        scored=inventory.objects.num_rows - failed,
        failed=failed,
        failures_by_code=dict(by_code),
        seconds={},
        images_per_second=None,
        over_budget=False,
    )


def _first_rows(keys: pa.Table | None) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """True for the first row of each object, in file order."""
    if keys is None:
        return np.empty(0, bool)
    ids = keys["image_id"].to_numpy()
    keep = np.zeros(len(ids), bool)
    keep[np.unique(ids, return_index=True)[1]] = True
    return keep


def _assert_complete(inventory: Inventory, kept: pa.Table | None) -> None:
    expected = np.sort(inventory.objects["image_id"].to_numpy())
    found = np.sort(kept["image_id"].to_numpy()) if kept is not None else np.empty(0, np.int64)
    if not np.array_equal(expected, found):
        raise MedVisionError(
            f"Expected one row for each of {len(expected)} objects, but {len(np.setdiff1d(expected, found))} have none and "
            f"{len(np.setdiff1d(found, expected))} rows belong to no object. Nothing was published; please report this."
        )


def _stream(
    rows: pads.Dataset,
    keep: np.ndarray[tuple[int], np.dtype[np.bool_]],
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


def publish_run(output: str, identity: RunIdentity, summary: RunSummary, config: dict[str, Any]) -> None:
    """Commit the run's own row, last: what it names is published."""
    row = {
        **{name: getattr(summary, name) for name in ("run_key", "job", "model_id", "archive")},
        **{name: getattr(summary, name) for name in ("listed", "excluded", "already_done", "scored", "failed")},
        "config": json.dumps(config, sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
        "seconds": sum(summary.seconds.values()),
        "images_per_second": summary.images_per_second,
        "started_at": identity.started_at,
        "finished_at": datetime.now(timezone.utc),
    }
    table = pa.Table.from_pylist([row], schema=tables.RUNS)
    tables.commit(output, "runs", tables.RUNS, table.to_batches(), summary.run_key)


def published_run(output: str, run_key: str) -> RunSummary | None:
    """The summary of a run that is published, read back from the tables; None where it is not."""
    rows = tables.read(output, "runs", None, pads.field("run_key") == run_key)
    if rows is None or rows.num_rows == 0:
        return None
    row = rows.to_pylist()[0]
    failures = tables.read(output, "failures", ["error_code"], pads.field("run_key") == run_key)
    counts = failures["error_code"].value_counts() if failures is not None else []
    names = ("run_key", "job", "model_id", "archive", "listed", "excluded", "already_done", "scored", "failed")
    return RunSummary(
        **{name: row[name] for name in names},
        failures_by_code={str(i["values"]): int(i["counts"].as_py()) for i in counts},
        seconds={"total": row["seconds"]},
        images_per_second=row["images_per_second"],
        over_budget=False,
    )


def versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    from importlib.metadata import version

    names = ("ray", "torch", "pydicom", "imagecodecs", "opencv-python-headless", "deltalake")
    return {
        "medvision_ray": medvision_ray.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
