"""URIs to bytes: the same calls for a local folder, file://, s3:// and gs://.

pyarrow's filesystems do the reading and writing. boto3 is used where S3 offers more than a
filesystem does: listing with etags, reading one version by etag, and the conditional put.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import pyarrow.fs as pafs

from medvision_ray.errors import StorageError, UsageError

T = TypeVar("T")

_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
_SCHEMES = ("file", "s3", "gs")


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


def scheme_of(uri: str) -> str:
    """`file`, `s3` or `gs`.

    Raises:
        UsageError: another scheme.
    """
    if "://" not in uri:
        return "file"
    scheme = urlsplit(uri).scheme.lower()
    if scheme not in _SCHEMES:
        raise UsageError(
            f"Expected a local path or a URI of {', '.join(s + '://' for s in _SCHEMES)}, but got {scheme}://."
        )
    return scheme


def absolute(uri: str) -> str:
    """One spelling per place: local paths absolute, no trailing slash, no file://."""
    if scheme_of(uri) == "file":
        path = unquote(urlsplit(uri).path) if "://" in uri else uri
        return os.path.abspath(os.path.expanduser(path))
    return uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a folder or prefix."""
    return "/".join([absolute(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path in it. AWS_ENDPOINT_URL and the usual AWS variables are honoured."""
    place = absolute(uri)
    if scheme_of(place) == "file":
        return _filesystem("file", ""), place
    parts = urlsplit(place)
    return _filesystem(parts.scheme, os.environ.get("AWS_ENDPOINT_URL", "")), parts.netloc + parts.path


@lru_cache(maxsize=16)
def _filesystem(scheme: str, endpoint: str) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs":
        return pafs.GcsFileSystem()
    address = urlsplit(endpoint)
    options: dict[str, Any] = {"endpoint_override": address.netloc, "scheme": address.scheme} if endpoint else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


@lru_cache(maxsize=4)
def _s3_client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(retries={"max_attempts": _ATTEMPTS, "mode": "standard"}, max_pool_connections=32)
    return boto3.client("s3", endpoint_url=endpoint or None, config=config)


def s3_client() -> Any:
    """A boto3 S3 client for the current endpoint, one a process."""
    return _s3_client(os.environ.get("AWS_ENDPOINT_URL", ""))


def _bucket_key(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    return parts.netloc, parts.path.lstrip("/")


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
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders = []
        for entry in sorted(os.scandir(folder), key=lambda item: item.name):
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.is_file():
                info = entry.stat()
                relative = os.path.relpath(entry.path, root).replace(os.sep, "/")
                yield ObjectInfo(entry.path, relative, info.st_size, local_etag(info))
        pending.extend(reversed(folders))


def local_etag(info: os.stat_result) -> str:
    """Version of a local file: size and modification time in ns."""
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"


def _list_s3(uri: str) -> Iterator[ObjectInfo]:
    bucket, prefix = _bucket_key(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    paginator = s3_client().get_paginator("list_objects_v2")
    found = False
    try:
        for page in paginator.paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                found = True
                key = item["Key"]
                if not key.endswith("/"):
                    yield ObjectInfo(f"s3://{bucket}/{key}", key[len(prefix) :], item["Size"], item["ETag"].strip('"'))
    except Exception as error:
        raise _s3_error(error, uri) from None
    if not found and prefix == "":
        return


def _list_filesystem(uri: str) -> Iterator[ObjectInfo]:
    fs, path = filesystem(uri)
    scheme = scheme_of(uri)
    infos = _retry(lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)), uri)
    for info in sorted(infos, key=lambda item: item.path):
        if info.type == pafs.FileType.File:
            relative = info.path[len(path) :].lstrip("/")
            yield ObjectInfo(f"{scheme}://{info.path}", relative, info.size, f"{info.size:x}-{info.mtime_ns or 0:x}")


def read_bytes(uri: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
    """Read one object whole, with retries for what may pass.

    Args:
        max_bytes: refuse larger objects before reading them.
        etag: refuse another version than the listed one.

    Raises:
        StorageError: code `not_found`, `access_denied`, `too_large`, `changed_while_reading` or
            `read_error`.
    """
    place = absolute(uri)
    if scheme_of(place) == "file":
        return _retry(lambda: _read_local(place, max_bytes, etag), place)
    if scheme_of(place) == "s3":
        return _retry(lambda: _read_s3(place, max_bytes, etag), place)
    fs, path = filesystem(place)

    def read() -> bytes:
        with fs.open_input_file(path) as stream:
            if max_bytes is not None and stream.size() > max_bytes:
                raise StorageError("The object is over the size limit.", code="too_large")
            data: bytes = stream.read()
            return data

    return _retry(read, place)


def _read_local(path: str, max_bytes: int | None, etag: str | None) -> bytes:
    with open(path, "rb") as stream:
        info = os.fstat(stream.fileno())
        if not os.path.isfile(path):
            raise StorageError("The object is not a regular file.", code="read_error")
        if etag is not None and local_etag(info) != etag:
            raise StorageError("The object changed since it was listed.", code="changed_while_reading")
        if max_bytes is not None and info.st_size > max_bytes:
            raise StorageError("The object is over the size limit.", code="too_large")
        return stream.read()


def _read_s3(uri: str, max_bytes: int | None, etag: str | None) -> bytes:
    bucket, key = _bucket_key(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    try:
        answer = s3_client().get_object(Bucket=bucket, Key=key, **condition)
        if max_bytes is not None and answer["ContentLength"] > max_bytes:
            answer["Body"].close()
            raise StorageError("The object is over the size limit.", code="too_large")
        data: bytes = answer["Body"].read()
    except StorageError:
        raise
    except Exception as error:
        raise _s3_error(error, uri) from None
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write one object whole; a reader sees the old content or the new, never a part."""
    place = absolute(uri)
    if scheme_of(place) == "file":
        target = Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(target)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    fs, path = filesystem(place)

    def write() -> None:
        with fs.open_output_stream(path) as stream:
            stream.write(data)

    _retry(write, place)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write an object only if there is none (conditional put); False when somebody was first."""
    place = absolute(uri)
    scheme = scheme_of(place)
    if scheme == "file":
        target = Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(target)
        try:
            temporary.write_bytes(data)
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True
    if scheme == "s3":
        return _create_s3(place, data)
    raise UsageError("Expected `output` on a local path or s3://, but gs:// has no conditional put here yet.")


def _create_s3(uri: str, data: bytes) -> bool:
    bucket, key = _bucket_key(uri)
    try:
        s3_client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except Exception as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            return False
        raise _s3_error(error, uri) from None
    return True


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{random.randrange(1 << 32):08x}.tmp")


def exists(uri: str) -> bool:
    """Whether there is an object or a non-empty folder at this address."""
    fs, path = filesystem(uri)
    return bool(_retry(lambda: fs.get_file_info(path).type != pafs.FileType.NotFound, uri))


def delete_tree(uri: str) -> None:
    """Delete everything below a folder or prefix; nothing there is fine."""
    fs, path = filesystem(uri)
    if exists(uri):
        with contextlib.suppress(FileNotFoundError):
            _retry(lambda: fs.delete_dir(path), uri)


def delete_object(uri: str) -> None:
    """Delete one object; nothing there is fine."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.delete_file(path)


def table_options(uri: str) -> dict[str, str]:
    """Options with which `deltalake` opens the same place."""
    if scheme_of(uri) != "s3":
        return {}
    options = {"conditional_put": "etag"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
        options["AWS_ALLOW_HTTP"] = str(endpoint.startswith("http://")).lower()
    return options


def table_uri(uri: str) -> str:
    """The address as `deltalake` wants it."""
    place = absolute(uri)
    return "file://" + quote(place) if scheme_of(place) == "file" else place


def _retry(call: Callable[[], T], uri: str) -> T:
    pause = _FIRST_PAUSE_SECONDS
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except StorageError as error:
            problem = error
        except FileNotFoundError:
            raise StorageError(f"Expected an object at {uri}, but there is none.", code="not_found") from None
        except PermissionError:
            raise StorageError(f"The store refused access to {uri}.", code="access_denied") from None
        except OSError:
            problem = StorageError(f"{uri} could not be read or written.", transient=True)
        if not problem.transient or attempt == _ATTEMPTS - 1:
            raise problem from None
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _s3_error(error: Exception, uri: str) -> StorageError:
    answer = getattr(error, "response", {})
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("NoSuchKey", "NoSuchBucket", "404"):
        return StorageError(f"Expected an object at {uri}, but there is none.", code="not_found")
    if code in ("PreconditionFailed", "412"):
        return StorageError("The object changed since it was listed.", code="changed_while_reading")
    if status in (401, 403):
        return StorageError(f"The store refused access to {uri}; check credentials and policy.", code="access_denied")
    return StorageError(f"{uri} could not be read or written.", transient=status == 0 or status >= 500 or status == 429)
