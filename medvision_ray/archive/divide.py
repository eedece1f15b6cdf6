"""A huge archive listed once and cut into the lists of its parts, so that each part's run reads its own alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medvision_ray import storage
from medvision_ray.archive.ids import range_of_part
from medvision_ray.archive.inventory import SCHEMA, identified_batches
from medvision_ray.archive.selection import Selection
from medvision_ray.config import ArchiveConfig
from medvision_ray.errors import UsageError
from medvision_ray.privacy import Pseudonymiser

MOST_LISTS = 512
"""Each list is an open file while the archive is listed."""
_ROWS_HELD = 1_000_000
_LISTED = ("uri", "etag", "size")


@dataclass(frozen=True)
class Division:
    """What came of it.

    Attributes:
        files: addresses of the lists, the first part's first.
        objects: rows of each list.
        bytes: of all objects together.
        excluded: as `Inventory.excluded`.
        older: as `Inventory.older`.
    """

    files: tuple[str, ...]
    objects: tuple[int, ...]
    bytes: int
    excluded: int
    older: int


def divide(
    config: ArchiveConfig,
    parts: int,
    target: str,
    names: Pseudonymiser | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Division:
    """List an archive once and write a list a part: TARGET/K-of-N.parquet with the columns uri, etag and size.

    List K holds what a run with `archive.part: K/N` takes of the whole archive; the run reads it as `archive.list_file`. An object
    that a source names twice is twice in its list, which the run notices. No list is written before all is listed, and
    each is whole or not there. Memory holds a million rows, the temporary folder (TMPDIR) about 25 bytes an object.

    Args:
        config: without `part`, `limit` and `volumes`.
        parts: how many lists, 1 to `MOST_LISTS`.
        target: folder or prefix.
        names: see `inventory.image_ids`.
        progress: is called with lines for people.

    Raises:
        UsageError: another number of parts, an option that cuts the archive otherwise, or as `list_archive`.
        StorageError: the archive cannot be listed whole, or a list cannot be written.
    """
    if not 1 <= parts <= MOST_LISTS:
        raise UsageError(f"Expected 1 to {MOST_LISTS} parts, but got {parts}.")
    if config.part or config.limit or config.volumes:
        raise UsageError(
            "Expected the whole archive, object by object, but `archive.part`, `archive.limit` or `archive.volumes` is set. "
            "Leave them out where lists are made; a run that reads a list can set `limit`."
        )
    chosen = Selection(config, datetime.now(timezone.utc))
    firsts = np.array([range_of_part(f"{number}/{parts}")[0] for number in range(1, parts + 1)])
    total = 0
    with tempfile.TemporaryDirectory(prefix="medvision-lists-") as folder, ExitStack() as stack:
        drafts = [Path(folder) / f"{number}.parquet" for number in range(parts)]
        lists = [stack.enter_context(_Draft(path)) for path in drafts]
        held = listed = 0
        for batch in identified_batches(config, chosen, names):
            places = np.searchsorted(firsts, batch["image_id"].to_numpy(), side="right") - 1
            order = np.argsort(places, kind="stable")
            rows = batch.select(_LISTED).take(pa.array(order))
            ends = np.cumsum(np.bincount(places, minlength=parts))
            for number in np.unique(places):
                first = ends[number - 1] if number else 0
                lists[number].add(rows.slice(first, ends[number] - first))
            total += pc.sum(batch["size"]).as_py() or 0
            held += batch.num_rows
            listed += batch.num_rows
            if held >= _ROWS_HELD:
                for draft in lists:
                    draft.write()
                held = 0
                progress(f"{listed} objects listed")
        stack.close()  # writes what is held, and the files' ends
        files = tuple(storage.join(target, f"{number}-of-{parts}.parquet") for number in range(1, parts + 1))
        for file, path in zip(files, drafts, strict=True):
            storage.write_bytes(file, path.read_bytes())
            path.unlink()
    return Division(files, tuple(draft.rows for draft in lists), total, chosen.excluded, chosen.older)


class _Draft:
    """A list that is being written."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._held: list[pa.RecordBatch] = []
        self._writer = pq.ParquetWriter(path, pa.schema([SCHEMA.field(name) for name in _LISTED]), compression="zstd")

    def __enter__(self) -> _Draft:
        return self

    def __exit__(self, *_error: object) -> None:
        self.write()
        self._writer.close()

    def add(self, rows: pa.RecordBatch) -> None:
        self._held.append(rows)
        self.rows += rows.num_rows

    def write(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held).combine_chunks())
            self._held = []
