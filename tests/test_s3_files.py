"""S3 as a pyarrow filesystem: the same answers as pyarrow's own client, and an object is written whole or not at all."""

from __future__ import annotations

import os
import pickle
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage
from medvision_ray.errors import StorageError

KEYS = ("a", "run/x", "run/sub/y", "run/sub/deep/z", "run2/w", "with space/q?#+")


@pytest.fixture
def files() -> pafs.FileSystem:
    return storage.filesystem("s3://bucket")[0]


@pytest.fixture
def peer(s3: str) -> pafs.FileSystem:
    """pyarrow's own."""
    return pafs.S3FileSystem(endpoint_override=urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc, scheme="http")


@pytest.fixture
def root(s3: str) -> str:
    for number, key in enumerate(KEYS):
        storage.write_bytes(f"{s3}/{key}", bytes(number))
    return s3.removeprefix("s3://")


def facts(infos: list[pafs.FileInfo]) -> dict[str, tuple[str, int | None]]:
    return {info.path: (info.type.name, info.size) for info in infos}


@pytest.mark.parametrize("place", ["", "/a", "/run", "/run/sub", "/run/x", "/ru", "/absent", "/with space/q?#+"])
def test_what_a_path_is(root: str, files: pafs.FileSystem, peer: pafs.FileSystem, place: str) -> None:
    ours, theirs = files.get_file_info(root + place), peer.get_file_info(root + place)
    assert (ours.type, ours.size, ours.mtime) == (theirs.type, theirs.size, theirs.mtime)


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("place", ["", "/run", "/run/sub", "/absent"])
def test_what_lies_below(
    root: str, files: pafs.FileSystem, peer: pafs.FileSystem, place: str, *, recursive: bool
) -> None:
    selector = pafs.FileSelector(root + place, recursive=recursive, allow_not_found=True)
    assert facts(files.get_file_info(selector)) == facts(peer.get_file_info(selector))


def test_a_prefix_that_is_not_there(root: str, files: pafs.FileSystem) -> None:
    with pytest.raises(FileNotFoundError):
        files.get_file_info(pafs.FileSelector(f"{root}/absent"))
    with pytest.raises(FileNotFoundError):
        files.open_input_file(f"{root}/absent")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_what_is_written_is_read_whole_and_in_parts(root: str, files: pafs.FileSystem, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    with files.open_output_stream(f"{root}/new") as stream:
        stream.write(data[: size // 2])
        stream.write(data[size // 2 :])
    with files.open_input_file(f"{root}/new") as stream:
        assert stream.size() == size
        assert stream.read() == data
        for start, count in ((0, 10), (size // 2, 1000), (max(0, size - 5), 50), (size, 5)):
            stream.seek(start)
            assert stream.read(count) == data[start : start + count]
            assert stream.tell() == min(size, start + count)


def test_nothing_appears_before_the_stream_is_closed(root: str, files: pafs.FileSystem) -> None:
    stream = files.open_output_stream(f"{root}/new")
    stream.write(b"half")
    assert files.get_file_info(f"{root}/new").type == pafs.FileType.NotFound
    del stream
    assert files.get_file_info(f"{root}/new").type == pafs.FileType.NotFound


def test_a_large_parquet_file_is_read_by_ranges(root: str, files: pafs.FileSystem) -> None:
    table = pa.table({"x": np.random.default_rng(0).random(400_000), "y": np.arange(400_000)})
    pq.write_table(table, f"{root}/t.parquet", filesystem=files, row_group_size=50_000)
    assert files.get_file_info(f"{root}/t.parquet").size > 2 << 20
    found = pads.dataset([f"{root}/t.parquet"], filesystem=files).to_table(filter=pads.field("y") >= 390_000)
    assert found.to_pydict() == table.slice(390_000).to_pydict()


def test_a_large_object_that_is_replaced_while_it_is_read_is_not_mixed(root: str, files: pafs.FileSystem) -> None:
    storage.write_bytes(f"s3://{root}/large", bytes(3 << 20))
    with files.open_input_file(f"{root}/large") as stream:
        storage.write_bytes(f"s3://{root}/large", b"\1" * (3 << 20))
        with pytest.raises(StorageError, match="changed"):
            stream.read(100)


def test_moving_copying_and_deleting(root: str, files: pafs.FileSystem) -> None:
    files.move(f"{root}/with space/q?#+", f"{root}/moved to/ü")
    files.copy_file(f"{root}/run/x", f"{root}/copy")
    files.delete_file(f"{root}/a")
    files.delete_dir(f"{root}/run")
    left = [info.path for info in files.get_file_info(pafs.FileSelector(root, recursive=True)) if info.is_file]
    assert sorted(left) == [f"{root}/copy", f"{root}/moved to/ü", f"{root}/run2/w"]
    assert storage.read_bytes(f"s3://{root}/moved to/ü") == bytes(5)


def test_it_travels_to_another_process(root: str, files: pafs.FileSystem) -> None:
    there = pickle.loads(pickle.dumps(files))
    assert there == files
    assert there.get_file_info(f"{root}/run/x").size == 1
