"""Publishing a run: the first try decides what the run is, later tries change nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import Inventory, list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.config import ArchiveConfig, DecodeConfig, ScoringConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import MedVisionError
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.publish import is_publishing, publish_rows
from medvision_ray.scoring.rows import working_schema
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.summary import RunIdentity
from medvision_ray.scoring.worker import ScoringWorker


@pytest.fixture(scope="module")
def inventory(phantom: PhantomArchive) -> Inventory:
    return list_archive(ArchiveConfig(uri=phantom.night_1))


@pytest.fixture(scope="module")
def rows(bundle: Bundle, inventory: Inventory, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = str(tmp_path_factory.mktemp("run"))
    scoring = ScoringConfig(precision="float32")
    settings = WorkerSettings(bundle.uri, folder, scoring, DecodeConfig(), Pseudonymiser(b"k" * 32))
    answer = ScoringWorker(settings)(inventory.objects)
    assert answer["rows"].to_pylist() == [inventory.objects.num_rows]
    found = CommittedRows(folder).dataset(working_schema(bundle.classes)).to_table()
    assert isinstance(found, pa.Table)
    return found


def _identity(bundle: Bundle, run_key: str = "run-1") -> RunIdentity:
    return RunIdentity(run_key, "score", bundle.model_id, "the archive", datetime.now(timezone.utc))


def _attempt(folder: Path, number: int, rows: pa.Table) -> None:
    """What actors leave: a file of rows a block."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / "rows" / f"block-{number}.parquet")


def _published(output: Path) -> list[int]:
    found: list[int] = []
    for name in ("predictions", "failures"):
        table = tables.read(str(output), name, ["image_id"])
        found += table["image_id"].to_pylist() if table is not None else []
    return sorted(found)


def test_rows_that_come_after_the_first_try_wait_for_the_next_run(
    bundle: Bundle, inventory: Inventory, rows: pa.Table, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run-1"
    _attempt(folder, 1, rows.slice(0, 10))
    assert not is_publishing(str(folder))
    first = publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(folder), inventory, may_miss=True)
    assert is_publishing(str(folder))
    _attempt(folder, 2, rows.slice(10))
    again = publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(folder), inventory)
    assert again == first
    assert first.scored + first.failed == 10
    assert first.not_scored == inventory.objects.num_rows - 10
    assert _published(tmp_path) == sorted(rows["image_id"].to_pylist()[:10])


def test_block_that_was_done_twice_is_published_once(
    bundle: Bundle, inventory: Inventory, rows: pa.Table, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run-1"
    _attempt(folder, 1, rows)
    _attempt(folder, 2, rows.slice(3, 9))
    publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(folder), inventory)
    assert _published(tmp_path) == sorted(rows["image_id"].to_pylist())


def test_objects_without_a_row_stop_publishing(
    bundle: Bundle, inventory: Inventory, rows: pa.Table, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run-1"
    _attempt(folder, 1, rows.slice(1))
    with pytest.raises(MedVisionError, match="have none"):
        publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(folder), inventory)
    assert _published(tmp_path) == []
    assert not is_publishing(str(folder))


def test_objects_that_another_run_committed_meanwhile_are_left_out(
    bundle: Bundle, inventory: Inventory, rows: pa.Table, tmp_path: Path
) -> None:
    part = replace(inventory, objects=inventory.objects.slice(0, 7))
    one, two = tmp_path / "runs" / "run-1", tmp_path / "runs" / "run-2"
    _attempt(one, 1, rows.slice(0, 7))
    _attempt(two, 1, rows)
    publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(one), part)
    second = publish_rows(str(tmp_path), _identity(bundle, "run-2"), bundle.classes, str(two), inventory)
    assert second.already_done == 7
    assert second.listed == second.already_done + second.scored + second.failed == inventory.objects.num_rows
    assert _published(tmp_path) == sorted(rows["image_id"].to_pylist())


def test_row_of_no_object_stops_publishing(
    bundle: Bundle, inventory: Inventory, rows: pa.Table, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run-1"
    _attempt(folder, 1, rows)
    part = replace(inventory, objects=inventory.objects.slice(0, 7))
    with pytest.raises(MedVisionError, match="belong to no object"):
        publish_rows(str(tmp_path), _identity(bundle), bundle.classes, str(folder), part)
    assert not storage.exists(str(tmp_path / "tables" / "predictions"))
