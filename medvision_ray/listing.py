"""What lies below a folder or prefix, with size and version; the same calls for local folders, s3:// and gs://."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from medvision_ray.errors import StorageError
from medvision_ray.retry import retrying
from medvision_ray.s3 import bucket_key, s3_client, s3_error
from medvision_ray.s3_listing import list_entries
from medvision_ray.storage import absolute, filesystem, join, local_etag, scheme_of

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

LISTING = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of a listing; each is explained at `ObjectInfo`."""
THREADS = 16
_NAMES_PER_TASK = 8192
_FOLDERS_PER_TASK = 64


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object.

    Attributes:
        uri: absolute address; for local files a plain absolute path (file:// where the name is not UTF-8).
        path: relative to the listed folder or prefix, with forward slashes.
        size: bytes.
        etag: version of the content; for local files size and modification time in ns.
        mtime_us: modification time in microseconds since 1970 UTC; None where the store tells none.
    """

    uri: str
    path: str
    size: int
    etag: str
    mtime_us: int | None = None


def list_objects(uri: str, threads: int = THREADS) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, in path order.

    Links to folders are followed; each real folder is listed once. Folder markers are not objects.

    Raises:
        StorageError: the place does not exist or cannot be listed.
    """
    listed = pa.Table.from_batches(list_batches(uri, threads=threads), LISTING)
    listed = listed.take(pc.sort_indices(listed["path"]))
    for batch in listed.set_column(4, "mtime", listed["mtime"].cast(pa.int64())).to_batches():
        for path, address, size, etag, mtime in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield ObjectInfo(address, path, size, etag, mtime)


def list_batches(uri: str, below: Sequence[str] = (), threads: int = THREADS) -> Iterator[pa.RecordBatch]:
    """The same as batches of `LISTING`, in no order, listed by several threads at once.

    Args:
        below: list only below these paths under `uri`; none lies below another.

    Raises:
        StorageError: the place or a path below it does not exist or cannot be listed.
    """
    place = absolute(uri)
    scheme = scheme_of(place)
    if scheme == "file":
        yield from _list_local(place, below, threads)
    elif scheme == "s3":
        for path in below or ("",):
            yield from _list_s3(place, path, threads)
    else:
        for path in below or ("",):
            yield from _list_filesystem(place, path)


# Local folders: level by level, so that which name of a linked folder counts does not depend on the threads.


@dataclass(frozen=True, order=True)
class _Folder:
    path: str
    device: int
    inode: int


@dataclass
class _Found:
    """What a stretch of a folder's names is; `rest` are the stretches that other threads look at."""

    files: pa.RecordBatch
    folders: list[_Folder]
    rest: list[Future[_Found]]


def _list_local(root: str, below: Sequence[str], threads: int) -> Iterator[pa.RecordBatch]:
    level = [_start(join(root, path) if path else root) for path in below or ("",)]
    seen: set[tuple[int, int]] = set()
    pool = ThreadPoolExecutor(threads)
    try:
        while level:
            fresh = []
            for folder in sorted(level):
                if (folder.device, folder.inode) not in seen:
                    seen.add((folder.device, folder.inode))
                    fresh.append(folder.path)
            level = []
            size = max(1, min(_FOLDERS_PER_TASK, len(fresh) // (4 * threads)))
            tasks = (fresh[i : i + size] for i in range(0, len(fresh), size))
            for found in in_order(pool, partial(_look, pool, root), tasks, 4 * threads):
                for part in found:
                    for piece in (part, *(item.result() for item in part.rest)):
                        level += piece.folders
                        yield piece.files
    finally:
        pool.shutdown(cancel_futures=True)


def _start(folder: str) -> _Folder:
    if not os.path.isdir(folder):
        raise StorageError(f"Expected a folder at {folder}, but there is none.", code="not_found")
    info = os.stat(folder)
    return _Folder(folder, info.st_dev, info.st_ino)


def in_order(
    pool: ThreadPoolExecutor, call: Callable[[ItemT], ResultT], items: Iterable[ItemT], ahead: int
) -> Iterator[ResultT]:
    """`pool.map` that is at most `ahead` items ahead of its reader."""
    waiting: deque[Future[ResultT]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _look(pool: ThreadPoolExecutor, root: str, folders: list[str]) -> list[_Found]:
    found = []
    for folder in folders:
        names = sorted(retrying(partial(os.listdir, folder), folder))
        cuts = range(_NAMES_PER_TASK, len(names), _NAMES_PER_TASK)
        rest = [pool.submit(_stat_names, root, folder, names[cut : cut + _NAMES_PER_TASK]) for cut in cuts]
        first = _stat_names(root, folder, names[:_NAMES_PER_TASK])
        found.append(_Found(first.files, first.folders, rest))
    return found


def _stat_names(root: str, folder: str, names: list[str]) -> _Found:
    base = folder.rstrip("/") + "/"
    files: list[str] = []
    sizes: list[int] = []
    etags: list[str] = []
    mtimes: list[int] = []
    folders: list[_Folder] = []
    for name in names:
        path = base + name
        info = _stat(path)
        if info is None:
            continue
        if stat.S_ISREG(info.st_mode):
            files.append(path)
            sizes.append(info.st_size)
            etags.append(local_etag(info))
            mtimes.append(info.st_mtime_ns // 1000)
        elif stat.S_ISDIR(info.st_mode):
            folders.append(_Folder(path, info.st_dev, info.st_ino))
    start = len(root.rstrip("/")) + 1
    uris, paths = spelled(files), spelled([path[start:] for path in files])
    columns = [
        paths,
        uris,
        pa.array(sizes, pa.int64()),
        pa.array(etags, pa.string()),
        pa.array(mtimes, LISTING[4].type),
    ]
    return _Found(pa.RecordBatch.from_arrays(columns, schema=LISTING), folders, [])


def _stat(path: str) -> os.stat_result | None:
    """None for a link to nothing or to itself, and for what was deleted since."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
    try:
        return retrying(partial(os.stat, path), path)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise


def spelled(paths: list[str]) -> pa.Array:
    """Paths as text; one that is not UTF-8 percent-encoded, if absolute as file://, which `absolute` reads back."""
    try:
        return pa.array(paths, pa.string())
    except UnicodeEncodeError:
        return pa.array([path if _is_utf8(path) else _percent(path) for path in paths], pa.string())


def _percent(path: str) -> str:
    return ("file://" if path.startswith("/") else "") + quote(os.fsencode(path))


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


# Object stores


def _list_s3(uri: str, below: str, threads: int) -> Iterator[pa.RecordBatch]:
    bucket, root = bucket_key(uri)
    root = root.rstrip("/") + "/" if root else ""
    prefix = root + below.strip("/") + "/" if below else root
    found = False
    for entries in list_entries(bucket, prefix, threads):
        found = found or entries.num_rows > 0
        objects = entries.filter(pc.invert(pc.ends_with(entries["key"], "/")))
        paths = pc.utf8_slice_codeunits(objects["key"], len(root))
        uris = pc.binary_join_element_wise(f"s3://{bucket}/", objects["key"], "")
        columns = [paths, uris, objects["size"], objects["etag"], objects["mtime"]]
        yield pa.RecordBatch.from_arrays(columns, schema=LISTING)
    if not found and prefix:
        raise StorageError(f"Expected objects below s3://{bucket}/{prefix}, but there are none.", code="not_found")


def _list_filesystem(uri: str, below: str) -> Iterator[pa.RecordBatch]:
    fs, root = filesystem(uri)
    _, path = filesystem(join(uri, below) if below else uri)
    scheme = scheme_of(uri)
    infos = retrying(lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)), uri)
    rows = [
        {
            "path": info.path[len(root) :].lstrip("/"),
            "uri": f"{scheme}://{info.path}",
            "size": info.size,
            "etag": f"{info.size:x}-{info.mtime_ns or 0:x}",
            "mtime": None if info.mtime_ns is None else info.mtime_ns // 1000,
        }
        for info in infos
        if info.type == pafs.FileType.File
    ]
    yield pa.RecordBatch.from_pylist(rows, LISTING)


def stat_object(uri: str) -> ObjectInfo:
    """Size and version of one object; `path` is its last name.

    Raises:
        StorageError: code `not_found` or `access_denied`, or it cannot be asked.
    """
    place = absolute(uri)
    name = place.rsplit("/", 1)[-1]
    if scheme_of(place) == "file":
        status = retrying(lambda: os.stat(place), place)
        return ObjectInfo(place, name, status.st_size, local_etag(status), status.st_mtime_ns // 1000)
    if scheme_of(place) == "s3":

        def head() -> ObjectInfo:
            bucket, key = bucket_key(place)
            try:
                answer = s3_client().head_object(Bucket=bucket, Key=key)
            except Exception as error:
                raise s3_error(error, place) from None
            modified = int(answer["LastModified"].timestamp() * 1e6)
            return ObjectInfo(place, name, answer["ContentLength"], answer["ETag"].strip('"'), modified)

        return retrying(head, place)
    fs, path = filesystem(place)
    info = retrying(lambda: fs.get_file_info(path), place)
    if info.type == pafs.FileType.NotFound:
        raise StorageError(f"Expected an object at {place}, but there is none.", code="not_found")
    modified = None if info.mtime_ns is None else info.mtime_ns // 1000
    return ObjectInfo(place, name, info.size, f"{info.size:x}-{info.mtime_ns or 0:x}", modified)
