"""Listing, keys, freezing, and what is new."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.ids import range_of_part
from medvision_ray.archive.inventory import (
    SCHEMA,
    Inventory,
    freeze,
    image_id,
    list_archive,
    list_uris,
    only_new,
    read_frozen,
)
from medvision_ray.cli import main
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


# What is new


def inventory_of(*etags: str) -> Inventory:
    rows = [(image_id(f"/a/{i}", etag), f"/a/{i}", etag, 1) for i, etag in enumerate(etags)]
    return Inventory(pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA))


def commit(output: str, found: Inventory, model_id: str, run_key: str, failed: dict[int, str]) -> None:
    """One run's rows: a failure of the given code for these positions, else a prediction."""
    rows = [
        {"run_key": run_key, "run_date": date(2026, 1, 1), "model_id": model_id, "error_code": failed.get(i), **row}
        for i, row in enumerate(found.objects.drop_columns(["size"]).to_pylist())
    ]
    predictions, failures = tables.predictions_schema(("a", "b")), tables.FAILURES
    for name, schema, chosen in (
        ("predictions", predictions, [row for row in rows if row["error_code"] is None]),
        ("failures", failures, [row for row in rows if row["error_code"] is not None]),
    ):
        tables.commit(output, name, schema, [pa.RecordBatch.from_pylist(chosen, schema)], run_key)


def new(found: Inventory) -> list[str]:
    return [str(uri) for uri in found.objects["uri"].to_pylist()]


def test_without_tables_everything_is_new(tmp_path: Path) -> None:
    found = only_new(inventory_of("e", "e"), str(tmp_path), "m")
    assert (new(found), found.already_done, found.retried) == (["/a/0", "/a/1"], 0, 0)


def test_what_a_model_committed_is_done_for_it_and_not_for_others(store: str) -> None:
    commit(store, inventory_of("e", "e", "e"), "m", "r1", {1: "timeout"})
    found = only_new(inventory_of("e", "e", "changed", "e"), store, "m")
    assert (new(found), found.already_done, found.retried) == (["/a/2", "/a/3"], 2, 0)
    assert only_new(inventory_of("e", "e"), store, "other").already_done == 0


def test_parts_are_disjoint_even_and_whole(tmp_path: Path) -> None:
    uris = "".join(f"s3://bucket/{number}\n" for number in range(3000))
    named = pa.table({"uri": uris.split(), "etag": ["e"] * 3000, "size": [1] * 3000})
    pq.write_table(named, tmp_path / "list.parquet")
    config = ArchiveConfig(uri="s3://bucket", list_file=str(tmp_path / "list.parquet"))
    parts = [list_archive(config.model_copy(update={"part": f"{number}/3"})).objects for number in (1, 2, 3)]
    ids = [set(part["image_id"].to_pylist()) for part in parts]
    assert set.union(*ids) == set(list_archive(config).objects["image_id"].to_pylist())
    assert sum(len(part) for part in ids) == 3000
    assert all(len(part) == pytest.approx(1000, abs=5 * (3000 * 2 / 9) ** 0.5) for part in ids)
    assert parts[0]["uri"].to_pylist() == sorted(parts[0]["uri"].to_pylist())


def test_what_is_done_is_left_out_of_each_part(tmp_path: Path) -> None:
    whole = inventory_of(*["e"] * 40)
    commit(str(tmp_path), Inventory(whole.objects.slice(0, 30)), "m", "r1", dict.fromkeys(range(0, 30, 7), "timeout"))
    found = []
    for number in (1, 2, 3):
        first, last = range_of_part(f"{number}/3")
        inside = [first <= key <= last for key in whole.objects["image_id"].to_pylist()]
        part = Inventory(whole.objects.filter(pa.array(inside)))
        found.append(only_new(part, str(tmp_path), "m", retry_failed=("timeout",)))
    assert all(part.objects.num_rows for part in found)
    assert sorted(int(uri.rsplit("/", 1)[1]) for part in found for uri in new(part)) == [
        *range(0, 30, 7),
        *range(30, 40),
    ]
    assert [sum(getattr(part, name) for part in found) for name in ("already_done", "retried")] == [25, 5]


def test_failures_are_tried_again_where_wanted(tmp_path: Path) -> None:
    output, archive = str(tmp_path), inventory_of("e", "e", "e", "e")
    commit(output, archive, "m", "r1", {0: "timeout", 1: "not_found", 2: "timeout"})
    commit(output, Inventory(archive.objects.slice(2, 1)), "m", "r2", {})  # scored since

    def retry(codes: bool | tuple[str, ...], limit: int | None = None) -> tuple[list[str], int, int]:
        found = only_new(archive, output, "m", limit, retry_failed=codes)
        return new(found), found.already_done, found.retried

    assert retry(False) == ([], 4, 0)
    assert retry(("not_found",)) == (["/a/1"], 3, 1)
    assert retry(("timeout", "read_error")) == (["/a/0"], 3, 1)
    assert retry(()) == ([], 4, 0)
    assert retry(True, 1) == (["/a/0"], 2, 1)


def test_counts_of_a_listing_stay_with_what_is_new(tmp_path: Path) -> None:
    found = only_new(replace(inventory_of("e"), excluded=1, older=2, duplicates=3), str(tmp_path), "m")
    assert (found.excluded, found.older, found.duplicates) == (1, 2, 3)


def test_a_frozen_inventory_keeps_its_rows_and_counts(store: str) -> None:
    counted = replace(inventory_of("e", "f", "g"), excluded=1, already_done=2, retried=3, older=4, duplicates=5)
    place = storage.join(store, "runs/r/inventory.parquet")
    freeze(counted, place, 2)
    assert read_frozen(place) == replace(counted, objects=read_frozen(place).objects)
    assert read_frozen(place).objects.equals(counted.objects)


def test_counts_that_an_older_version_did_not_freeze_are_zero(tmp_path: Path) -> None:
    old = inventory_of("e").objects.replace_schema_metadata({"excluded": "7", "already_done": "1"})
    pq.write_table(old, tmp_path / "inventory.parquet")
    found = read_frozen(str(tmp_path / "inventory.parquet"))
    assert (found.excluded, found.already_done, found.retried, found.older, found.duplicates) == (7, 1, 0, 0, 0)


def test_an_empty_inventory_is_frozen_too(tmp_path: Path) -> None:
    place = str(tmp_path / "inventory.parquet")
    freeze(Inventory(SCHEMA.empty_table()), place, 256)
    assert read_frozen(place).objects.schema == SCHEMA


@pytest.mark.parametrize("name", ["a\nb/c.dcm", "[x](y).{z}", "a_b-c d", "é/日本.dcm"])
def test_patterns_take_every_other_character_as_itself(tmp_path: Path, name: str) -> None:
    storage.write_bytes(str(tmp_path / name), b"1")
    storage.write_bytes(str(tmp_path / "other"), b"1")
    for pattern in (name, "**/" + name, "**" + name[-2:]):
        assert new(list_archive(ArchiveConfig(uri=str(tmp_path), include=(pattern,)))) == [str(tmp_path / name)]
    assert new(list_archive(ArchiveConfig(uri=str(tmp_path), exclude=("**",)))) == []
    assert new(list_archive(ArchiveConfig(uri=str(tmp_path), include=()))) == []


def test_the_verb_counts_what_a_source_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "list").write_text("a\na\n../outside\n")
    options = [f"archive.uri={tmp_path}", f"archive.list_file={tmp_path / 'list'}", "archive.since=1h"]
    assert main(["inventory", "--json", *(part for option in options for part in ("--set", option))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {key: result[key] for key in ("objects", "excluded", "older", "duplicates", "bytes")} == {
        "objects": 1,
        "excluded": 1,
        "older": 0,
        "duplicates": 1,
        "bytes": 3,
    }
