"""Listed objects with the slices of each series taken together, as the one object that a volume is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from medvision_ray import storage
from medvision_ray.errors import StorageError
from medvision_ray.imaging.series_header import MoreNeeded, series_of
from medvision_ray.listing import in_order

SUFFIX = "#series"
"""What the address of a series has after that of its first member."""

_FIRST_BYTES = 64 << 10
_GROWTH = 8
_MOST_BYTES = 32 << 20
_OBJECTS_PER_TASK = 64

Entry = tuple[str, str, int]
"""Address, etag and size."""


def grouped(objects: pa.Table, threads: int) -> tuple[list[Entry], list[list[Entry] | None]]:
    """Group objects by the series that their headers name; the headers alone are read.

    Args:
        objects: `uri`, `etag` and `size` in path order.
        threads: how many read at once.

    Returns:
        Address, etag and size of every row, and its members in path order, None of an object by
        itself. A series stands where its first member stood: its address is that member's and
        `SUFFIX`, its etag is made of those of all members, its size is their sum. A single slice of
        a series is an object by itself.

    Raises:
        StorageError: the store refuses the credentials. Objects that cannot be read stay by
            themselves and fail later, each with its own reason.
    """
    together: dict[bytes, list[Entry]] = {}
    places: list[Entry | bytes] = []
    for entry, series in _with_series(objects, threads):
        if series is None:
            places.append(entry)
            continue
        if series not in together:
            together[series] = []
            places.append(series)
        together[series].append(entry)
    rows: list[Entry] = []
    members: list[list[Entry] | None] = []
    for place in places:
        group = together[place] if isinstance(place, bytes) else [place]
        rows.append(_as_one(group) if len(group) > 1 else group[0])
        members.append(group if len(group) > 1 else None)
    return rows, members


def _as_one(group: list[Entry]) -> Entry:
    etag = hashlib.sha256("\0".join(etag for _, etag, _ in group).encode()).hexdigest()[:32]
    return group[0][0] + SUFFIX, etag, sum(size for _, _, size in group)


def _with_series(objects: pa.Table, threads: int) -> Iterator[tuple[Entry, bytes | None]]:
    with ThreadPoolExecutor(threads, thread_name_prefix="headers") as pool:
        tasks = (batch for batch in objects.select(["uri", "etag", "size"]).to_batches(_OBJECTS_PER_TASK))
        for found in in_order(pool, _look, tasks, 4 * threads):
            yield from found


def _look(batch: pa.RecordBatch) -> list[tuple[Entry, bytes | None]]:
    entries = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return [(entry, _series(*entry)) for entry in entries]


def _series(uri: str, etag: str, size: int) -> bytes | None:
    read = partial(storage.read_start, uri, etag=etag or None)
    count = _FIRST_BYTES
    try:
        while True:
            start = read(count)
            whole = len(start) < count or len(start) >= size
            try:
                return series_of(start, whole)
            except MoreNeeded:
                if count >= _MOST_BYTES:
                    return None
                count *= _GROWTH
    except StorageError as error:
        if error.code == "credentials":
            raise
        return None
