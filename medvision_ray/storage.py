"""URIs to bytes: the same calls for a local folder, file://, s3:// and gs://.

S3 is spoken to with boto3, for its etags, its conditional put and its exact errors, and gs:// through pyarrow.
`filesystem` and `table_options` are for what must be read and written by pyarrow, Ray and deltalake.
"""

from __future__ import annotations

import os
import random
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pyarrow.fs as pafs

from medvision_ray.errors import StorageError, UsageError
from medvision_ray.retry import retrying
from medvision_ray.s3 import (
    _s3_client,  # noqa: F401 - a test that moves the endpoint clears its cache here
    delete_below_s3,
    delete_s3,
    exists_s3,
    meaning_of,
    put_s3,
    read_range_s3,
    read_s3,
    s3_client,  # noqa: F401 - tests make their buckets with it
)
from medvision_ray.s3_files import S3Files

_SCHEMES = ("file", "s3", "gs")


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
    if scheme_of(uri) != "file":
        return uri.rstrip("/")
    if "://" not in uri:
        return os.path.abspath(os.path.expanduser(uri))
    host, slash, path = uri.split("://", 1)[1].partition("/")
    if host not in ("", "localhost"):
        raise UsageError(f"Expected file:///PATH with an absolute path, but got file://{host}{slash}...")
    return os.path.abspath(unquote("/" + path, errors="surrogateescape"))  # as os spells names that are no UTF-8


def join(uri: str, *parts: str) -> str:
    """Append path parts to a folder or prefix."""
    return "/".join([absolute(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path in it. AWS_ENDPOINT_URL and the usual AWS variables are honoured."""
    place = absolute(uri)
    scheme = scheme_of(place)
    return _filesystem(scheme), place if scheme == "file" else place.split("://", 1)[1]


@lru_cache(maxsize=3)
def _filesystem(scheme: str) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs":
        return pafs.GcsFileSystem()
    return pafs.PyFileSystem(S3Files())


def local_etag(info: os.stat_result) -> str:
    """Version of a local file: size and modification time in ns."""
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"


def read_bytes(uri: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
    """Read one object whole, with retries for what may pass.

    Args:
        max_bytes: refuse larger objects before reading them.
        etag: refuse another version than the listed one.

    Raises:
        StorageError: code `not_found`, `access_denied`, `too_large`, `changed_while_reading`, `credentials`
            or `read_error`.
    """
    place = absolute(uri)
    if scheme_of(place) == "file":
        return retrying(lambda: _read_local(place, max_bytes, etag), place)
    if scheme_of(place) == "s3":
        return retrying(lambda: read_s3(place, max_bytes, etag), place)
    fs, path = filesystem(place)

    def read() -> bytes:
        with fs.open_input_file(path) as stream:
            if max_bytes is not None and stream.size() > max_bytes:
                raise StorageError("The object is over the size limit.", code="too_large")
            data: bytes = stream.read()
            return data

    return retrying(read, place)


def read_start(uri: str, count: int, *, etag: str | None = None) -> bytes:
    """The first `count` bytes of one object, fewer where it is shorter.

    Args:
        etag: refuse another version than the listed one, where the store can tell.

    Raises:
        StorageError: as `read_bytes`.
    """
    place = absolute(uri)
    if scheme_of(place) == "s3":
        return retrying(lambda: read_range_s3(place, f"0-{count - 1}", etag)[0], place)

    def read() -> bytes:
        fs, path = filesystem(place)
        with fs.open_input_file(path) as stream:
            data: bytes = stream.read(count)
            return data

    if scheme_of(place) == "file":
        return retrying(lambda: _read_local(place, None, etag, count), place)
    return retrying(read, place)


def _read_local(path: str, max_bytes: int | None, etag: str | None, count: int = -1) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a named pipe would wait for a writer
        raise StorageError("The object is not a regular file.", code="read_error")
    with open(path, "rb") as stream:
        info = os.fstat(stream.fileno())
        if max_bytes is not None and info.st_size > max_bytes:
            raise StorageError("The object is over the size limit.", code="too_large")
        data = stream.read(count)
        if etag is not None and {local_etag(info), local_etag(os.fstat(stream.fileno()))} != {etag}:
            raise StorageError("The object changed since it was listed.", code="changed_while_reading")
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write one object whole; a reader sees the old content or the new, never a part."""
    place = absolute(uri)
    scheme = scheme_of(place)
    if scheme == "file":
        retrying(lambda: _write_local(place, data, os.replace), place)
    elif scheme == "s3":
        retrying(lambda: put_s3(place, data), place)
    else:
        fs, path = filesystem(place)

        def write() -> None:
            with fs.open_output_stream(path) as stream:
                stream.write(data)

        retrying(write, place)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write an object only if there is none (conditional put); False when somebody was first.

    Where the answer to a put was lost, the object that is there then is ours if it holds `data`: two
    writers that must know which of them was first give different data.
    """
    place = absolute(uri)
    scheme = scheme_of(place)
    if scheme == "file":
        return retrying(lambda: _create_local(place, data), place)
    if scheme == "s3":
        return _create_s3(place, data)
    raise UsageError("Expected `output` on a local path or s3://, but gs:// has no conditional put here yet.")


def _write_local(path: str, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    try:
        temporary.write_bytes(data)
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _create_local(path: str, data: bytes) -> bool:
    if os.path.lexists(path):
        return False
    try:
        _write_local(path, data, os.link)
    except FileExistsError:
        return False
    return True


def _create_s3(uri: str, data: bytes) -> bool:
    unanswered = False

    def put() -> bool:
        nonlocal unanswered
        try:
            put_s3(uri, data, IfNoneMatch="*")
        except StorageError as error:
            if error.code == "changed_while_reading":  # 412: there is an object
                return False
            unanswered = unanswered or error.transient
            raise
        return True

    return retrying(put, uri) or (unanswered and read_bytes(uri) == data)


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{random.randrange(1 << 32):08x}.tmp")


def exists(uri: str) -> bool:
    """Whether there is an object or a folder at this address."""
    if scheme_of(uri) == "s3":
        return exists_s3(absolute(uri))
    fs, path = filesystem(uri)
    return bool(retrying(lambda: fs.get_file_info(path).type != pafs.FileType.NotFound, uri))


def delete_tree(uri: str) -> None:
    """Delete everything below a folder or prefix; nothing there is fine."""
    fs, path = filesystem(uri)
    if scheme_of(uri) == "s3":
        _delete(lambda: delete_below_s3(absolute(uri)))
    elif exists(uri):
        _delete(lambda: retrying(lambda: fs.delete_dir(path), uri))


def delete_object(uri: str) -> None:
    """Delete one object; nothing there is fine."""
    fs, path = filesystem(uri)
    delete = (lambda: delete_s3(absolute(uri))) if scheme_of(uri) == "s3" else (lambda: fs.delete_file(path))
    _delete(lambda: retrying(delete, uri))


def _delete(call: Callable[[], None]) -> None:
    try:
        call()
    except StorageError as error:
        if error.code != "not_found":
            raise


def table_options(uri: str) -> dict[str, str]:
    """Options with which `deltalake` opens the same place."""
    if scheme_of(uri) != "s3":
        return {}
    # Its own layer repeats single requests of a long commit (10 times, 15 s apart at most); what breaks in a body or
    # loses the answer to a conditional put it does not repeat: `table_error` says whether the whole call may be.
    options = {"conditional_put": "etag", "retry_timeout": "90s", "connect_timeout": "5s"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
        options["AWS_ALLOW_HTTP"] = str(endpoint.startswith("http://")).lower()
    return options


def table_error(error: Exception, uri: str) -> StorageError:
    """What an error of deltalake at this place means; its text, which quotes the store's answer, is dropped."""
    text = str(error)
    answer = re.search(r"<Code>(\w+)</Code>", text)
    if answer:
        return meaning_of(answer[1], 0, uri)
    if "lacked the necessary privileges" in text:
        return StorageError(f"The store refused access to {uri}; check its policy.", code="access_denied")
    remote = scheme_of(uri) != "file" and (isinstance(error, OSError) or "HTTP error" in text)
    return StorageError(f"The table at {uri} could not be read or written.", transient=remote)


def table_uri(uri: str) -> str:
    """The address as `deltalake` wants it."""
    place = absolute(uri)
    if scheme_of(place) == "file":
        return "file://" + quote(place)
    scheme, rest = place.split("://", 1)
    return f"{scheme}://{quote(rest)}"


def make_folder(uri: str) -> None:
    """Make a local folder and its parents; object stores need none."""
    if scheme_of(uri) == "file":
        Path(absolute(uri)).mkdir(parents=True, exist_ok=True)
