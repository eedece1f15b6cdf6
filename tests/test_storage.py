"""One behaviour of the object store on a local folder and on S3."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import deltalake
import pyarrow as pa
import pytest
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError

from medvision_ray import listing, retry, storage
from medvision_ray.errors import StorageError, UsageError

ODD_NAMES = ("with space.dcm", "a+b.dcm", "100%25 sure.dcm", "Müller-日本.dcm", "q?x=1.dcm", "n#3.dcm")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces this room's waiting by a record of the waits; other threads of the process sleep as ever."""
    pauses: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    return pauses


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value.code


def test_what_was_written_is_read(store: str) -> None:
    uri = storage.join(store, "deep", "er", "x.bin")
    data = bytes(range(256)) * 10
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data


def test_writing_again_replaces(store: str) -> None:
    uri = storage.join(store, "x")
    storage.write_bytes(uri, b"a longer first version")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"1")
    storage.create_exclusive(str(tmp_path / "x"), b"2")
    storage.create_exclusive(str(tmp_path / "y"), b"3")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_an_empty_object_is_an_object(store: str) -> None:
    uri = storage.join(store, "empty")
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    assert [(item.path, item.size) for item in listing.list_objects(store)] == [("empty", 0)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_with_odd_characters_go_round(store: str, name: str) -> None:
    storage.write_bytes(storage.join(store, "odd dir", name), name.encode())
    (listed,) = listing.list_objects(store)
    assert listed.path == f"odd dir/{name}"
    assert listed.uri == storage.join(store, "odd dir", name)
    assert storage.read_bytes(listed.uri, etag=listed.etag) == name.encode()
    assert storage.exists(listed.uri)
    assert listing.stat_object(listed.uri).etag == listed.etag
    assert not storage.create_exclusive(listed.uri, b"other")
    storage.delete_object(listed.uri)
    assert not storage.exists(listed.uri)


def test_listing_gives_relative_paths_and_sizes_in_the_same_order_each_time(store: str) -> None:
    sizes = {"b/2": 2, "a": 1, "b/10": 10, "c/d/e": 5}
    for path, size in sizes.items():
        storage.write_bytes(storage.join(store, path), bytes(size))
    listed = list(listing.list_objects(store))
    assert {item.path: item.size for item in listed} == sizes
    assert [item.path for item in listed] == ["a", "b/10", "b/2", "c/d/e"]
    assert list(listing.list_objects(store + "/")) == listed


def test_a_folder_does_not_hold_its_namesakes(store: str) -> None:
    storage.write_bytes(storage.join(store, "run/x"), b"1")
    storage.write_bytes(storage.join(store, "run2/y"), b"1")
    assert [item.path for item in listing.list_objects(storage.join(store, "run"))] == ["x"]


def test_the_etag_changes_with_the_content_and_only_then(store: str) -> None:
    uri = storage.join(store, "x")
    storage.write_bytes(uri, b"one")
    (first,) = listing.list_objects(store)
    assert next(listing.list_objects(store)).etag == first.etag
    storage.write_bytes(uri, b"two")
    (second,) = listing.list_objects(store)
    assert second.etag != first.etag
    assert listing.stat_object(uri).etag == second.etag
    assert listing.stat_object(uri).size == 3


def test_a_listing_of_several_pages_is_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = [f"{i:02d}" for i in range(10)]
    for name in names:
        storage.write_bytes(f"{s3}/p/{name}", b"")
    answer = storage.s3_client().list_objects_v2(Bucket=s3.removeprefix("s3://"))
    assert len(answer["Contents"]) == 3
    assert [item.path for item in listing.list_objects(f"{s3}/p")] == names


def test_folder_markers_are_no_objects(s3: str) -> None:
    client = storage.s3_client()
    client.put_object(Bucket=s3.removeprefix("s3://"), Key="p/sub/", Body=b"")
    assert list(listing.list_objects(f"{s3}/p")) == []


def test_an_empty_bucket_lists_nothing(s3: str) -> None:
    assert list(listing.list_objects(s3)) == []


def test_listing_what_is_not_there_is_refused(store: str) -> None:
    assert code_of(lambda: list(listing.list_objects(storage.join(store, "nowhere")))) == "not_found"


def test_listing_a_bucket_that_is_not_there_is_refused(s3: str) -> None:
    assert code_of(lambda: list(listing.list_objects(f"{s3}-absent/x"))) == "not_found"


def test_linked_folders_are_listed_once_and_loops_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    storage.write_bytes(str(outside / "x"), b"1")
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "one").symlink_to(outside)
    (archive / "two").symlink_to(outside)
    (outside / "back").symlink_to(archive)
    assert [item.path for item in listing.list_objects(str(archive))] == ["one/x"]


def test_links_to_nothing_or_to_themselves_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "real").write_bytes(b"1")
    (tmp_path / "file link").symlink_to(tmp_path / "real")
    assert [item.path for item in listing.list_objects(str(tmp_path))] == ["file link", "real"]


def test_an_unreadable_folder_is_told_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    listdir = os.listdir

    def refuse(folder: str) -> list[str]:  # chmod does not bind root, as whom tests may run
        if folder.endswith("closed"):
            raise PermissionError(errno.EACCES, "no", folder)
        return listdir(folder)

    monkeypatch.setattr(listing.os, "listdir", refuse)
    assert code_of(lambda: list(listing.list_objects(str(tmp_path)))) == "access_denied"


def test_another_version_than_the_listed_one_is_refused(store: str) -> None:
    uri = storage.join(store, "x")
    storage.write_bytes(uri, b"one")
    (listed,) = listing.list_objects(store)
    storage.write_bytes(uri, b"other")
    assert code_of(lambda: storage.read_bytes(uri, etag=listed.etag)) == "changed_while_reading"


def test_a_missing_object_is_not_found(store: str) -> None:
    assert code_of(lambda: storage.read_bytes(storage.join(store, "absent"))) == "not_found"
    assert code_of(lambda: listing.stat_object(storage.join(store, "absent"))) == "not_found"


def test_an_object_below_a_file_is_not_found(tmp_path: Path, no_pause: list[float]) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert code_of(lambda: storage.read_bytes(str(tmp_path / "file" / "x"))) == "not_found"
    assert no_pause == []


def test_a_larger_object_than_allowed_is_refused(store: str) -> None:
    uri = storage.join(store, "x")
    storage.write_bytes(uri, bytes(100))
    assert code_of(lambda: storage.read_bytes(uri, max_bytes=99)) == "too_large"
    assert len(storage.read_bytes(uri, max_bytes=100)) == 100


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], no_pause: list[float]
) -> None:
    make(tmp_path / "x")
    assert code_of(lambda: storage.read_bytes(str(tmp_path / "x"))) == "read_error"
    assert no_pause == []


def test_the_first_exclusive_writer_wins(store: str) -> None:
    uri = storage.join(store, "deep", "x")
    assert storage.create_exclusive(uri, b"first")
    assert not storage.create_exclusive(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_racing_exclusive_writers_exactly_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        uri = str(tmp_path / "race" / str(round_))
        barrier = Barrier(2)

        def create(data: bytes, uri: str = uri, barrier: Barrier = barrier) -> bool:
            barrier.wait(10)
            return storage.create_exclusive(uri, data)

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(create, (b"one", b"two")))
        assert sorted(won) == [False, True]
        assert storage.read_bytes(uri) == (b"one" if won[0] else b"two")


def test_an_exclusive_put_is_conditional_on_the_wire(s3: str) -> None:
    # moto checks and writes without a lock, so a race there says nothing; the condition is what S3 holds.
    seen: list[str | None] = []

    def note(request: AWSRequest, **_: object) -> None:
        seen.append(request.headers["If-None-Match"])

    events = storage.s3_client().meta.events
    events.register("before-sign.s3.PutObject", note)
    try:
        storage.create_exclusive(f"{s3}/x", b"1")
    finally:
        events.unregister("before-sign.s3.PutObject", note)
    assert seen == ["*"]


def test_a_deleted_tree_is_gone_and_its_neighbour_is_not(store: str) -> None:
    for path in ("run/a", "run/b/c", "run2/d"):
        storage.write_bytes(storage.join(store, path), b"1")
    storage.delete_tree(storage.join(store, "run"))
    assert [item.path for item in listing.list_objects(store)] == ["run2/d"]
    assert not storage.exists(storage.join(store, "run"))


def test_deleting_nothing_is_fine(store: str) -> None:
    storage.delete_tree(storage.join(store, "absent"))
    storage.delete_object(storage.join(store, "absent"))


def test_deleting_a_tree_leaves_what_its_links_lead_to(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "outside" / "x"), b"1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    storage.delete_tree(str(tmp_path / "run"))
    assert (tmp_path / "outside" / "x").read_bytes() == b"1"


def test_exists_knows_objects_and_folders(store: str) -> None:
    uri = storage.join(store, "folder", "x")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"1")
    assert storage.exists(uri)
    assert storage.exists(storage.join(store, "folder"))
    assert not storage.exists(storage.join(store, "fold"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/data/x/", "/data/x"),
        ("/data//a/../x", "/data/x"),
        ("file:///data/my%20x/", "/data/my x"),
        ("file://localhost/data/x", "/data/x"),
        ("file:///data/a#1?", "/data/a#1?"),
        ("/data/100%25", "/data/100%25"),
        ("s3://bucket/a b/100%25+#?/", "s3://bucket/a b/100%25+#?"),
        ("s3://bucket/", "s3://bucket"),
    ],
)
def test_a_place_has_one_spelling(given: str, expected: str) -> None:
    assert storage.absolute(given) == expected
    assert storage.absolute(storage.absolute(given)) == expected


def test_relative_and_home_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("~/x") == "/home/somebody/x"


def test_join_appends_parts_with_one_slash() -> None:
    assert storage.join("s3://bucket/a/", "/b/", "c d") == "s3://bucket/a/b/c d"
    assert storage.join("file:///data/", "x") == "/data/x"
    assert storage.join("/", "x") == "/x"


@pytest.mark.parametrize("uri", ["ftp://host/x", "https://host/x", "file://data/x"])
def test_an_address_that_cannot_be_meant_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="Expected"):
        storage.absolute(uri)


def test_an_endpoint_without_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"):
        storage.exists("s3://bucket/x")


def test_a_delta_table_opens_where_the_options_say(store: str) -> None:
    uri = storage.join(store, "tables", "100% of runs")
    options = storage.table_options(uri)
    deltalake.write_deltalake(storage.table_uri(uri), pa.table({"x": [1, 2]}), storage_options=options)
    assert storage.exists(storage.join(uri, "_delta_log", "00000000000000000000.json"))
    table = deltalake.DeltaTable(storage.table_uri(uri), storage_options=options)
    assert pa.table(table.to_pyarrow_table()).column("x").to_pylist() == [1, 2]


def test_table_options_follow_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert storage.table_options("/data") == {}
    assert storage.table_options("s3://b/x")["AWS_ALLOW_HTTP"] == "true"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store")
    assert storage.table_options("s3://b/x")["AWS_ALLOW_HTTP"] == "false"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert "AWS_ALLOW_HTTP" not in storage.table_options("s3://b/x")


class Failing:
    """Stands in for the local reader: raises its errors one after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, *_: object) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


def read_through(fake: Failing, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(storage, "_read_local", fake)
    return storage.read_bytes("/data/x")


def test_an_error_that_may_pass_is_retried_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, no_pause: list[float]
) -> None:
    fake = Failing(OSError(errno.EIO, "stale"), OSError(errno.ETIMEDOUT, "slow"))
    assert read_through(fake, monkeypatch) == b"content"
    assert fake.calls == 3
    assert len(no_pause) == 2
    assert 0 <= no_pause[0] <= 0.2
    assert 0 <= no_pause[1] <= 0.4


def test_retries_end(monkeypatch: pytest.MonkeyPatch, no_pause: list[float]) -> None:
    fake = Failing(*[OSError(errno.EIO, "DOE^JANE")] * 99)
    with pytest.raises(StorageError) as caught:
        read_through(fake, monkeypatch)
    assert fake.calls == retry.ATTEMPTS
    assert caught.value.transient
    assert max(no_pause) <= 10
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError(errno.ENOENT, "x"), "not_found"),
        (PermissionError(errno.EACCES, "x"), "access_denied"),
        (OSError(errno.ENAMETOOLONG, "x"), "read_error"),
        (OSError(errno.ENOSPC, "x"), "read_error"),
        (StorageError("x", code="too_large"), "too_large"),
    ],
)
def test_a_permanent_error_is_not_retried(
    monkeypatch: pytest.MonkeyPatch, no_pause: list[float], error: Exception, code: str
) -> None:
    fake = Failing(error, error)
    assert code_of(lambda: read_through(fake, monkeypatch)) == code
    assert fake.calls == 1


@pytest.mark.parametrize(("status", "calls"), [(500, 10), (503, 10), (429, 10), (409, 10), (400, 1), (403, 1)])
def test_s3_answers_are_retried_by_their_status(
    s3: str, monkeypatch: pytest.MonkeyPatch, no_pause: list[float], status: int, calls: int
) -> None:
    tried: list[str] = []

    def refuse(**request: str) -> None:
        tried.append(request["Key"])
        raise ClientError({"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    monkeypatch.setattr(storage.s3_client(), "put_object", refuse)
    with pytest.raises(StorageError):
        storage.create_exclusive(f"{s3}/x", b"1")
    assert len(tried) == calls


def test_missing_credentials_are_told_soon(s3: str, monkeypatch: pytest.MonkeyPatch, no_pause: list[float]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._s3_client.cache_clear()
    try:
        assert code_of(lambda: storage.read_bytes(f"{s3}/x")) == "credentials"
    finally:
        storage._s3_client.cache_clear()
    assert len(no_pause) == retry.CREDENTIAL_ATTEMPTS - 1
