"""Compaction, vacuum and history: rows stay, files go only when nothing needs them, readers see whole commits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from medvision_ray import storage, tables
from medvision_ray.cli import main
from medvision_ray.errors import UsageError
from medvision_ray.tables import delta, upkeep


def _night(output: str, run: str, ids: list[int], name: str = "failures") -> bool:
    schema = tables.FAILURES if name == "failures" else tables.predictions_schema(("a",))
    day = date(2026, 1, 1)
    rows = [{"run_key": run, "run_date": day, "model_id": "m's", "image_id": i, "uri": f"u{i}"} for i in ids]
    return tables.commit(output, name, schema, pa.Table.from_pylist(rows, schema=schema).to_batches(), run)


def _ids(output: str, name: str = "failures") -> list[int]:
    rows = tables.read(output, name, ["image_id"])
    assert rows is not None
    return sorted(rows["image_id"].to_pylist())


def _files(output: str, name: str = "failures") -> int:
    return len(delta.open_table(output, name).file_uris())


@pytest.mark.parametrize("name", ["failures", "predictions"])
def test_tidy_compacts_when_small_files_have_gathered_and_not_before(tmp_path: Path, name: str) -> None:
    store = str(tmp_path / "a store")
    for night in range(15):
        _night(store, f"r{night}", [night], name)
    assert tables.tidy(store) == [tables.Tidied(name, 15, 15, False)]
    _night(store, "r15", [15], name)
    assert tables.tidy(store) == [tables.Tidied(name, 16, 1, False)]
    assert _ids(store, name) == list(range(16))
    assert all(tables.is_committed(store, name, f"r{night}") for night in range(16))
    assert not _night(store, "r3", [3], name)


def test_tidy_leaves_quiet_partitions_as_they_are(tmp_path: Path) -> None:
    schema = tables.predictions_schema(("a",))
    for number, day in enumerate([1, 2, 3] * 2 + [4] * 16):
        row = {"run_key": f"r{number}", "model_id": "m", "run_date": date(2026, 1, day), "image_id": number}
        rows = pa.Table.from_pylist([row], schema=schema).to_batches()
        tables.commit(str(tmp_path), "predictions", schema, rows, f"r{number}")
    before = set(delta.open_table(str(tmp_path), "predictions").file_uris())
    tables.tidy(str(tmp_path))
    after = set(delta.open_table(str(tmp_path), "predictions").file_uris())
    assert len(before & after) == 6
    assert len(after) == 7


def test_tidy_checkpoints_a_long_log_and_the_runs_stay_known(tmp_path: Path) -> None:
    output = str(tmp_path)
    for night in range(20):
        _night(output, f"r{night}", [night])
    tables.tidy(output)
    log = Path(tables.address(output, "failures")) / "_delta_log"
    assert json.loads((log / "_last_checkpoint").read_text())["version"] == 21
    for old in log.glob("*[0-9].json"):  # the checkpoint alone holds all that is needed
        if int(old.stem) < 21:
            old.unlink()
    assert _ids(output) == list(range(20))
    assert not _night(output, "r0", [0])


def test_tidy_gives_way_to_another_commit(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_SMALL_FILES", 4)
    for night in range(4):
        _night(store, f"r{night}", [night])
    inner = upkeep._crowded

    def replaced_meanwhile(*arguments: object) -> object:
        again = pa.Table.from_pylist([], schema=tables.FAILURES).to_batches()
        tables.commit(store, "failures", tables.FAILURES, again, "retry", replacing=("m's", np.array([3])))
        return inner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(upkeep, "_crowded", replaced_meanwhile)
    (tidied,) = tables.tidy(store)
    assert tidied.skipped is not None
    assert _ids(store) == [0, 1, 2]


def test_tidy_does_not_raise_when_the_store_is_gone(tmp_path: Path) -> None:
    _night(str(tmp_path), "r0", [0])
    log = Path(tables.address(str(tmp_path), "failures")) / "_delta_log"
    next(log.glob("*00.json")).write_text("not a log")
    assert [item.skipped is not None for item in tables.tidy(str(tmp_path))] == [True]


def test_a_reader_sees_whole_commits_only(tmp_path: Path) -> None:
    """Each commit adds ten rows; a reader beside commits, retries and compaction never counts a part of one."""
    output = str(tmp_path)
    _night(output, "r", list(range(10)))
    seen: list[list[int]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def reads() -> None:
        try:
            while not done.is_set():
                seen.append(_ids(output))
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=reads)
    reader.start()
    for night in range(1, 25):
        ids = list(range(10 * night, 10 * night + 10))
        _night(output, f"r{night}", ids)
        if night % 6 == 0:
            rows = pa.Table.from_pylist([], schema=tables.FAILURES).to_batches()
            tables.commit(output, "failures", tables.FAILURES, rows, f"x{night}", replacing=("m's", np.array(ids)))
            tables.compact(output)
    deadline = time.monotonic() + 60
    while (not seen or seen[-1][-1] < 239 - 10) and not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    reader.join(60)
    assert not errors
    assert len(seen) > 1
    for ids in seen:
        assert len(set(ids)) == len(ids)
        assert all(ids.count(number) == 1 for first in ids if first % 10 == 0 for number in range(first, first + 10))
        assert len(ids) == 10 * sum(number % 10 == 0 for number in ids)


KILLED = """
import sys
from medvision_ray import tables
sys.stdout.write("ready\\n"); sys.stdout.flush()
while True:
    tables.compact(sys.argv[1])
"""


def test_compaction_that_is_killed_changes_no_row(tmp_path: Path) -> None:
    output = str(tmp_path)
    generator = np.random.default_rng(0)
    total = 0
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", KILLED, output], stdout=subprocess.PIPE, text=True)
        for _ in range(8):
            _night(output, f"r{total}", [total])
            total += 1
        assert child.stdout is not None
        child.stdout.readline()
        _night(output, f"r{total}", [total])
        total += 1
        time.sleep(float(generator.uniform(0, 0.3)))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert _ids(output) == list(range(total))
    tables.compact(output)
    assert _ids(output) == list(range(total))
    assert _files(output) == 1


# Vacuum


def _age(output: str, hours: float) -> None:
    old = time.time() - hours * 3600
    for path in Path(tables.address(output, "failures")).glob("*.parquet"):
        os.utime(path, (old, old))


def test_vacuum_shows_first_and_deletes_on_demand(store: str) -> None:
    for night in range(3):
        _night(store, f"r{night}", [night])
    tables.compact(store)
    (shown,) = tables.vacuum(store, retain_hours=0, force=True)
    assert len(shown.files) == 3
    assert not shown.deleted
    assert len(tables.vacuum(store, retain_hours=0, force=True)[0].files) == 3  # nothing went
    (deleted,) = tables.vacuum(store, retain_hours=0, force=True, delete=True)
    assert deleted.files == shown.files
    assert tables.vacuum(store, retain_hours=0, force=True)[0].files == []
    assert _ids(store) == [0, 1, 2]


def test_vacuum_keeps_what_recent_versions_need_and_takes_what_a_killed_writer_left(tmp_path: Path) -> None:
    output = str(tmp_path)
    for night in range(3):
        _night(output, f"r{night}", [night])
    tables.compact(output)
    _age(output, 30)
    orphan = Path(tables.address(output, "failures")) / "part-left-by-a-killed-writer.parquet"
    orphan.write_bytes(b"x")
    fresh = orphan.with_name("part-of-a-writer-at-work.parquet")
    fresh.write_bytes(b"x")
    os.utime(orphan, (0, 0))
    (found,) = tables.vacuum(output, delete=True)
    assert found.files == [orphan.name]
    assert fresh.exists()
    assert not orphan.exists()
    assert delta.open_table(output, "failures").version() > 4
    assert _ids(output) == [0, 1, 2]


def test_vacuum_refuses_a_short_retention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _night(str(tmp_path), "r0", [0])
    with pytest.raises(UsageError, match="at least 24"):
        tables.vacuum(str(tmp_path), retain_hours=23)
    command = ["tables", "vacuum", "--output", str(tmp_path), "--retain-hours", "1"]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


# The command line


@pytest.mark.parametrize("action", ["compact", "vacuum", "history", "verify"])
def test_an_output_without_tables_is_refused(tmp_path: Path, action: str) -> None:
    assert main(["tables", action, "--output", str(tmp_path)]) == 2


def test_history_names_runs_rows_and_files(store: str) -> None:
    """In a process of its own: deltalake holds the interpreter's lock while it asks the store, here a thread."""
    _night(store, "night-1", [1, 2, 3])
    again = pa.Table.from_pylist([], schema=tables.FAILURES).to_batches()
    tables.commit(store, "failures", tables.FAILURES, again, "retry-1", replacing=("m's", np.array([2])))
    command = [sys.executable, "-m", "medvision_ray.cli", "tables", "history", "--output", store, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    commits = json.loads(done.stdout)["commits"]
    facts = [(c["version"], c["run_key"], c["rows_added"], c["rows_removed"], c["files_added"]) for c in commits]
    assert facts == [(2, "retry-1", 0, 1, 1), (1, "night-1", 3, None, 1), (0, None, None, None, None)]
    assert commits[0]["time"].startswith(str(date.today().year))


def test_compact_says_what_it_did(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for night in range(3):
        _night(store, f"r{night}", [night])
    assert main(["tables", "compact", "--output", store]) == 0
    assert capsys.readouterr().out == "failures: 3 files before, 1 after\n"
    assert storage.exists(storage.join(tables.address(store, "failures"), "_delta_log", "_last_checkpoint"))
