"""Listing S3 in parallel: the key space is cut into ranges that threads list page by page.

Each page is asked for by the last key seen, so that any page can be asked for again, and a range
ends where the next one begins: nothing is listed twice or left out, wherever the cuts lie.
"""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa

from medvision_ray.errors import StorageError
from medvision_ray.retry import retrying
from medvision_ray.s3 import _asking as asking
from medvision_ray.s3 import s3_client

ENTRIES = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.timestamp("us", "UTC")),
    ]
)
_RANGES_PER_THREAD = 16
_ENOUGH_CUTS_PER_THREAD = 4
_LEVELS = 4
_PAGES_AT_THE_TOP = 100
_FIELDS = ("Key", "Size", "ETag", "LastModified")
_raw = threading.local()


@dataclass(frozen=True)
class _Page:
    entries: pa.RecordBatch
    prefixes: list[str]
    token: str | None
    truncated: bool

    @property
    def last_key(self) -> str:
        return str(self.entries["key"][-1].as_py())


def list_entries(bucket: str, prefix: str, threads: int) -> Iterator[pa.RecordBatch]:
    """Every entry below a prefix as batches of `ENTRIES`, in key order.

    Raises:
        StorageError: a page could not be had after retries; what came before it is not the whole.
    """
    first = _page(bucket, prefix)
    yield first.entries
    if not first.truncated:
        return
    stop = threading.Event()
    pool = ThreadPoolExecutor(threads)
    try:
        cuts = [cut for cut in _cuts(bucket, prefix, pool, threads) if cut > first.last_key]
        starts, ends = [first.last_key, *cuts], [*cuts, None]
        listed = [
            pool.submit(_list_range, bucket, prefix, *ends_of, stop) for ends_of in zip(starts, ends, strict=True)
        ]
        while listed:  # taken off one by one, so that what was handed on is freed
            yield from listed.pop(0).result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _list_range(bucket: str, prefix: str, after: str, until: str | None, stop: threading.Event) -> list[pa.RecordBatch]:
    """Entries with after < key <= until; `until` None is the end."""
    found: list[pa.RecordBatch] = []
    while not stop.is_set():
        page = _page(bucket, prefix, after)
        if until is not None and page.entries.num_rows and page.last_key > until:
            keys = page.entries["key"].to_pylist()
            found.append(page.entries.slice(0, sum(key <= until for key in keys)))
            break
        found.append(page.entries)
        if not page.truncated:
            break
        after = page.last_key
    return found


def _cuts(bucket: str, prefix: str, pool: ThreadPoolExecutor, threads: int) -> list[str]:
    """Sub-prefixes that cut the key space into parts of similar size; only a hint, the ranges cover all of it."""
    cuts: set[str] = set()
    level, pages = [prefix], _PAGES_AT_THE_TOP
    for _ in range(_LEVELS):
        children = [child for found in pool.map(partial(_sub_prefixes, bucket, pages), level) for child in found]
        cuts.update(children)
        if not children or len(cuts) >= _ENOUGH_CUTS_PER_THREAD * threads:
            break
        level, pages = _spread(sorted(children), _ENOUGH_CUTS_PER_THREAD * threads), 1
    return _spread(sorted(cuts), _RANGES_PER_THREAD * threads)


def _sub_prefixes(bucket: str, pages: int, prefix: str) -> list[str]:
    found: list[str] = []
    token: str | None = None
    for _ in range(pages):
        page = _page(bucket, prefix, delimiter="/", token=token)
        found += page.prefixes
        token = page.token
        if not page.prefixes or token is None:
            break
    return found


def _spread(items: Sequence[str], most: int) -> list[str]:
    step = max(1, -(-len(items) // most))
    return list(items[::step])


def _page(bucket: str, prefix: str, after: str = "", delimiter: str = "", token: str | None = None) -> _Page:
    """One page, retried; its keys are checked to ascend from `after`, on which the ranges rely."""
    question = {"StartAfter": after} if after else {}
    question |= {"ContinuationToken": token} if token else {}
    question |= {"Delimiter": delimiter} if delimiter else {}
    place = f"s3://{bucket}/{prefix}"
    page = _read_page(retrying(partial(_ask, bucket, prefix, question), place), place)
    keys = page.entries["key"].to_pylist()
    if any(a >= b for a, b in zip([after, *keys], keys, strict=False)) or (page.truncated and not (keys or delimiter)):
        raise StorageError(f"Expected keys in ascending order below {place}, as S3 lists them, but the store does not.")
    return page


def _ask(bucket: str, prefix: str, question: dict[str, str]) -> ET.Element:
    place = f"s3://{bucket}/{prefix}"
    try:
        with asking(place):
            client = s3_client()
            client.meta.events.register("before-parse.s3.ListObjectsV2", _keep_raw, unique_id="medvision-listing")
            _raw.wanted, _raw.body = True, b""
            client.list_objects_v2(Bucket=bucket, Prefix=prefix, EncodingType="url", **question)
        root = ET.fromstring(_raw.body)  # noqa: S314 - the store's own answer, as botocore reads it
    except ET.ParseError:
        raise StorageError(f"{place} was answered with no XML.", transient=True) from None
    finally:
        _raw.wanted, _raw.body = False, b""
    if not root.tag.endswith("ListBucketResult"):  # an error that a store sends after it has begun to answer 200
        raise StorageError(f"{place} could not be listed.", transient=True)
    return root


def _keep_raw(response_dict: dict[str, Any], **_: object) -> None:
    """Take a page's XML before botocore parses it: which takes several times as long as here, one thread at a time (GIL)."""
    if getattr(_raw, "wanted", False) and response_dict["status_code"] == 200:
        _raw.body = response_dict["body"]
        response_dict["body"] = b"<ListBucketResult/>"


def _read_page(root: ET.Element, place: str) -> _Page:
    space = root.tag.removesuffix("ListBucketResult")  # XML namespace; not every store has S3's
    contents = root.findall(f"{space}Contents")
    rows = {name: [item.findtext(f"{space}{name}") for item in contents] for name in _FIELDS}
    prefixes = [item.findtext(f"{space}Prefix", "") for item in root.iter(f"{space}CommonPrefixes")]
    facts = {name: root.findtext(f"{space}{name}") for name in ("EncodingType", "IsTruncated", "NextContinuationToken")}
    if None in rows["Key"] or None in rows["Size"] or None in rows["ETag"]:
        raise StorageError(f"Expected key, size and ETag of every object below {place}, but the store left one out.")
    decode = _decoded if facts["EncodingType"] == "url" else str
    entries = pa.RecordBatch.from_arrays(
        [
            pa.array([decode(str(key)) for key in rows["Key"]], pa.string()),
            pa.array([int(str(size)) for size in rows["Size"]], pa.int64()),
            pa.array([str(etag).strip('"') for etag in rows["ETag"]], pa.string()),
            pa.array(rows["LastModified"], pa.string()).cast(ENTRIES.field("mtime").type),
        ],
        schema=ENTRIES,
    )
    prefixes = [decode(text) for text in prefixes]
    return _Page(entries, prefixes, facts["NextContinuationToken"], facts["IsTruncated"] == "true")


def _decoded(text: str) -> str:
    return unquote_plus(text) if "%" in text or "+" in text else text
