"""A list file as a source: text with an address a line, or CSV or Parquet with a column `uri`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from medvision_ray import storage
from medvision_ray.errors import StorageError, UsageError
from medvision_ray.listing import LISTING, ObjectInfo, spelled, stat_object

_BATCH_ROWS = 1 << 14
_TYPES = {"uri": pa.string(), "etag": pa.string(), "size": pa.int64()}
_NO_URI = "Expected a column `uri` in {}, but it has none."


def list_file_batches(place: str, root: str) -> Iterator[pa.RecordBatch]:
    """What a list names as batches of `LISTING`, with `path` null, and `etag` null where the list tells it not.

    Args:
        place: path or URI; `.parquet`, `.csv` and `.csv.gz` by name, else text in UTF-8, blank lines skipped.
        root: what relative paths start from.

    Raises:
        UsageError: it is not of this form.
        StorageError: it is not there.
    """
    name = storage.absolute(place).lower()
    data = storage.read_bytes(place)
    if name.endswith(".parquet"):
        rows = _parquet_rows(data, place)
    elif name.endswith((".csv", ".csv.gz")):
        rows = _csv_rows(data, place)
    else:
        rows = _text_rows(data, place)
    try:
        for batch in rows:
            if batch.num_rows:
                yield _addressed(batch, storage.absolute(root))
    except (pa.ArrowException, OSError):
        raise UsageError(
            f"Expected {place} to be what its name says, with text in `uri` and `etag` and whole numbers in `size`, "
            "but it cannot be read so."
        ) from None


def _text_rows(data: bytes, place: str) -> Iterator[pa.RecordBatch]:
    lines = iter(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")))
    number = 0
    while block := list(islice(lines, _BATCH_ROWS)):
        texts = []
        for line in block:
            number += 1
            try:
                texts.append(line.decode().rstrip("\r\n"))
            except UnicodeDecodeError:
                raise UsageError(
                    f"Expected UTF-8 text in {place}, but line {number} is none. "
                    "Write such a name as file:///, percent-encoded."
                ) from None
        yield pa.RecordBatch.from_pydict({"uri": pa.array([text for text in texts if text.strip()], pa.string())})


def _csv_rows(data: bytes, place: str) -> Iterator[pa.RecordBatch]:
    def opened(**more: Any) -> Any:
        source: Any = pa.BufferReader(data)
        if data[:2] == b"\x1f\x8b":
            source = pa.CompressedInputStream(source, "gzip")
        return pacsv.open_csv(source, convert_options=pacsv.ConvertOptions(column_types=_TYPES, **more))

    # Columns that are not ours are not read: their types would be guessed from the first rows and bind the others.
    ours = [name for name in opened().schema.names if name in _TYPES]
    nulls = {"strings_can_be_null": True, "quoted_strings_can_be_null": True, "null_values": [""]}
    for batch in opened(include_columns=ours, **nulls) if ours else ():
        yield _named(batch, place)
    if "uri" not in ours:
        raise UsageError(_NO_URI.format(place))


def _parquet_rows(data: bytes, place: str) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(pa.BufferReader(data))
    columns = [name for name in _TYPES if name in file.schema_arrow.names]
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        yield _named(batch, place)


def _named(batch: pa.RecordBatch, place: str) -> pa.RecordBatch:
    if "uri" not in batch.schema.names:
        raise UsageError(_NO_URI.format(place))
    return batch.filter(pc.greater(pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(batch["uri"])), 0), 0))


def _addressed(batch: pa.RecordBatch, root: str) -> pa.RecordBatch:
    uris = _addresses(batch["uri"].cast(pa.string()), root)
    count = batch.num_rows
    names = batch.schema.names
    sizes = batch["size"].cast(pa.int64()) if "size" in names else pa.nulls(count, pa.int64())
    etags = pc.utf8_trim(batch["etag"].cast(pa.string()), '"') if "etag" in names else pa.nulls(count, pa.string())
    etags = pc.if_else(pc.and_(pc.is_valid(sizes), pc.fill_null(pc.not_equal(etags, ""), False)), etags, None)
    columns = [pa.nulls(count, pa.string()), uris, sizes, etags, pa.nulls(count, LISTING.field("mtime").type)]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _addresses(uris: pa.Array, root: str) -> pa.Array:
    # What `storage.absolute` makes of these, at once: a list of millions is of one bucket.
    if pc.all(pc.or_(pc.starts_with(uris, "s3://"), pc.starts_with(uris, "gs://"))).as_py():
        return pc.utf8_rtrim(uris, "/")
    return spelled([_address(text, root) for text in uris.to_pylist()])


def _address(text: str, root: str) -> str:
    """One spelling of an address, the one that listing `root` would give."""
    if "://" in text or text.startswith("/"):
        return storage.absolute(text)
    place = f"{root.rstrip('/')}/{text}"
    return storage.absolute(place) if storage.scheme_of(root) == "file" else place


def with_versions(batch: pa.RecordBatch, pool: ThreadPoolExecutor) -> pa.RecordBatch:
    """Ask the store for size, version and time where `etag` is null.

    Raises:
        StorageError: the store cannot be asked; an object that is not there or refused keeps a row without version.
    """
    unknown = pc.indices_nonzero(batch["etag"].is_null()).to_pylist()
    if not unknown:
        return batch
    columns = {name: batch[name].to_pylist() for name in ("size", "etag")}
    mtimes = batch["mtime"].cast(pa.int64()).to_pylist()
    uris = batch["uri"].take(pa.array(unknown)).to_pylist()
    for row, info in zip(unknown, pool.map(stat_or_absent, uris), strict=True):
        columns["size"][row], columns["etag"][row], mtimes[row] = info.size, info.etag, info.mtime_us
    arrays = [
        batch["path"],
        batch["uri"],
        columns["size"],
        columns["etag"],
        pa.array(mtimes, LISTING.field("mtime").type),
    ]
    return pa.RecordBatch.from_arrays([pa.array(values) for values in arrays], schema=LISTING)


def stat_or_absent(uri: str) -> ObjectInfo:
    """Size and version of an object; empty where it is not there or refused, so that reading it tells why.

    Raises:
        StorageError: the store cannot be asked.
    """
    try:
        return stat_object(uri)
    except StorageError as error:
        if error.code not in ("not_found", "access_denied"):
            raise
        return ObjectInfo(uri, "", 0, "")
