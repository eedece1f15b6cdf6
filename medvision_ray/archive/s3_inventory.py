"""S3 Inventory as a source: the manifest, and its data files in CSV or Parquet.

Layout and fields: Amazon S3 User Guide, "Locating your inventory list" and "Amazon S3 Inventory list".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from medvision_ray import storage
from medvision_ray.errors import StorageError, UsageError
from medvision_ray.listing import LISTING, in_order
from medvision_ray.s3 import bucket_key

_BATCH_ROWS = 1 << 16
_FILES_AT_ONCE = 2
_OPTIONAL_FIELDS = {"size": "Size", "etag": "ETag"}


@dataclass(frozen=True)
class _Manifest:
    place: str
    bucket: str
    format: str
    columns: tuple[str, ...]  # of CSV; Parquet names its own
    files: tuple[tuple[str, str], ...]  # address and MD5


def inventory_batches(place: str, root: str, dated: bool) -> Iterator[pa.RecordBatch]:
    """The current objects of an inventory as batches of `LISTING`, with `path` null.

    Delete markers, versions that are not the latest, and folder markers are no objects.

    Args:
        place: path or URI of `manifest.json`. Its data files are sought in the bucket that it names, or, where
            the manifest lies on no S3, in `../data` as S3 lays them out.
        root: the archive; must be in the inventory's source bucket.
        dated: refuse an inventory without LastModifiedDate.

    Raises:
        UsageError: it is no manifest of this kind, of another bucket, or lacks a field.
        StorageError: the manifest or a data file is not there, damaged or not readable.
    """
    manifest = _read_manifest(place)
    bucket, _ = bucket_key(root)
    if manifest.bucket != bucket:
        raise UsageError(
            f"Expected an S3 Inventory of the bucket {bucket}, in which `archive.uri` is, "
            f"but {place} lists {manifest.bucket}."
        )
    rows_of = _csv_batches if manifest.format == "CSV" else _parquet_batches
    pool = ThreadPoolExecutor(_FILES_AT_ONCE)
    try:
        for data in in_order(pool, _fetch, manifest.files, _FILES_AT_ONCE):
            for rows in rows_of(manifest, dated, data):
                yield _objects(rows, manifest)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise StorageError(
            f"Expected {manifest.format} data files as {place} describes them, but one cannot be read so."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _read_manifest(place: str) -> _Manifest:
    try:
        content = json.loads(storage.read_bytes(place))
        source, kind, schema = content["sourceBucket"], content["fileFormat"], content["fileSchema"]
        target = content["destinationBucket"].rsplit(":", 1)[-1]  # arn:aws:s3:::NAME
        listed = [(item["key"], item.get("MD5checksum", "")) for item in content["files"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"Expected the manifest.json of an S3 Inventory at {place} (an object with sourceBucket, "
            "destinationBucket, fileFormat, fileSchema and files with a key each), but it is none."
        ) from None
    if kind not in ("CSV", "Parquet"):
        raise UsageError(
            f"Expected an S3 Inventory in CSV or Parquet, but {place} says {kind!r}. "
            "Set the inventory's output format to Parquet."
        )
    columns = tuple(_plain(name) for name in schema.split(",")) if kind == "CSV" else ()
    files = tuple((_data_file(place, target, key), md5) for key, md5 in listed)
    return _Manifest(place, source, kind, columns, files)


def _data_file(manifest: str, bucket: str, key: str) -> str:
    place = storage.absolute(manifest)
    if storage.scheme_of(place) == "s3":
        return f"s3://{bucket}/{key}"
    return storage.join(place.rsplit("/", 2)[0], "data", key.rsplit("/", 1)[-1])


def _fetch(file: tuple[str, str]) -> bytes:
    place, md5 = file
    data = storage.read_bytes(place)
    if md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5.lower():
        raise StorageError(f"Expected the data file {place} with the MD5 that its manifest names, but it has another.")
    return data


def _plain(name: str) -> str:
    """One name for `LastModifiedDate` of CSV and `last_modified_date` of Parquet."""
    return name.strip().replace("_", "").lower()


def _columns(available: dict[str, str], manifest: _Manifest, dated: bool) -> dict[str, str]:
    """The fields that are read, by plain name."""
    required = {"key": "Key", **_OPTIONAL_FIELDS, **({"lastmodifieddate": "LastModifiedDate"} if dated else {})}
    lacking = [shown for name, shown in required.items() if name not in available]
    if lacking:
        raise UsageError(
            f"Expected the S3 Inventory at {manifest.place} to hold {', '.join(required.values())}, but it lacks "
            f"{', '.join(lacking)}. Add the optional fields Size, ETag and LastModifiedDate to its configuration."
        )
    wanted = (*required, "lastmodifieddate", "islatest", "isdeletemarker")
    return {name: available[name] for name in wanted if name in available}


def _csv_batches(manifest: _Manifest, dated: bool, data: bytes) -> Iterator[pa.RecordBatch]:
    columns = _columns({name: name for name in manifest.columns}, manifest, dated)
    source: Any = pa.BufferReader(data)
    if data[:2] == b"\x1f\x8b":
        source = pa.CompressedInputStream(source, "gzip")
    reader = pacsv.open_csv(
        source,
        read_options=pacsv.ReadOptions(column_names=list(manifest.columns), block_size=4 << 20),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in manifest.columns},
            include_columns=list(columns),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )
    for batch in reader:
        rows = _current(batch)
        keys = [_decoded(key) for key in rows["key"].to_pylist()]
        yield rows.set_column(rows.schema.get_field_index("key"), "key", pa.array(keys, pa.string()))


def _decoded(key: str) -> str:
    """A key of a CSV inventory is URL-encoded, with `+` for a space."""
    return unquote_plus(key, errors="strict") if "%" in key or "+" in key else key


def _parquet_batches(manifest: _Manifest, dated: bool, data: bytes) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(pa.BufferReader(data))
    columns = _columns({_plain(name): name for name in file.schema_arrow.names}, manifest, dated)
    for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns.values())):
        yield _current(batch.rename_columns([_plain(name) for name in batch.schema.names]))


def _current(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Without delete markers and versions that are not the latest; empty flags mean a bucket without versions."""
    for name, dropped in (("isdeletemarker", "true"), ("islatest", "false")):
        if name in rows.schema.names:
            flags = pc.utf8_lower(rows[name].cast(pa.string()))
            rows = rows.filter(pc.fill_null(pc.not_equal(flags, dropped), True))
    return rows


def _objects(rows: pa.RecordBatch, manifest: _Manifest) -> pa.RecordBatch:
    rows = rows.filter(pc.invert(pc.ends_with(rows["key"].cast(pa.string()), "/")))
    if rows["key"].null_count or rows["size"].null_count or rows["etag"].null_count:
        raise UsageError(f"Expected a key, a size and an ETag for every object in {manifest.place}, but one lacks one.")
    count = rows.num_rows
    if "lastmodifieddate" in rows.schema.names:
        mtimes = rows["lastmodifieddate"].cast(LISTING.field("mtime").type)
    else:
        mtimes = pa.nulls(count, LISTING.field("mtime").type)
    columns = [
        pa.nulls(count, pa.string()),
        pc.binary_join_element_wise(f"s3://{manifest.bucket}/", rows["key"].cast(pa.string()), ""),
        rows["size"].cast(pa.int64()),
        pc.utf8_trim(rows["etag"].cast(pa.string()), '"'),
        mtimes,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)
