"""What is in the archive, under which key, and what a model has not committed yet."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from medvision_ray import listing, storage, tables
from medvision_ray.config import ArchiveConfig
from medvision_ray.errors import MedVisionError, StorageError

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("size", pa.int64()),
    ]
)
_STAT_THREADS = 16


@dataclass(frozen=True)
class Inventory:
    """A listing.

    Attributes:
        objects: rows of `SCHEMA`, in listing order, image_id distinct.
        excluded: objects that the include and exclude patterns took out.
        already_done: objects left out because the model has committed them.
    """

    objects: pa.Table
    excluded: int = 0
    already_done: int = 0


def image_id(uri: str, etag: str) -> int:
    """First 63 bits of sha256 of address and version: another content is another image."""
    digest = hashlib.sha256(f"{uri}\0{etag}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def list_archive(config: ArchiveConfig) -> Inventory:
    """List an archive.

    Raises:
        StorageError: the archive does not exist or cannot be listed.
    """
    include = [_glob(pattern) for pattern in config.include]
    exclude = [_glob(pattern) for pattern in config.exclude]
    found: list[listing.ObjectInfo] = []
    excluded = 0
    for item in listing.list_objects(config.uri):
        wanted = any(p.fullmatch(item.path) for p in include) and not any(p.fullmatch(item.path) for p in exclude)
        if wanted:
            found.append(item)
        else:
            excluded += 1
    return Inventory(_table(found), excluded)


def list_uris(uris: Sequence[str]) -> Inventory:
    """An inventory of named objects; one that is not there keeps a row, and will fail as `not_found`."""

    def stat(uri: str) -> listing.ObjectInfo:
        try:
            return listing.stat_object(uri)
        except StorageError:
            return listing.ObjectInfo(storage.absolute(uri), "", 0, "")

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return Inventory(_table(list(pool.map(stat, uris))))


def _table(found: Iterable[listing.ObjectInfo]) -> pa.Table:
    items = list(found)
    ids = np.fromiter((image_id(item.uri, item.etag) for item in items), np.int64, len(items))
    if len(np.unique(ids)) != len(ids):
        raise MedVisionError(
            "Expected every listed object to have its own image_id, but two are equal: an object is listed twice."
        )
    return pa.table(
        [pa.array(ids), [i.uri for i in items], [i.etag for i in items], [i.size for i in items]],
        schema=SCHEMA,
    )


def committed_ids(output: str, model_id: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Sorted image_id of everything that a model has committed, predictions and failures."""
    parts = []
    for name in ("predictions", "failures"):
        rows = tables.read(output, name, ["image_id"], pads.field("model_id") == model_id)
        if rows is not None:
            parts.append(rows["image_id"].to_numpy())
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def only_new(inventory: Inventory, output: str, model_id: str, limit: int | None = None) -> Inventory:
    """Leave out what a model has committed, then keep the first `limit`."""
    done = committed_ids(output, model_id)
    known = np.isin(inventory.objects["image_id"].to_numpy(), done, assume_unique=True)
    objects = inventory.objects.filter(pa.array(~known))
    if limit is not None:
        objects = objects.slice(0, limit)
    return Inventory(objects, inventory.excluded, int(known.sum()))


def freeze(inventory: Inventory, uri: str, rows_per_group: int) -> Inventory:
    """Write an inventory once; where somebody was first, theirs is returned."""
    meta = {"excluded": str(inventory.excluded), "already_done": str(inventory.already_done)}
    sink = io.BytesIO()
    table = inventory.objects.replace_schema_metadata(meta)
    pq.write_table(table, sink, row_group_size=rows_per_group)
    if storage.create_exclusive(uri, sink.getvalue()):
        return inventory
    return read_frozen(uri)


def read_frozen(uri: str) -> Inventory:
    """Read a frozen inventory back."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return Inventory(table.select(SCHEMA.names).cast(SCHEMA), int(meta["excluded"]), int(meta["already_done"]))


def _glob(pattern: str) -> re.Pattern[str]:
    """`**/` spans folders (also none), `**` anything, `*` and `?` stay inside a name."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))
