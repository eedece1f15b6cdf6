"""Listing, keys, freezing, and what is new."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from medvision_ray import storage
from medvision_ray.archive.inventory import freeze, image_id, list_archive, list_uris, read_frozen
from medvision_ray.config import ArchiveConfig
from medvision_ray.errors import StorageError


def _fill(base: str) -> None:
    for name in ("a/1.dcm", "a/.DS_Store", "b/c/2.png", "labels.csv", "3.dcm"):
        storage.write_bytes(storage.join(base, name), name.encode())


def test_patterns_choose_and_count(store: str) -> None:
    _fill(store)
    found = list_archive(ArchiveConfig(uri=store, exclude=("**/.*", "**/*.csv")))
    assert sorted(uri.removeprefix(storage.absolute(store)) for uri in found.objects["uri"].to_pylist()) == [
        "/3.dcm",
        "/a/1.dcm",
        "/b/c/2.png",
    ]
    assert found.excluded == 2
    assert list_archive(ArchiveConfig(uri=store, include=("a/*.dcm",))).objects.num_rows == 1


def test_image_id_is_63_bits_of_sha256() -> None:
    expected = int(hashlib.sha256(b"s3://b/k\x00v1").hexdigest()[:16], 16) >> 1
    assert image_id("s3://b/k", "v1") == expected < 1 << 63
    assert image_id("s3://b/k", "v2") != expected


def test_first_freeze_wins(store: str) -> None:
    _fill(store)
    place = storage.join(store, "runs", "r", "inventory.parquet")
    first = freeze(list_archive(ArchiveConfig(uri=store, include=("a/**",))), place, 2)
    second = freeze(list_archive(ArchiveConfig(uri=store)), place, 2)
    assert second.objects.equals(first.objects)
    assert read_frozen(place).excluded == first.excluded


def test_named_object_that_is_gone_keeps_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    found = list_uris([str(tmp_path / "a.png"), str(tmp_path / "gone.png")])
    assert found.objects["etag"].to_pylist()[1] == ""
    assert found.objects.num_rows == 2


def test_missing_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none"):
        list_archive(ArchiveConfig(uri=str(tmp_path / "nowhere")))
