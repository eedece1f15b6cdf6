"""What lies below a folder or prefix, with size and version; the same calls for local folders, s3:// and gs://."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow.fs as pafs

from medvision_ray.errors import StorageError
from medvision_ray.s3 import bucket_key, list_s3, s3_client, s3_error
from medvision_ray.storage import _retry, absolute, filesystem, local_etag, scheme_of


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object.

    Attributes:
        uri: absolute address; for local files a plain absolute path.
        path: relative to the listed folder or prefix, with forward slashes.
        size: bytes.
        etag: version of the content; for local files size and modification time in ns.
    """

    uri: str
    path: str
    size: int
    etag: str


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, in path order within a folder.

    Links to folders are followed; each real folder is listed once. Folder markers are not objects.

    Raises:
        StorageError: the place does not exist or cannot be listed.
    """
    place = absolute(uri)
    scheme = scheme_of(place)
    if scheme == "file":
        yield from _list_local(place)
    elif scheme == "s3":
        yield from _list_s3(place)
    else:
        yield from _list_filesystem(place)


def _list_local(root: str) -> Iterator[ObjectInfo]:
    if not os.path.isdir(root):
        raise StorageError(f"Expected a folder at {root}, but there is none.", code="not_found")
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for path in _retry(partial(_entries, folder), folder):
            try:
                info = os.stat(path)
            except OSError:
                continue  # a link to nothing or to itself, or deleted since: no object
            if stat.S_ISDIR(info.st_mode):
                folders.append(path)
            elif stat.S_ISREG(info.st_mode):
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                yield ObjectInfo(path, relative, info.st_size, local_etag(info))
        pending.extend(reversed(folders))


def _entries(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def _list_s3(uri: str) -> Iterator[ObjectInfo]:
    bucket, prefix = bucket_key(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    found = False
    for item in list_s3(bucket, prefix):
        found = True
        key = item["Key"]
        if not key.endswith("/"):
            yield ObjectInfo(f"s3://{bucket}/{key}", key[len(prefix) :], item["Size"], item["ETag"].strip('"'))
    if not found and prefix:
        raise StorageError(f"Expected objects below {uri}, but there are none.", code="not_found")


def _list_filesystem(uri: str) -> Iterator[ObjectInfo]:
    fs, path = filesystem(uri)
    scheme = scheme_of(uri)
    infos = _retry(lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)), uri)
    for info in sorted(infos, key=lambda item: item.path):
        if info.type == pafs.FileType.File:
            relative = info.path[len(path) :].lstrip("/")
            yield ObjectInfo(f"{scheme}://{info.path}", relative, info.size, f"{info.size:x}-{info.mtime_ns or 0:x}")


def stat_object(uri: str) -> ObjectInfo:
    """Size and version of one object; `path` is its last name.

    Raises:
        StorageError: code `not_found` or `access_denied`, or it cannot be asked.
    """
    place = absolute(uri)
    name = place.rsplit("/", 1)[-1]
    if scheme_of(place) == "file":
        info = _retry(lambda: os.stat(place), place)
        return ObjectInfo(place, name, info.st_size, local_etag(info))
    if scheme_of(place) == "s3":

        def head() -> ObjectInfo:
            bucket, key = bucket_key(place)
            try:
                answer = s3_client().head_object(Bucket=bucket, Key=key)
            except Exception as error:
                raise s3_error(error, place) from None
            return ObjectInfo(place, name, answer["ContentLength"], answer["ETag"].strip('"'))

        return _retry(head, place)
    fs, path = filesystem(place)
    info = _retry(lambda: fs.get_file_info(path), place)
    if info.type == pafs.FileType.NotFound:
        raise StorageError(f"Expected an object at {place}, but there is none.", code="not_found")
    return ObjectInfo(place, name, info.size, f"{info.size:x}-{info.mtime_ns or 0:x}")
