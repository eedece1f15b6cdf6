"""Listing by many threads: whole, in order, each object once, whatever the shape of the archive."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from medvision_ray import listing, s3_listing, storage
from medvision_ray.errors import StorageError
from medvision_ray.retry import ATTEMPTS

ODD_KEYS = (
    "a b.dcm",
    "a+b.dcm",
    "100%25.dcm",
    "%2B.dcm",
    "Müller/日本.dcm",
    "q?x=1&y.dcm",
    "n#3.dcm",
    "x/\U0001f9e0.dcm",
    "<&>.dcm",
)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Pages of three keys, and a record of what was asked for."""
    asked: list[dict[str, str]] = []
    ask = s3_listing._ask

    def note(bucket: str, prefix: str, question: dict[str, str]) -> Any:
        asked.append({"Prefix": prefix, **question})
        return ask(bucket, prefix, question)

    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    monkeypatch.setattr(s3_listing, "_ask", note)
    return asked


def put(s3: str, *keys: str) -> None:
    client, bucket = storage.s3_client(), s3.removeprefix("s3://")
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())


def paths(uri: str, below: tuple[str, ...] = (), threads: int = 4) -> Counter[str]:
    return Counter(path for batch in listing.list_batches(uri, below, threads) for path in batch["path"].to_pylist())


def entries(s3: str, prefix: str = "", threads: int = 4) -> list[str]:
    batches = s3_listing.list_entries(s3.removeprefix("s3://"), prefix, threads)
    return [key for batch in batches for key in batch["key"].to_pylist()]


SHAPES = {
    "flat": [f"{i:03d}" for i in range(40)],
    "wide": [f"study-{i:03d}/1.dcm" for i in range(40)],
    "deep": [f"{'d/' * depth}{i}" for depth in range(8) for i in range(4)],
    "by date": [f"2026/{m:02d}/{d:02d}/{i}.dcm" for m in (1, 2, 11) for d in (3, 14) for i in range(5)],
    "files between folders": ["a", "a-", "a/1", "a/2", "a0", "b.dcm", "b/1", "b/c/2", "b0/1", "c", "c/", "c/d", "c0"],
    "one folder has nearly all": [*(f"big/{i:03d}" for i in range(30)), "a/1", "z/1"],
    "doubled slashes": ["a//1", "a//2", "a/1", "/x", "a///b", "a/b/1", "a/b//1"],
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_key_ranges_cover_every_key_once_and_in_order(
    s3: str, shape: str, threads: int, small_pages: list[dict[str, str]]
) -> None:
    put(s3, *SHAPES[shape])
    assert entries(s3, threads=threads) == sorted(SHAPES[shape], key=str.encode)
    if len(SHAPES[shape]) > 3:
        assert any("Delimiter" in question for question in small_pages)


def test_a_prefix_that_is_part_of_a_name_is_not_listed_beyond(s3: str, small_pages: list[dict[str, str]]) -> None:
    put(s3, *(f"p/{i}/x" for i in range(9)), *(f"p2/{i}" for i in range(9)), "o/1", "p", "p0")
    assert entries(s3, "p/") == [f"p/{i}/x" for i in range(9)]


@given(keys=st.sets(st.text("ab/0é￿\U00010000", min_size=1, max_size=6), max_size=30))
def test_ranges_cover_any_set_of_keys(keys: set[str]) -> None:
    # An S3 of its own in four lines: pages of two, StartAfter, Delimiter, byte order.
    ordered = sorted(keys, key=str.encode)

    def page(bucket: str, prefix: str, after: str = "", delimiter: str = "", token: str | None = None) -> Any:
        below = [key for key in ordered if key > max(after, token or "")]
        if delimiter:
            cut = {
                key[: key.find("/", len(prefix)) + 1]
                for key in below
                if key.startswith(prefix) and "/" in key[len(prefix) :]
            }
            return SimpleNamespace(prefixes=sorted(cut)[:2], token=None)
        rows = listing.pa.RecordBatch.from_pylist(
            [{"key": key} for key in below[:2]], listing.pa.schema([("key", "string")])
        )
        return SimpleNamespace(entries=rows, truncated=len(below) > 2, last_key=below[:2][-1] if below else "")

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(s3_listing, "_page", page)
        assert entries("s3://b") == ordered


def test_more_than_a_thousand_keys_below_a_prefix_are_listed(s3: str) -> None:
    keys = [f"p/{i % 7}/{i:04d}" for i in range(2003)]
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # the server's own memory: 2,003 requests would take seconds
    for key in keys:
        backend.put_object(s3.removeprefix("s3://"), key, b"1")
    assert entries(s3, "p/") == sorted(keys)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_listed_as_they_are(s3: str, key: str) -> None:
    put(s3, f"odd dir/{key}")
    (listed,) = listing.list_objects(f"{s3}/odd dir")
    head = storage.s3_client().head_object(Bucket=s3.removeprefix("s3://"), Key=f"odd dir/{key}")
    assert listed == listing.ObjectInfo(
        f"{s3}/odd dir/{key}",
        key,
        len(f"odd dir/{key}".encode()),
        head["ETag"].strip('"'),
        int(head["LastModified"].timestamp()) * 10**6,
    )


def test_boto3_listing_is_left_as_it_was(s3: str) -> None:
    put(s3, "a b", "c/d")
    list(listing.list_objects(s3))
    answer = storage.s3_client().list_objects_v2(Bucket=s3.removeprefix("s3://"))
    assert [item["Key"] for item in answer["Contents"]] == ["a b", "c/d"]


def test_listing_below_starts_there(s3: str, small_pages: list[dict[str, str]]) -> None:
    put(s3, *(f"root/2025/{i}" for i in range(9)), *(f"root/2026/{i}" for i in range(5)), "root/20260/x", "root/ct/1")
    assert paths(f"{s3}/root", ("2026", "ct")) == Counter([*(f"2026/{i}" for i in range(5)), "ct/1"])
    assert {question["Prefix"] for question in small_pages} <= {"root/2026/", "root/ct/"}


@pytest.mark.parametrize("below", [("absent",), ("a", "absent")])
def test_listing_below_what_is_not_there_is_refused(store: str, below: tuple[str, ...]) -> None:
    storage.write_bytes(storage.join(store, "a/1"), b"1")
    with pytest.raises(StorageError) as caught:
        paths(store, below)
    assert caught.value.code == "not_found"


def test_a_page_that_fails_for_good_fails_the_listing(
    s3: str, small_pages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, *SHAPES["by date"])
    ask, pauses = s3_listing._ask, []
    monkeypatch.setattr("medvision_ray.retry.time", SimpleNamespace(sleep=pauses.append, monotonic=lambda: 0.0))

    def fail_later(bucket: str, prefix: str, question: dict[str, str]) -> Any:
        if question.get("StartAfter", "") >= "2026/02":
            raise StorageError("no", transient=True)
        return ask(bucket, prefix, question)

    monkeypatch.setattr(s3_listing, "_ask", fail_later)
    with pytest.raises(StorageError):
        entries(s3)
    assert len(pauses) >= ATTEMPTS - 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_a_page_that_fails_once_is_asked_for_again_and_nothing_is_lost(
    s3: str, small_pages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, *SHAPES["by date"])
    ask, failed = s3_listing._ask, set()
    monkeypatch.setattr("medvision_ray.retry.time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 0.0))

    def fail_once(bucket: str, prefix: str, question: dict[str, str]) -> Any:
        key = (prefix, *sorted(question.items()))
        if key not in failed:
            failed.add(key)
            raise StorageError("no", transient=True)
        return ask(bucket, prefix, question)

    monkeypatch.setattr(s3_listing, "_ask", fail_once)
    assert entries(s3) == sorted(SHAPES["by date"])
    assert len(failed) > 10


def test_a_store_that_lists_out_of_order_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"<Contents><Key>{k}</Key><Size>1</Size><ETag>e</ETag></Contents>" for k in ("b", "a"))
    root = s3_listing.ET.fromstring(f"<ListBucketResult>{text}</ListBucketResult>")
    monkeypatch.setattr(s3_listing, "_ask", lambda *_: root)
    with pytest.raises(StorageError, match="ascending order"):
        entries(s3)


def test_an_answer_that_is_cut_off_is_asked_for_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, "a", "b")
    parse, seen = s3_listing.ET.fromstring, []
    monkeypatch.setattr("medvision_ray.retry.time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 0.0))

    def cut_first(body: bytes) -> Any:
        seen.append(body)
        return parse(body[: len(body) // 2] if len(seen) == 1 else body)

    monkeypatch.setattr(s3_listing, "ET", SimpleNamespace(fromstring=cut_first, ParseError=s3_listing.ET.ParseError))
    assert entries(s3) == ["a", "b"]
    assert len(seen) == 2


# Local folders


def test_local_folders_of_any_shape_are_listed_whole(tmp_path: Path) -> None:
    names = [name for shape in ("wide", "deep", "by date") for name in SHAPES[shape]]
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"1")
    assert paths(str(tmp_path)) == Counter(names)
    assert [item.path for item in listing.list_objects(str(tmp_path))] == sorted(names)


def test_a_folder_of_many_files_is_looked_at_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_NAMES_PER_TASK", 7)
    names = [f"{i:03d}" for i in range(50)]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"1")
    assert paths(str(tmp_path)) == Counter([*names, "sub/x"])


def test_size_version_and_time_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    os.utime(file, ns=(0, 1_700_000_000_123_456_789))
    (listed,) = listing.list_objects(str(tmp_path))
    assert (listed.size, listed.mtime_us) == (5, 1_700_000_000_123_456)
    assert listed.etag == storage.local_etag(os.stat(file))
    assert listing.stat_object(str(file)) == listed


def test_which_name_of_a_linked_folder_counts_is_the_shallowest_then_the_first(tmp_path: Path) -> None:
    real = tmp_path / "outside"
    storage.write_bytes(str(real / "x"), b"1")
    root = tmp_path / "archive"
    (root / "a").mkdir(parents=True)
    for link in ("a/link", "z", "m"):
        (root / link).symlink_to(real)
    for threads in (1, 8):
        assert paths(str(root), threads=threads) == Counter(["m/x"])


def test_a_linked_folder_counts_once_over_several_prefixes(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "real" / "x"), b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert paths(str(tmp_path), ("link", "real")) == Counter(["link/x"])


def test_a_file_that_cannot_be_asked_about_fails_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"1")
    stat = os.stat

    def refuse(path: Any, *more: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("/x"):
            raise PermissionError(errno.EACCES, "no", path)
        return stat(path, *more, **options)

    monkeypatch.setattr(listing.os, "stat", refuse)
    with pytest.raises(StorageError) as caught:
        paths(str(tmp_path))
    assert caught.value.code == "access_denied"


def test_a_name_that_is_not_utf8_has_an_address_that_reads_back(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/M\xfcller %41.dcm"
    with open(raw, "wb") as stream:
        stream.write(b"pixels")
    storage.write_bytes(str(tmp_path / "Müller.dcm"), b"1")
    listed = {item.path: item for item in listing.list_objects(str(tmp_path))}
    odd = listed["M%FCller%20%2541.dcm"]
    assert odd.uri.startswith("file:///")
    assert storage.read_bytes(odd.uri, etag=odd.etag) == b"pixels"
    assert listed["Müller.dcm"].uri == str(tmp_path / "Müller.dcm")
