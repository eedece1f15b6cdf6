"""An archive cut into lists, one a part: together they are the archive, and each is what its part would have listed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from medvision_ray.archive import divide as module
from medvision_ray.archive.divide import MOST_LISTS, divide
from medvision_ray.archive.inventory import list_archive
from medvision_ray.cli import main
from medvision_ray.config import ArchiveConfig, PrivacyConfig
from medvision_ray.errors import StorageError, UsageError
from medvision_ray.privacy import Pseudonymiser

HASHING = Pseudonymiser(b"k" * 32, PrivacyConfig(uri="hash"))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    for number in range(40):
        place = folder / f"ward-{number % 3}" / f"{number:02d} é.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(number))
    (folder / ".hidden").write_bytes(b"left out")
    return folder


@pytest.mark.parametrize("names", [None, HASHING])
def test_each_list_is_what_its_part_lists(
    archive: Path, tmp_path: Path, names: Pseudonymiser | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_HELD", 7)  # several row groups
    whole = list_archive(ArchiveConfig(uri=str(archive)), names)
    done = divide(ArchiveConfig(uri=str(archive)), 3, str(tmp_path / "lists"), names)
    assert (sum(done.objects), done.bytes, done.excluded, done.older) == (40, sum(range(40)), 1, 0)
    found = []
    for number, file in enumerate(done.files, 1):
        part = f"{number}/3"
        listed = list_archive(ArchiveConfig(uri=str(archive), part=part), names).objects
        read = list_archive(ArchiveConfig(uri=str(archive), list_file=file, part=part), names).objects
        assert read.equals(listed)
        assert read.num_rows == done.objects[number - 1] > 0
        found += read["image_id"].to_pylist()
    assert sorted(found) == sorted(whole.objects["image_id"].to_pylist())


def test_an_empty_archive_gives_empty_lists(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    done = divide(ArchiveConfig(uri=str(tmp_path / "archive")), 2, str(tmp_path / "lists"))
    assert done.objects == (0, 0)
    assert list_archive(ArchiveConfig(uri=str(tmp_path / "archive"), list_file=done.files[1])).objects.num_rows == 0


def test_an_object_named_twice_stays_for_the_run_to_notice(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ward-0/00 é.png\nward-0/00 é.png\n")
    done = divide(ArchiveConfig(uri=str(archive), list_file=str(tmp_path / "list.txt")), 1, str(tmp_path / "lists"))
    assert done.objects == (2,)
    found = list_archive(ArchiveConfig(uri=str(archive), list_file=done.files[0]))
    assert (found.objects.num_rows, found.duplicates) == (1, 1)


def test_a_listing_that_fails_leaves_no_list(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = module.identified_batches

    def broken(*arguments: object) -> object:
        yield from batches(*arguments)  # type: ignore[arg-type]
        raise StorageError("the last page could not be had", code="unavailable")

    monkeypatch.setattr(module, "identified_batches", broken)
    with pytest.raises(StorageError, match="last page"):
        divide(ArchiveConfig(uri=str(archive)), 2, str(tmp_path / "lists"))
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize("parts", [0, MOST_LISTS + 1])
def test_a_number_of_parts_that_cannot_be_made_is_refused(archive: Path, tmp_path: Path, parts: int) -> None:
    with pytest.raises(UsageError, match=f"Expected 1 to {MOST_LISTS} parts, but got {parts}"):
        divide(ArchiveConfig(uri=str(archive)), parts, str(tmp_path / "lists"))


@pytest.mark.parametrize("option", [{"part": "1/2"}, {"limit": 3}, {"volumes": True}])
def test_what_cuts_the_archive_otherwise_is_refused(archive: Path, tmp_path: Path, option: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Expected the whole archive"):
        divide(ArchiveConfig(uri=str(archive), **option), 2, str(tmp_path / "lists"))  # type: ignore[arg-type]


def test_the_command_tells_what_it_wrote(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inventory", "--json", "--set", f"archive.uri={archive}", "--split", "2"]
    assert main(command) == 2
    assert "--to FOLDER" in json.loads(capsys.readouterr().out)["error"]
    assert main([*command, "--to", str(tmp_path / "lists")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parts"] == len(told["lists"]) == 2
    assert [pq.read_table(item["file"]).num_rows for item in told["lists"]] == [
        item["objects"] for item in told["lists"]
    ]
    assert (told["smallest"] + told["largest"], told["objects"]) == (40, 40)
