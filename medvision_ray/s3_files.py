"""S3 as a pyarrow filesystem over boto3, so that what pyarrow and Ray read and write has this package's retries.

pyarrow's own S3 client could not be used: a 503 to a read of a few bytes (a Parquet footer) fails there without a
retry, because the error document does not fit the buffer of the bytes (pyarrow 26: "Failed to flush response
stream"), and its retry strategy is lost on the way to a Ray worker.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from medvision_ray.errors import StorageError
from medvision_ray.retry import retrying
from medvision_ray.s3 import (
    bucket_key,
    copy_s3,
    delete_below_s3,
    delete_s3,
    exists_s3,
    list_pages,
    put_s3,
    read_range_s3,
    stat_s3,
)

_TAIL_BYTES = 1 << 20  # asked for at first: the whole of a small object, or the footer of a large Parquet file


class S3Files(pafs.FileSystemHandler):  # type: ignore[misc]
    """BUCKET/KEY paths; an object is written whole when its stream is closed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Files)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(type(self))

    def get_type_name(self) -> str:
        """Name for people."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """As it is: `..` and `//` are ordinary in a key."""
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """One answer a path; a prefix with objects below it is a directory."""
        return [_info(path) for path in paths]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """What lies below a prefix."""
        base = selector.base_dir.rstrip("/")
        bucket, key = bucket_key(_uri(base))
        narrower = {} if selector.recursive else {"Delimiter": "/"}
        files: list[pafs.FileInfo] = []
        folders: set[str] = set()
        for page in list_pages(bucket, f"{key}/" if key else "", **narrower):
            for item in page.get("Contents", ()):
                path = f"{bucket}/{item['Key']}"
                if not path.endswith("/"):
                    files.append(_file(path, item["Size"], item["LastModified"]))
                folders.update(_folders(path, base))
            folders.update(f"{bucket}/{item['Prefix']}".rstrip("/") for item in page.get("CommonPrefixes", ()))
        if not files and not folders and not selector.allow_not_found and not exists_s3(_uri(base)):
            raise FileNotFoundError(f"Expected objects below {_uri(base)}, but there are none.")
        return files + [pafs.FileInfo(path, pafs.FileType.Directory) for path in sorted(folders)]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a prefix comes with its first object."""

    def delete_dir(self, path: str) -> None:
        """Delete everything below a prefix."""
        delete_below_s3(_uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete everything below a prefix."""
        delete_below_s3(_uri(path))

    def delete_root_dir_contents(self) -> None:
        """Refused: nobody means to empty every bucket."""
        raise NotImplementedError("Expected a prefix to delete below, but got a whole store.")

    def delete_file(self, path: str) -> None:
        """Delete one object."""
        retrying(lambda: delete_s3(_uri(path)), _uri(path))

    def move(self, src: str, dest: str) -> None:
        """Copy, then delete."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy one object inside the store."""
        retrying(lambda: copy_s3(_uri(src), _uri(dest)), _uri(dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Read one object."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Read one object; a large one by ranges, all of the version that it had at first."""
        uri = _uri(path)
        try:
            tail, size, etag = retrying(lambda: read_range_s3(uri, f"-{_TAIL_BYTES}", None), uri)
        except StorageError as error:
            if error.code == "not_found":
                raise FileNotFoundError(f"Expected an object at {uri}, but there is none.") from None
            raise
        if len(tail) == size:
            return pa.BufferReader(tail)
        return pa.PythonFile(_Ranges(uri, size, etag, tail), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Write one object."""
        return pa.PythonFile(_Upload(_uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Refused: S3 appends nothing."""
        raise NotImplementedError("Expected a write of a whole object: S3 cannot append.")


def _uri(path: str) -> str:
    return f"s3://{path.rstrip('/')}"


def _folders(path: str, base: str) -> set[str]:
    """Every prefix of a path below the base."""
    parts = path[len(base) + 1 :].split("/")
    return {"/".join([base, *parts[:depth]]) for depth in range(1, len(parts))}


def _file(path: str, size: int, modified: Any) -> pafs.FileInfo:
    return pafs.FileInfo(path, pafs.FileType.File, size=size, mtime=modified)


def _info(path: str) -> pafs.FileInfo:
    uri = _uri(path)
    if bucket_key(uri)[1]:
        try:
            size, _, modified = retrying(lambda: stat_s3(uri), uri)
        except StorageError as error:
            if error.code != "not_found":
                raise
        else:
            return _file(path, size, modified)
    kind = pafs.FileType.Directory if exists_s3(f"{uri}/") else pafs.FileType.NotFound
    return pafs.FileInfo(path, kind)


class _Upload:
    """Holds what is written and puts it when closed; one that is dropped unclosed puts nothing."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._held = io.BytesIO()
        self.closed = False

    def write(self, data: Any) -> int:
        return self._held.write(data)

    def tell(self) -> int:
        return self._held.tell()

    def flush(self) -> None:
        """Nothing: an object appears whole."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            retrying(partial(put_s3, self._uri, self._held.getvalue()), self._uri)


class _Ranges(io.RawIOBase):
    """A large object, read by ranges of one version."""

    def __init__(self, uri: str, size: int, etag: str, tail: bytes) -> None:
        self._uri = uri
        self._size = size
        self._etag = etag
        self._tail = tail
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._place + size)
        if end <= self._place:
            return b""
        start, tail_start = self._place, self._size - len(self._tail)
        self._place = end
        if start >= tail_start:
            return self._tail[start - tail_start : end - tail_start]
        return retrying(lambda: read_range_s3(self._uri, f"{start}-{end - 1}", self._etag), self._uri)[0]
