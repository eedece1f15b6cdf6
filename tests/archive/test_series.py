"""Slices of a series as one object of the inventory: what is grouped, how it is named, what is read for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_file

from medvision_ray import storage
from medvision_ray.archive import series as series_module
from medvision_ray.archive.inventory import VOLUME_SCHEMA, freeze, image_id, list_archive, read_frozen
from medvision_ray.config import ArchiveConfig, PrivacyConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.series_header import MoreNeeded, series_of
from medvision_ray.privacy import Pseudonymiser

Series = Callable[..., list[bytes]]


def changed(data: bytes, **elements: Any) -> bytes:
    dataset = pydicom.dcmread(BytesIO(data))
    for name, value in elements.items():
        setattr(dataset, name, value)
    out = BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def listed(place: str, **more: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = list_archive(ArchiveConfig(uri=place, volumes=True, **more)).objects.to_pylist()
    return rows


def fill(place: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(f"{place}/{name}", data)


def test_the_slices_of_a_series_are_one_object(store: str, phantom_series: Series) -> None:
    one, two = phantom_series(4, series=0), phantom_series(3, series=1)
    files = {f"b/{k}.dcm": data for k, data in enumerate(one)} | {f"{'ac'[k % 2]}/{k}": d for k, d in enumerate(two)}
    fill(store, {**files, "a/notes.txt": b"no image"})
    rows = listed(store)
    root = storage.absolute(store)
    assert [row["uri"] for row in rows] == [f"{root}/a/0#series", f"{root}/a/notes.txt", f"{root}/b/0.dcm#series"]
    assert [len(row["members"] or ()) for row in rows] == [3, 0, 4]
    assert [part["uri"] for part in rows[0]["members"]] == [f"{root}/a/0", f"{root}/a/2", f"{root}/c/1"]
    assert rows[2]["size"] == sum(map(len, one))
    assert [row["image_id"] for row in rows] == [image_id(row["uri"], row["etag"]) for row in rows]
    plain = list_archive(ArchiveConfig(uri=store)).objects.to_pylist()
    assert {part["etag"] for row in rows for part in row["members"] or ()} < {row["etag"] for row in plain}
    assert rows == listed(store)  # the same the next time


def test_another_slice_makes_another_object(tmp_path: Path, phantom_series: Series) -> None:
    parts = phantom_series(4)
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(parts[:3])})
    [before] = listed(str(tmp_path))
    fill(str(tmp_path), {"3.dcm": parts[3]})
    [after] = listed(str(tmp_path))
    assert before["uri"] == after["uri"]
    assert before["image_id"] != after["image_id"]


def test_no_identifier_is_in_the_inventory(tmp_path: Path, phantom_series: Series) -> None:
    parts = phantom_series(3)
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(parts)})
    dataset = pydicom.dcmread(BytesIO(parts[0]))
    text = str(listed(str(tmp_path)))
    for value in (dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.PatientID, str(dataset.PatientName)):
        assert value not in text


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]},
        {"NumberOfFrames": 2},
        {"SeriesInstanceUID": ""},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1"},
        {"SeriesInstanceUID": "2.25.7"},
        {"StudyInstanceUID": "2.25.7"},
    ],
)
def test_what_is_no_slice_of_it_stays_by_itself(
    tmp_path: Path, phantom_series: Series, elements: dict[str, Any]
) -> None:
    parts = phantom_series(4)
    parts[3] = changed(parts[3], **elements)
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(parts)})
    rows = listed(str(tmp_path))
    assert [(row["uri"], row["members"] and len(row["members"])) for row in rows] == [
        (f"{tmp_path}/0.dcm#series", 3),
        (f"{tmp_path}/3.dcm", None),
    ]


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 200, bytes(128) + b"DICM", bytes(128) + b"DICM" + b"\xff" * 300])
def test_damaged_headers_stay_by_themselves(data: bytes) -> None:
    assert series_of(data, whole=True) is None


def test_headers_agree_with_pydicom_on_real_files(corpora_dir: Path) -> None:
    digests: dict[str, bytes] = {}
    for path in sorted(corpora_dir.rglob("*")):
        data = path.read_bytes() if path.is_file() and path.suffix not in (".gz", ".nii", ".jsonl") else b""
        found = series_of(data, whole=True)
        if found is None:
            continue
        dataset = pydicom.dcmread(BytesIO(data), stop_before_pixels=True, force=True)
        assert dataset.Modality in ("CT", "MR", "PT"), path
        assert digests.setdefault(f"{dataset.StudyInstanceUID} {dataset.SeriesInstanceUID}", found) == found, path
    assert len(digests) > 30
    assert len(set(digests.values())) == len(digests)


def test_a_header_is_read_only_as_far_as_it_goes(
    tmp_path: Path, phantom_series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = phantom_series(3, size=256)  # 128 kB of pixels each
    parts[1] = with_private_block(parts[1], 200_000)
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(parts)})
    asked: list[tuple[str, int]] = []

    def read_start(uri: str, count: int, *, etag: str | None = None) -> bytes:
        asked.append((uri[-5:], count))
        return storage_read_start(uri, count, etag=etag)

    storage_read_start = storage.read_start
    monkeypatch.setattr(storage, "read_start", read_start)
    [row] = listed(str(tmp_path))
    assert len(row["members"]) == 3
    assert sorted(asked) == [("0.dcm", 65536), ("1.dcm", 65536), ("1.dcm", 524288), ("2.dcm", 65536)]


def with_private_block(data: bytes, size: int) -> bytes:
    dataset = pydicom.dcmread(BytesIO(data))
    dataset.private_block(0x0019, "MEDVISION", create=True).add_new(1, "OB", bytes(size))
    out = BytesIO()
    dataset.save_as(out)
    return out.getvalue()


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"]
)
def test_any_beginning_gives_the_same_answer_or_asks_for_more(name: str) -> None:
    data = Path(get_testdata_file(name)).read_bytes()
    expected = series_of(data, whole=True)
    assert expected is not None
    answers = []
    for count in range(140, min(len(data), 4000), 7):
        with contextlib.suppress(MoreNeeded):
            answers.append(series_of(data[:count], whole=False))
    assert set(answers) == {expected}


def test_an_object_that_cannot_be_read_stays_by_itself(
    tmp_path: Path, phantom_series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(phantom_series(3))})

    def read_start(uri: str, count: int, *, etag: str | None = None) -> bytes:
        if uri.endswith("2.dcm"):
            raise StorageError("gone", code=code)
        return storage_read_start(uri, count, etag=etag)

    storage_read_start = storage.read_start
    monkeypatch.setattr(series_module.storage, "read_start", read_start)
    code = "not_found"
    assert [row["members"] is None for row in listed(str(tmp_path))] == [False, True]
    code = "credentials"
    with pytest.raises(StorageError):
        listed(str(tmp_path))


def test_members_are_frozen_with_the_inventory(tmp_path: Path, phantom_series: Series) -> None:
    fill(str(tmp_path / "in"), {f"{k}.dcm": data for k, data in enumerate(phantom_series(3))})
    found = list_archive(ArchiveConfig(uri=str(tmp_path / "in"), volumes=True))
    place = str(tmp_path / "out" / "inventory.parquet")
    assert freeze(found, place, 8) is found
    again = read_frozen(place)
    assert again.objects.schema == VOLUME_SCHEMA
    assert again.objects.equals(found.objects)
    assert (again.volumes, found.volumes) == (1, 1)


def test_ids_are_of_pseudonyms_where_addresses_are(tmp_path: Path, phantom_series: Series) -> None:
    """An id that is a hash of the address without a key would let anybody try addresses, of series too."""
    fill(str(tmp_path), {f"{k}.dcm": data for k, data in enumerate(phantom_series(3))} | {"alone.png": b"x"})
    config = ArchiveConfig(uri=str(tmp_path), volumes=True)
    names = Pseudonymiser(b"0123456789abcdef0123456789abcdef", PrivacyConfig(uri="hash"))
    rows = list_archive(config, names).objects.to_pylist()
    assert [row["uri"] for row in rows] == [row["uri"] for row in list_archive(config).objects.to_pylist()]
    assert [row["members"] is not None for row in rows] == [True, False]
    assert [row["image_id"] for row in rows] == [image_id(names.address(row["uri"]), row["etag"]) for row in rows]


def test_an_empty_archive_has_no_volumes(tmp_path: Path) -> None:
    found = list_archive(ArchiveConfig(uri=str(tmp_path), volumes=True))
    assert (found.objects.num_rows, found.objects.schema, found.volumes) == (0, VOLUME_SCHEMA, 0)


def test_since_would_cut_a_series() -> None:
    with pytest.raises(ValueError, match="would cut a series"):
        ArchiveConfig(uri="x", volumes=True, since="7d")
