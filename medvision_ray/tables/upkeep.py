"""Upkeep: small files become large ones, old files go, and what was done can be listed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from medvision_ray import storage
from medvision_ray.errors import MedVisionError, StorageError, UsageError
from medvision_ray.tables.delta import TARGET_FILE_BYTES, address, open_table
from medvision_ray.tables.schema import PARTITIONS, TABLES

# Reading costs about 2 ms a file on a disk and one or two round trips on an object store; with 16, a reader of a
# nightly table waits for 15 extra files at worst, and a year of nights rewrites each table 23 times (its small part).
_SMALL_FILES = 16
_SMALL_BYTES = TARGET_FILE_BYTES // 4
# Opening a table reads every commit since the last checkpoint: about 0.6 ms each on a disk, a request each on S3.
# deltalake itself checkpoints each 100 commits, a month of nights.
_COMMITS_A_CHECKPOINT = 20

RETAIN_HOURS = 7 * 24
"""Delta Lake's own default."""
MIN_RETAIN_HOURS = 24
"""Longer than any publish and any job that reads: files younger than this may belong to one at work."""


@dataclass(frozen=True)
class Tidied:
    """What became of one table.

    Attributes:
        files_before: data files of the newest version before.
        files_after: the same after.
        checkpoint: whether the log got a checkpoint.
        skipped: why nothing more was done, None where all was.
    """

    table: str
    files_before: int
    files_after: int
    checkpoint: bool
    skipped: str | None = None


@dataclass(frozen=True)
class Vacuumed:
    """Files of one table that no version of the last `retain_hours` needs.

    Attributes:
        files: paths below the table.
        bytes: their sizes together.
        deleted: False after a look only.
    """

    table: str
    files: list[str]
    bytes: int
    retain_hours: int
    deleted: bool


@dataclass(frozen=True)
class Commit:
    """One version of one table; `run_key` is None for upkeep, counts None where the log has none."""

    table: str
    version: int
    time: datetime
    operation: str
    run_key: str | None
    rows_added: int | None
    rows_removed: int | None
    files_added: int | None
    files_removed: int | None


def tidy(output: str) -> list[Tidied]:
    """Compact what has gathered many small files and checkpoint long logs; after each publish.

    Never raises for the store or a concurrent commit: the run is published, and the next one tidies
    again. Rows, and the record of which run has committed, stay as they are. Deletes nothing.
    """
    done = []
    for name in TABLES:
        try:
            tidied = _tidy(output, name, _SMALL_FILES, _COMMITS_A_CHECKPOINT)
        except MedVisionError as error:
            tidied = Tidied(name, 0, 0, False, str(error))
        if tidied is not None:
            done.append(tidied)
    return done


def compact(output: str) -> list[Tidied]:
    """Compact every partition of more than one small file, and checkpoint every log.

    Raises:
        MedVisionError: there are no tables, the store refused, or another commit came between.
    """
    done = [_tidy(output, name, 2, 1) for name in _existing(output)]
    return [tidied for tidied in done if tidied is not None]


def _existing(output: str) -> list[str]:
    names = [name for name in TABLES if storage.exists(storage.join(address(output, name), "_delta_log"))]
    if not names:
        raise UsageError(f"Expected tables below {storage.join(output, 'tables')}, but there are none.")
    return names


def _tidy(output: str, name: str, small_files: int, commits_a_checkpoint: int) -> Tidied | None:
    from deltalake.exceptions import CommitFailedError, DeltaError

    table = open_table(output, name)
    if table is None:
        return None
    before = len(table.file_uris())
    try:
        for partition in _crowded(table, name, small_files):
            # One partition and one bin at a time: memory stays that of one file being written.
            table.optimize.compact(partition, target_size=TARGET_FILE_BYTES, max_concurrent_tasks=1)
        after = len(table.file_uris())
        checkpoint = table.version() - _last_checkpoint(output, name) >= commits_a_checkpoint
        if checkpoint:
            table.create_checkpoint()
    except CommitFailedError:
        raise MedVisionError(f"Another commit to {name} came between; compact again later.") from None
    except (DeltaError, OSError):
        raise MedVisionError(
            f"Expected to compact the table at {address(output, name)}, but the store refused."
        ) from None
    return Tidied(name, before, after, checkpoint)


def _crowded(table: Any, name: str, small_files: int) -> list[list[tuple[str, str, str]] | None]:
    """Partitions (as filters of deltalake) with so many small files; None is the whole of an unpartitioned table."""
    files = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    keys = PARTITIONS[name]
    count = Counter(
        tuple(str(item[f"partition.{key}"]) for key in keys) for item in files if item["size_bytes"] < _SMALL_BYTES
    )
    crowded = [values for values, small in count.items() if small >= small_files]
    return [[(key, "=", value) for key, value in zip(keys, values, strict=True)] or None for values in crowded]


def _last_checkpoint(output: str, name: str) -> int:
    """Version of the log's last checkpoint, -1 where it has none."""
    try:
        found = json.loads(storage.read_bytes(storage.join(address(output, name), "_delta_log", "_last_checkpoint")))
    except StorageError as error:
        if error.code == "not_found":
            return -1
        raise
    return int(found["version"])


def vacuum(
    output: str, *, retain_hours: float = RETAIN_HOURS, delete: bool = False, force: bool = False
) -> list[Vacuumed]:
    """Find, and with `delete` remove, files that no version of the last `retain_hours` needs.

    These are files that compaction or a retry replaced, and what killed writers left. Versions older
    than that can no longer be read. Everything below a table's folder counts, also foreign files.

    Args:
        force: allow `retain_hours` under `MIN_RETAIN_HOURS`; a run that publishes or a job that reads
            meanwhile can lose its files.

    Raises:
        UsageError: `retain_hours` is too short, or there are no tables.
        MedVisionError: the store refused.
    """
    from deltalake.exceptions import DeltaError

    if retain_hours < (0 if force else MIN_RETAIN_HOURS):
        raise UsageError(
            f"Expected --retain-hours of at least {MIN_RETAIN_HOURS}, but got {retain_hours:g}: files of a run that is "
            "publishing, or that a job is reading, would go. With --force you say that there is none."
        )
    hours = int(retain_hours)  # deltalake counts whole hours
    done = []
    for name in _existing(output):
        table = open_table(output, name)
        try:
            files = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
            sizes = _sizes(address(output, name), files)
            if sizes and delete:
                table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True)
        except (DeltaError, OSError):
            raise MedVisionError(f"Expected to vacuum {address(output, name)}, but the store refused.") from None
        done.append(Vacuumed(name, sorted(sizes), sum(sizes.values()), hours, delete))
    return done


def _sizes(place: str, paths: list[str]) -> dict[str, int]:
    """Those that are there: deltalake names files that an earlier vacuum took, until the log forgets them."""
    filesystem, root = storage.filesystem(place)
    infos = filesystem.get_file_info([f"{root}/{path}" for path in paths])
    return {path: info.size for path, info in zip(paths, infos, strict=True) if info.type == pafs.FileType.File}


def history(output: str, limit: int | None = None) -> list[Commit]:
    """Commits of every table, newest first within a table, as far back as the log reaches.

    Args:
        limit: at most so many a table.

    Raises:
        UsageError: there are no tables.
    """
    found: list[Commit] = []
    for name in _existing(output):
        found.extend(_commit_of(name, entry) for entry in open_table(output, name).history(limit))
    return found


def _commit_of(name: str, entry: dict[str, Any]) -> Commit:
    metrics = entry.get("operationMetrics", {})

    def total(*names: str) -> int | None:
        known = [int(metrics[key]) for key in names if key in metrics]
        return sum(known) if known else None

    updated, deleted, inserted = (f"num_target_rows_{what}" for what in ("updated", "deleted", "inserted"))
    return Commit(
        table=name,
        version=entry["version"],
        time=datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=entry["timestamp"]),
        operation=entry["operation"],
        run_key=entry.get("run_key"),
        rows_added=total("num_added_rows", inserted, updated),
        rows_removed=total(updated, deleted),
        files_added=total("num_added_files", "num_target_files_added", "numFilesAdded"),
        files_removed=total("num_removed_files", "num_target_files_removed", "numFilesRemoved", "numDeletedFiles"),
    )
