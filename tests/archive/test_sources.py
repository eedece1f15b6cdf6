"""S3 Inventory, list files, prefix and since: the same objects under the same keys, whatever names them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import listing, storage
from medvision_ray.archive.inventory import Inventory, list_archive
from medvision_ray.config import ArchiveConfig
from medvision_ray.errors import StorageError, UsageError

KEYS = (
    "xray/a b.dcm",
    "xray/a+b.dcm",
    "xray/100%25 sure.dcm",
    "xray/Müller/日本.dcm",
    "xray/.hidden",
    "ct/1.dcm",
    "top.dcm",
)
CSV_FIELDS = ("Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "LastModifiedDate", "ETag")
PARQUET_FIELDS = ("bucket", "key", "version_id", "is_latest", "is_delete_marker", "size", "last_modified_date", "e_tag")
Row = dict[str, Any]


@pytest.fixture
def bucket(s3: str) -> str:
    for key in KEYS:
        storage.s3_client().put_object(Bucket=s3.removeprefix("s3://"), Key=key, Body=key.encode())
    return s3


def rows_of(uri: str, keys: tuple[str, ...] = KEYS) -> list[Row]:
    """What S3 Inventory would say of these objects, asked of the store object by object."""
    name, found = uri.removeprefix("s3://"), []
    for key in keys:
        head = storage.s3_client().head_object(Bucket=name, Key=key)
        values = (name, key, None, True, False, head["ContentLength"], head["LastModified"], head["ETag"].strip('"'))
        found.append(dict(zip(CSV_FIELDS, values, strict=True)))
    return found


def as_csv(rows: list[Row], fields: tuple[str, ...]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        shown = {
            **row,
            "Key": quote_plus(row["Key"], safe="/"),
            "LastModifiedDate": row["LastModifiedDate"].strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "IsLatest": str(row["IsLatest"]).lower(),
            "IsDeleteMarker": str(row["IsDeleteMarker"]).lower(),
        }
        writer.writerow(["" if shown[name] is None else shown[name] for name in fields])
    return gzip.compress(text.getvalue().encode())


def as_parquet(rows: list[Row], fields: tuple[str, ...]) -> bytes:
    shown = [{PARQUET_FIELDS[CSV_FIELDS.index(name)]: row[name] for name in fields} for row in rows]
    types = dict(
        zip(
            PARQUET_FIELDS,
            (pa.string(),) * 3 + (pa.bool_(),) * 2 + (pa.int64(), pa.timestamp("ms"), pa.string()),
            strict=True,
        )
    )
    names = [PARQUET_FIELDS[CSV_FIELDS.index(name)] for name in fields]
    for row in shown:
        if "last_modified_date" in row:
            row["last_modified_date"] = row["last_modified_date"].replace(tzinfo=None)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(shown, pa.schema([(name, types[name]) for name in names])), sink)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[Row], tuple[str, ...]], bytes]] = {"CSV": as_csv, "Parquet": as_parquet}


def manifest_of(rows: list[Row], kind: str, target: str, fields: tuple[str, ...] = CSV_FIELDS, **other: Any) -> str:
    """Write an inventory of two data files as S3 lays it out, to a bucket or a folder; the manifest's address."""
    base = "reports/source/all"
    files = []
    for number, part in enumerate((rows[::2], rows[1::2])):
        data = FORMATS[kind](part, fields)
        key = f"{base}/data/{number}.{'csv.gz' if kind == 'CSV' else 'parquet'}"
        storage.write_bytes(f"{target}/{key}", data)
        files.append({"key": key, "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()})
    content = {
        "sourceBucket": rows[0]["Bucket"],
        "destinationBucket": f"arn:aws:s3:::{target.removeprefix('s3://')}",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": kind,
        "fileSchema": ", ".join(fields) if kind == "CSV" else "message s3.inventory { ... }",
        "files": files,
        **other,
    }
    place = f"{target}/{base}/2026-11-24T00-00Z/manifest.json"
    storage.write_bytes(place, json.dumps(content).encode())
    return place


def same(one: Inventory, other: Inventory) -> bool:
    return one.objects.to_pylist() == other.objects.to_pylist()


# S3 Inventory


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_an_inventory_gives_the_same_rows_as_listing(bucket: str, tmp_path: Path, kind: str, where: str) -> None:
    place = manifest_of(rows_of(bucket), kind, bucket if where == "bucket" else str(tmp_path))
    listed = list_archive(ArchiveConfig(uri=f"{bucket}/xray"))
    found = list_archive(ArchiveConfig(uri=f"{bucket}/xray", s3_inventory=place))
    assert listed.objects.num_rows == 4
    assert same(found, listed)
    assert found.excluded == listed.excluded + 2  # what lies in the bucket and not below xray is counted here


@pytest.mark.parametrize("kind", FORMATS)
def test_delete_markers_old_versions_and_folder_markers_are_no_objects(bucket: str, tmp_path: Path, kind: str) -> None:
    rows = rows_of(bucket, ("xray/a b.dcm",))
    gone = {**rows[0], "Key": "xray/gone", "IsDeleteMarker": True, "Size": None, "ETag": None}
    old = {**rows[0], "IsLatest": False, "ETag": "old"}
    folder = {**rows[0], "Key": "xray/folder/", "Size": 0}
    place = manifest_of([old, gone, *rows, folder], kind, str(tmp_path))
    found = list_archive(ArchiveConfig(uri=bucket, s3_inventory=place))
    assert found.objects["etag"].to_pylist() == [rows[0]["ETag"]]
    assert (found.excluded, found.duplicates) == (0, 0)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("field", ["ETag", "Size", "LastModifiedDate"])
def test_an_inventory_without_a_needed_field_is_refused(bucket: str, tmp_path: Path, kind: str, field: str) -> None:
    fields = tuple(name for name in CSV_FIELDS if name != field)
    place = manifest_of(rows_of(bucket), kind, str(tmp_path), fields)
    since = "2020-01-01" if field == "LastModifiedDate" else None
    with pytest.raises(UsageError, match=f"lacks {field}"):
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=place, since=since))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_object_without_etag_is_refused(bucket: str, tmp_path: Path, kind: str) -> None:
    rows = rows_of(bucket)
    rows[2]["ETag"] = None
    with pytest.raises(UsageError, match="ETag for every object"):
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=manifest_of(rows, kind, str(tmp_path))))


def test_an_inventory_of_another_bucket_is_refused(bucket: str, tmp_path: Path) -> None:
    place = manifest_of(rows_of(bucket), "CSV", str(tmp_path))
    with pytest.raises(UsageError, match=r"bucket other, .* lists archive-"):
        list_archive(ArchiveConfig(uri="s3://other/xray", s3_inventory=place))


def test_orc_is_refused_with_the_way_out(bucket: str, tmp_path: Path) -> None:
    place = manifest_of(rows_of(bucket), "CSV", str(tmp_path), fileFormat="ORC")
    with pytest.raises(UsageError, match=r"CSV or Parquet.*'ORC'"):
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=place))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sourceBucket": "b"}', '"x"', "\xff", '{"sourceBucket": "b", "files": [1]}']
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"Expected the manifest\.json"):
        list_archive(ArchiveConfig(uri="s3://b", s3_inventory=str(tmp_path / "manifest.json")))


def test_a_data_file_that_is_not_there_fails_the_listing(bucket: str, tmp_path: Path) -> None:
    place = manifest_of(rows_of(bucket), "CSV", str(tmp_path))
    (tmp_path / "reports/source/all/data/1.csv.gz").unlink()
    with pytest.raises(StorageError) as caught:
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=place))
    assert caught.value.code == "not_found"


def test_a_data_file_that_is_not_the_manifests_fails_the_listing(bucket: str, tmp_path: Path) -> None:
    place = manifest_of(rows_of(bucket), "CSV", str(tmp_path))
    data = tmp_path / "reports/source/all/data/1.csv.gz"
    data.write_bytes(as_csv(rows_of(bucket)[:1], CSV_FIELDS))
    with pytest.raises(StorageError, match="MD5"):
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=place))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_data_file_that_is_cut_off_fails_the_listing(bucket: str, tmp_path: Path, kind: str) -> None:
    place = manifest_of(rows_of(bucket), kind, str(tmp_path))
    content = json.loads(Path(place).read_text())
    for item in content["files"]:
        data = tmp_path / item["key"]
        data.write_bytes(data.read_bytes()[:-20])
        del item["MD5checksum"]
    Path(place).write_text(json.dumps(content))
    with pytest.raises(StorageError, match=f"Expected {kind} data files"):
        list_archive(ArchiveConfig(uri=bucket, s3_inventory=place))


# List files


def test_a_list_of_addresses_and_paths_gives_the_same_rows_as_listing(bucket: str, tmp_path: Path) -> None:
    lines = [
        "a b.dcm",
        f"{bucket}/xray/a+b.dcm",
        "",
        "100%25 sure.dcm",
        "Müller/日本.dcm\r",
        ".hidden",
        f"{bucket}/ct/1.dcm",
    ]
    (tmp_path / "list.txt").write_bytes("\n".join(lines).encode())
    found = list_archive(ArchiveConfig(uri=f"{bucket}/xray", list_file=str(tmp_path / "list.txt")))
    assert same(found, list_archive(ArchiveConfig(uri=f"{bucket}/xray")))
    assert found.excluded == 2


def test_a_local_list_knows_one_spelling_of_a_file(tmp_path: Path) -> None:
    root = tmp_path / "a root"
    odd = os.fsdecode(b"M\xfcller.dcm")
    for name in ("a+b 100%.dcm", "c/d.dcm", odd):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    odd_uri = f"file://{str(root).replace(' ', '%20')}/M%FCller.dcm"
    lines = [
        "./a+b 100%.dcm",
        "c/../c/d.dcm",
        f"file://{str(root).replace(' ', '%20')}/c/d.dcm",
        str(root / "c/d.dcm"),
        odd_uri,
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = list_archive(ArchiveConfig(uri=str(root), list_file=str(tmp_path / "list.txt"), include=("**",)))
    listed = list_archive(ArchiveConfig(uri=str(root)))
    assert found.duplicates == 2
    assert set(found.objects["image_id"].to_pylist()) <= set(listed.objects["image_id"].to_pylist())
    assert found.objects.num_rows == listed.objects.num_rows


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
def test_versions_in_a_list_spare_asking(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("s3://b/x/a b", '"e1"', 5, "note"),
        ("s3://b/x/c", "", None, ""),
        ("", "", None, ""),
        ("s3://b/x/n", "e3", None, 7),
    ]
    place = tmp_path / f"list.{form}"
    if form == "parquet":
        columns = zip(*rows, strict=True)
        uris, etags, sizes, _ = columns
        pq.write_table(
            pa.table({"etag": pa.array(etags), "uri": pa.array(uris), "size": pa.array(sizes, pa.int64())}), place
        )
    else:
        text = "uri,etag,size,remark\n" + "".join(f'{u},"{e.strip(chr(34))}",{s or ""},{r}\n' for u, e, s, r in rows)
        place.write_bytes(gzip.compress(text.encode()) if form == "csv.gz" else text.encode())
    asked: list[str] = []

    def stat(uri: str) -> listing.ObjectInfo:
        asked.append(uri)
        return listing.ObjectInfo(uri, "", 9, "asked", 0)

    monkeypatch.setattr("medvision_ray.archive.list_file.stat_object", stat)
    found = list_archive(ArchiveConfig(uri="s3://b/x", list_file=str(place)))
    assert sorted(asked) == ["s3://b/x/c", "s3://b/x/n"]
    assert found.objects.select(["uri", "etag", "size"]).to_pylist() == [
        {"uri": "s3://b/x/a b", "etag": "e1", "size": 5},
        {"uri": "s3://b/x/c", "etag": "asked", "size": 9},
        {"uri": "s3://b/x/n", "etag": "asked", "size": 9},
    ]


def test_a_listed_object_that_is_not_there_keeps_a_row(store: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(store, "here"), b"1")
    (tmp_path / "list").write_text("here\ngone\n")
    found = list_archive(ArchiveConfig(uri=store, list_file=str(tmp_path / "list")))
    assert [(row["uri"].rsplit("/", 1)[1], bool(row["etag"])) for row in found.objects.to_pylist()] == [
        ("gone", False),
        ("here", True),
    ]


def test_a_store_that_cannot_be_asked_fails_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text("a\n")

    def fail(uri: str) -> listing.ObjectInfo:
        raise StorageError("no", transient=True)

    monkeypatch.setattr("medvision_ray.archive.list_file.stat_object", fail)
    with pytest.raises(StorageError):
        list_archive(ArchiveConfig(uri=str(tmp_path), list_file=str(tmp_path / "list")))


def test_an_object_listed_twice_is_one_row_and_counted(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "list.txt").write_text("b\na\nb\nb\n")
    found = list_archive(ArchiveConfig(uri=str(tmp_path), list_file=str(tmp_path / "list.txt")))
    assert [uri.rsplit("/", 1)[1] for uri in found.objects["uri"].to_pylist()] == ["a", "b"]
    assert found.duplicates == 2


def test_only_wanted_objects_of_a_list_are_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text("a/1\nb/1\na/.x\ns3://other/1\n")
    asked: list[str] = []

    def stat(uri: str) -> listing.ObjectInfo:
        asked.append(uri)
        return listing.ObjectInfo(uri, "", 1, "e")

    monkeypatch.setattr("medvision_ray.archive.list_file.stat_object", stat)
    found = list_archive(ArchiveConfig(uri=str(tmp_path), list_file=str(tmp_path / "list"), prefix=("a",)))
    assert asked == [str(tmp_path / "a/1")]
    assert found.excluded == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", b"path,etag\na,b\n", "column `uri`"),
        ("x.csv", b"uri,size\na,big\n", "cannot be read so"),
        ("x.csv", b"", "cannot be read so"),
        ("x.csv.gz", gzip.compress(b"uri\na\n" * 9, mtime=0)[:-9], "cannot be read so"),
        ("x.parquet", b"PAR1 no", "cannot be read so"),
        ("x.txt", b"a\nM\xfcller\n", "line 2"),
        ("x.txt", b"https://host/a\n", "s3://"),
        ("x.txt", b"s3://elsewhere/a\n/elsewhere\n", "none of its 2 lies there"),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        list_archive(ArchiveConfig(uri=str(tmp_path / "root"), list_file=str(tmp_path / name)))


def test_an_empty_list_is_an_empty_archive(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n")
    assert list_archive(ArchiveConfig(uri=str(tmp_path), list_file=str(tmp_path / "list"))).objects.num_rows == 0


# Prefix and since


def test_prefixes_take_what_lies_below_them_once(store: str) -> None:
    for name in ("2026/11/a", "2026/12/b", "2026/1", "20261/x", "ct/1", "mr/1"):
        storage.write_bytes(storage.join(store, name), b"1")
    found = list_archive(ArchiveConfig(uri=store, prefix=("2026/11", "ct/", "2026"), exclude=("ct/*",)))
    root = storage.absolute(store)
    assert [uri.removeprefix(f"{root}/") for uri in found.objects["uri"].to_pylist()] == [
        "2026/1",
        "2026/11/a",
        "2026/12/b",
    ]
    assert found.excluded == 1


def test_patterns_match_the_path_below_uri_under_a_prefix_too(store: str) -> None:
    storage.write_bytes(storage.join(store, "a/b/x.dcm"), b"1")
    assert list_archive(ArchiveConfig(uri=store, prefix=("a/b",), include=("a/b/*.dcm",))).objects.num_rows == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_prefix_and_since_choose_from_an_inventory_too(bucket: str, tmp_path: Path, kind: str) -> None:
    rows = rows_of(bucket, ("xray/a b.dcm", "xray/a+b.dcm", "ct/1.dcm"))
    rows[0]["LastModifiedDate"] = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    rows[1]["LastModifiedDate"] = datetime(2026, 1, 1, 11, 59, 59, tzinfo=timezone.utc)
    place = manifest_of(rows, kind, str(tmp_path))
    found = list_archive(
        ArchiveConfig(uri=bucket, s3_inventory=place, prefix=("xray",), since="2026-01-01T13:00:00+01:00")
    )
    assert found.objects["uri"].to_pylist() == [f"{bucket}/xray/a b.dcm"]
    assert (found.older, found.excluded) == (1, 0)


def test_since_counts_what_it_leaves_out(tmp_path: Path) -> None:
    now = datetime.now(timezone.utc)
    for name, age in (("new", 1), ("old", 40), ("older", 400)):
        (tmp_path / name).write_bytes(b"1")
        moment = (now - timedelta(hours=age)).timestamp()
        os.utime(tmp_path / name, (moment, moment))

    def names(since: str) -> tuple[list[str], int]:
        found = list_archive(ArchiveConfig(uri=str(tmp_path), since=since))
        return [uri.rsplit("/", 1)[1] for uri in found.objects["uri"].to_pylist()], found.older

    assert names("36h") == (["new"], 2)
    assert names("2d") == (["new", "old"], 1)
    assert names((now - timedelta(hours=2)).isoformat()) == (["new"], 2)
    assert names("2020-01-01") == (["new", "old", "older"], 0)


def test_since_works_on_live_s3(bucket: str) -> None:
    assert list_archive(ArchiveConfig(uri=f"{bucket}/ct", since="1h")).objects.num_rows == 1
    assert list_archive(ArchiveConfig(uri=f"{bucket}/ct", since="2999-01-01")).older == 1


def test_an_object_without_time_is_kept(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,etag,size\na,e,1\n")
    found = list_archive(ArchiveConfig(uri=str(tmp_path), list_file=str(tmp_path / "list.csv"), since="1h"))
    assert (found.objects.num_rows, found.older) == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "s3://b", "s3_inventory": "m.json", "list_file": "l.txt"}, "give one of them"),
        ({"uri": "/data", "s3_inventory": "m.json"}, "must be s3://"),
        ({"uri": "/data", "since": "yesterday"}, "`since`"),
        ({"uri": "/data", "since": "2026-13-01"}, "`since`"),
        ({"uri": "/data", "prefix": ("/a",)}, "`prefix`"),
        ({"uri": "/data", "prefix": ("a/../b",)}, "`prefix`"),
        ({"uri": "/data", "prefix": ("",)}, "`prefix`"),
        ({"uri": "/data", "prefix": ("s3://b/a",)}, "`prefix`"),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArchiveConfig(**options)
