"""What is in the archive, under which key, and what a model has not committed yet."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from medvision_ray import listing, storage, tables
from medvision_ray.archive.ids import Ids, is_in, range_of_part, sorted_distinct
from medvision_ray.archive.list_file import list_file_batches, stat_or_absent, with_versions
from medvision_ray.archive.s3_inventory import inventory_batches
from medvision_ray.archive.selection import Selection, outermost
from medvision_ray.config import ArchiveConfig
from medvision_ray.errors import MedVisionError, UsageError
from medvision_ray.privacy import Pseudonymiser

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("size", pa.int64()),
    ]
)
Range = tuple[int, int]
VOLUME_SCHEMA = SCHEMA.append(pa.field("members", pa.list_(pa.struct(list(SCHEMA)[1:]))))
"""Columns of an inventory whose rows may be series: `members` are their objects in path order, null of an object by itself."""


@dataclass(frozen=True)
class Inventory:
    """A listing.

    Attributes:
        objects: rows of `SCHEMA`, of `VOLUME_SCHEMA` with `archive.volumes`; image_id distinct; of an archive in path order.
        excluded: objects that the include and exclude patterns took out, and those that another source than
            listing names outside the archive.
        already_done: objects left out because the model has committed them.
        retried: of the objects, those that failed before and are to be tried again.
        older: objects left out because they were last modified before `since`.
        duplicates: rows left out because a list named their object before.
        volumes: series that were listed, each one row.
    """

    objects: pa.Table
    excluded: int = 0
    already_done: int = 0
    retried: int = 0
    older: int = 0
    duplicates: int = 0
    volumes: int = 0


def image_id(uri: str, etag: str) -> int:
    """First 63 bits of sha256 of address and version: another content is another image."""
    return int(image_ids(pa.array([uri]), pa.array([etag]))[0])


def image_ids(uris: pa.Array, etags: pa.Array, names: Pseudonymiser | None = None) -> Ids:
    """`image_id` of many objects, shape `(N,)`; neither may be null.

    Args:
        names: makes of an address what the tables have. It is that which is hashed here: a hash of the address
            itself, without a key, would let anybody try addresses until one fits.
    """
    if names is not None and names.policy.uri == "hash":
        uris = pa.array([names.address(uri) for uri in uris.to_pylist()], pa.string())
    sha256 = hashlib.sha256
    keys = pc.binary_join_element_wise(uris.cast(pa.binary()), etags.cast(pa.binary()), b"\0").to_pylist()
    first = b"".join([sha256(key).digest()[:8] for key in keys])
    return (np.frombuffer(first, ">u8") >> 1).astype(np.int64)


def list_archive(config: ArchiveConfig, names: Pseudonymiser | None = None) -> Inventory:
    """List an archive, or a part of it, from the source that its configuration names.

    Only what belongs to the part is kept in memory; `excluded` and `older` count in the whole archive.

    Args:
        names: see `image_ids`; the addresses in the inventory stay those that can be read.

    Raises:
        UsageError: a source is not of its form or does not fit the archive.
        StorageError: the archive or a source does not exist or cannot be listed whole.
    """
    chosen = Selection(config, datetime.now(timezone.utc))
    listed = (_of_part(batch, config.part) for batch in identified_batches(config, chosen, names))
    parts = [batch for batch in listed if batch.num_rows]
    objects = _in_path_order(pa.Table.from_batches(parts, SCHEMA))
    distinct = _first_of_each_uri(objects)
    duplicates = objects.num_rows - distinct.num_rows
    if config.volumes:
        distinct = _with_volumes(distinct, config.listing_threads, names)
    _assert_distinct(distinct)
    return Inventory(
        distinct,
        excluded=chosen.excluded,
        older=chosen.older,
        duplicates=duplicates,
        volumes=distinct.num_rows - distinct["members"].null_count if config.volumes else 0,
    )


def identified_batches(
    config: ArchiveConfig, chosen: Selection, names: Pseudonymiser | None = None
) -> Iterator[pa.RecordBatch]:
    """What is chosen of an archive as batches of `SCHEMA`, all of it whatever `part` says, in the source's order.

    Raises:
        UsageError, StorageError: as `list_archive`.
    """
    with ThreadPoolExecutor(config.listing_threads) as pool:
        for batch in _source(config):
            yield _identified(chosen.by_age(with_versions(chosen.by_path(batch), pool)), names)
    if chosen.listed and chosen.listed == chosen.outside:
        raise UsageError(
            f"Expected objects below {config.uri} in {config.s3_inventory or config.list_file}, "
            f"but none of its {chosen.listed} lies there; `archive.uri` must be a folder or prefix above them."
        )


def _with_volumes(objects: pa.Table, threads: int, names: Pseudonymiser | None) -> pa.Table:
    """Rows of `VOLUME_SCHEMA`, the slices of a series as one."""
    from medvision_ray.archive.series import grouped  # loads the DICOM decoders

    rows, members = grouped(objects, threads)
    uris, etags = (pa.array([row[k] for row in rows], pa.string()) for k in (0, 1))
    nested = [
        [dict(zip(SCHEMA.names[1:], part, strict=True)) for part in group] if group else None for group in members
    ]
    columns = [pa.array(image_ids(uris, etags, names)), uris, etags, pa.array([row[2] for row in rows], pa.int64())]
    return pa.table([*columns, pa.array(nested, VOLUME_SCHEMA.field("members").type)], schema=VOLUME_SCHEMA)


def _source(config: ArchiveConfig) -> Iterator[pa.RecordBatch]:
    if config.s3_inventory:
        return inventory_batches(config.s3_inventory, storage.absolute(config.uri), config.since is not None)
    if config.list_file:
        return list_file_batches(config.list_file, config.uri)
    return listing.list_batches(config.uri, outermost(config.prefix), config.listing_threads)


def _identified(batch: pa.RecordBatch, names: Pseudonymiser | None) -> pa.RecordBatch:
    ids = pa.array(image_ids(batch["uri"], batch["etag"], names))
    return pa.RecordBatch.from_arrays([ids, batch["uri"], batch["etag"], batch["size"]], schema=SCHEMA)


def _of_part(objects: pa.RecordBatch, part: str | None) -> pa.RecordBatch:
    if part is None:
        return objects
    first, last = range_of_part(part)
    ids = objects["image_id"]
    return objects.filter(pc.and_(pc.greater_equal(ids, first), pc.less_equal(ids, last)))


def _in_path_order(objects: pa.Table) -> pa.Table:
    """Sorted by address, which below one root is path order; equal ones stay as they came."""
    ascends = all(_ascends(chunk) for chunk in objects["uri"].chunks)
    ends = [(chunk[0].as_py(), chunk[-1].as_py()) for chunk in objects["uri"].chunks if len(chunk)]
    if ascends and all(one[1] <= two[0] for one, two in pairwise(ends)):
        return objects
    objects = objects.combine_chunks()  # pyarrow sorts one chunk several times as fast as many
    return objects.take(pc.sort_indices(objects["uri"]))


def _ascends(uris: pa.Array) -> bool:
    return len(uris) < 2 or bool(pc.all(pc.less_equal(uris[:-1], uris[1:])).as_py())


def _first_of_each_uri(objects: pa.Table) -> pa.Table:
    if objects.num_rows < 2:
        return objects
    uris = objects["uri"]
    new = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1))
    if pc.all(new).as_py():
        return objects
    return objects.filter(pa.chunked_array([pa.array([True]), *new.chunks]))


def _assert_distinct(objects: pa.Table) -> None:
    ids = objects["image_id"].to_numpy()
    if len(sorted_distinct([ids])) != len(ids):
        raise MedVisionError(
            "Expected every listed object to have its own image_id, but two are equal: an object is listed twice."
        )


def list_uris(uris: Sequence[str], names: Pseudonymiser | None = None) -> Inventory:
    """An inventory of named objects in their order; one that is not there keeps a row, and will fail as `not_found`.

    Args:
        names: see `image_ids`.

    Raises:
        StorageError: the store cannot be asked.
        MedVisionError: an object is named twice.
    """
    with ThreadPoolExecutor(listing.THREADS) as pool:
        found = list(pool.map(stat_or_absent, (storage.absolute(uri) for uri in uris)))
    named, etags = listing.spelled([info.uri for info in found]), pa.array([info.etag for info in found], pa.string())
    sizes = pa.array([info.size for info in found], pa.int64())
    objects = pa.table([pa.array(image_ids(named, etags, names)), named, etags, sizes], schema=SCHEMA)
    _assert_distinct(objects)
    return Inventory(objects)


def only_new(
    inventory: Inventory,
    output: str,
    model_id: str,
    limit: int | None = None,
    retry_failed: bool | tuple[str, ...] = False,
) -> Inventory:
    """Leave out what a model has committed, then keep the first `limit`.

    Args:
        retry_failed: failures do not count as committed: all, or those of these error codes.
    """
    ids = inventory.objects["image_id"].to_numpy()
    if not len(ids):
        return inventory
    within = int(ids.min()), int(ids.max())
    again = failed_ids(output, model_id, retry_failed, within)
    done = committed_ids(output, model_id, again, within)
    known = is_in(ids, done)
    objects = inventory.objects.filter(pa.array(~known)) if known.any() else inventory.objects
    if limit is not None:
        objects = objects.slice(0, limit)
    retried = int(is_in(objects["image_id"].to_numpy(), again).sum())
    return replace(inventory, objects=objects, already_done=int(known.sum()), retried=retried)


def committed_ids(output: str, model_id: str, again: Ids | None = None, within: Range | None = None) -> Ids:
    """Sorted image_id of what a model has committed: predictions, and failures but those `again` (sorted).

    Args:
        within: least and largest image_id that are asked for, so that a part of an archive needs memory for a part.
    """
    condition = (pads.field("model_id") == model_id) & id_between(within)
    predictions = tables.read(output, "predictions", ["image_id"], condition)
    parts = [] if predictions is None else [predictions["image_id"].to_numpy()]
    failed = failed_ids(output, model_id, within=within)
    parts.append(failed if again is None else failed[~is_in(failed, again)])
    return sorted_distinct(parts)


def failed_ids(output: str, model_id: str, codes: bool | tuple[str, ...] = True, within: Range | None = None) -> Ids:
    """Sorted image_id of a model's failures: all, or those of these error codes, or none; `within` as above."""
    condition = (pads.field("model_id") == model_id) & id_between(within)
    if isinstance(codes, tuple):
        condition &= pads.field("error_code").isin(codes)
    rows = tables.read(output, "failures", ["image_id"], condition) if codes else None
    return sorted_distinct([] if rows is None else [rows["image_id"].to_numpy()])


def id_between(within: Range | None) -> pads.Expression:
    """Rows of a table whose image_id lies in a range, ends included; None is all."""
    if within is None:
        return pads.scalar(True)
    return (pads.field("image_id") >= within[0]) & (pads.field("image_id") <= within[1])


_COUNTS = tuple(field.name for field in fields(Inventory) if field.name != "objects")


def freeze(inventory: Inventory, uri: str, rows_per_group: int) -> Inventory:
    """Write an inventory once; where somebody was first, theirs is returned.

    Args:
        rows_per_group: written at a time, which bounds the memory that writing takes.
    """
    counts = {name: str(getattr(inventory, name)) for name in _COUNTS}
    with tempfile.TemporaryFile() as file:
        table = inventory.objects.replace_schema_metadata(counts)
        pq.write_table(table, file, row_group_size=rows_per_group)
        file.seek(0)
        first = storage.create_exclusive(uri, file.read())
    return inventory if first else read_frozen(uri)


def read_frozen(uri: str) -> Inventory:
    """Read a frozen inventory back; a count that an older version did not write is 0."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    counts = {name: int(meta.get(name, 0)) for name in _COUNTS}
    schema = VOLUME_SCHEMA if "members" in table.schema.names else SCHEMA
    return Inventory(table.select(schema.names).cast(schema), **counts)
