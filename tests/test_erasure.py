"""A patient's rows go, of all models and nights; the tables still prove themselves, and the bytes go with vacuum."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import image_id
from medvision_ray.archive.series import SUFFIX
from medvision_ray.cli import main
from medvision_ray.config import PrivacyConfig
from medvision_ray.errors import MedVisionError, UsageError
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.scoring.erasure import Erasure, erase_patients
from medvision_ray.scoring.lease import LeaseHeldError, lease
from medvision_ray.tables import delta, erasure
from medvision_ray.verification import verify

KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f0c0ffee11"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", KEY)
    found = load_pseudonymiser(PrivacyConfig())
    return found.patient("4711"), found.patient("0815", "HOSPITAL")


def _row(number: int, run: str, model: str, etag: str) -> dict[str, Any]:
    uri = f"/archive/{number}.dcm"
    about = {"run_key": run, "run_date": date(2026, 3, 1), "model_id": model}
    return {**about, "image_id": image_id(uri, etag), "uri": uri, "etag": etag}


def _publish(output: str, run: str, model: str, scored: dict[int, str], failed: list[int], *, etag: str = "1") -> None:
    schema = tables.predictions_schema(("a",))
    rows = [{**_row(n, run, model, etag), "patient_key": key, "p_a": 1.0} for n, key in scored.items()]
    tables.commit(output, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), run)
    rows = [{**_row(n, run, model, etag), "stage": "decode", "error_code": "truncated"} for n in failed]
    tables.commit(output, "failures", tables.FAILURES, pa.Table.from_pylist(rows, tables.FAILURES).to_batches(), run)
    about = {"run_key": run, "job": "score", "model_id": model, "already_done": 0, "retried": 0}
    row = {**about, "listed": len(scored) + len(failed), "scored": len(scored), "failed": len(failed)}
    tables.commit(output, "runs", tables.RUNS, pa.Table.from_pylist([row], tables.RUNS).to_batches(), run)


@pytest.fixture
def output(store: str, keys: tuple[str, str]) -> str:
    """Objects 1 and 2 are of the first patient, 3 of the second; 2 failed with another model, 1 in an older version."""
    _fill(store, keys)
    return store


def _fill(store: str, keys: tuple[str, str]) -> None:
    one, two = keys
    _publish(store, "n1", "m", {1: one, 2: one, 3: two}, [4])
    _publish(store, "n2", "other", {1: one, 3: two}, [2])
    _publish(store, "n0", "m", {}, [1, 5], etag="0")
    assert verify(store).findings == []


def _ids(output: str, name: str) -> list[str]:
    found = tables.read(output, name, ["uri", "model_id"])
    assert found is not None
    return sorted(f"{row['uri'][-5]} {row['model_id']}" for row in found.to_pylist())


def _rows(done: Erasure) -> tuple[int, int]:
    return done.rows["predictions"], done.rows["failures"]


def test_a_look_changes_nothing(output: str, keys: tuple[str, str]) -> None:
    found = erase_patients(output, [keys[0]])
    assert (_rows(found), found.images, found.deleted) == ((3, 2), 2, False)
    assert len(_ids(output, "predictions")) == 5
    assert tables.erased_rows(output, "predictions", [("m", "n1")]) == {}


def test_every_row_of_the_patient_goes_and_the_tables_prove_themselves(output: str, keys: tuple[str, str]) -> None:
    done = erase_patients(output, [keys[0]], delete=True)
    assert _rows(done) == (3, 2)
    assert _ids(output, "predictions") == ["3 m", "3 other"]
    assert _ids(output, "failures") == ["4 m", "5 m"]
    assert verify(output).findings == []
    assert all(verify(output, run).findings == [] for run in ("n0", "n1", "n2"))
    again = erase_patients(output, [keys[0]], delete=True)
    assert (_rows(again), again.images) == ((0, 0), 0)
    assert verify(output).findings == []


def test_verify_still_finds_a_row_that_went_otherwise(output: str, keys: tuple[str, str]) -> None:
    erase_patients(output, [keys[0]], delete=True)
    delta.open_table(output, "predictions").delete("model_id = 'other'")
    assert {finding.check for finding in verify(output).findings} == {"scored_count"}


def test_a_second_patient_adds_to_what_the_first_took(output: str, keys: tuple[str, str]) -> None:
    runs = [("m", "n1"), ("other", "n2"), ("m", "n0")]
    for key in keys:
        erase_patients(output, [key], delete=True)
    assert tables.erased_rows(output, "predictions", runs) == {("m", "n1"): 3, ("other", "n2"): 2}
    assert tables.erased_rows(output, "failures", runs) == {("other", "n2"): 1, ("m", "n0"): 1}
    assert verify(output).findings == []
    tables.compact(output)
    tables.vacuum(output, retain_hours=0, delete=True, force=True)
    assert sum(tables.shorten_logs(output, retain_hours=0, delete=True).values()) > 8
    assert tables.erased_rows(output, "predictions", runs) == {("m", "n1"): 3, ("other", "n2"): 2}
    assert verify(output).findings == []


class _Killed(BaseException):
    """Like a kill: nothing on the way out catches it."""


@pytest.mark.parametrize("commit", range(5))
def test_killed_after_any_commit_the_tables_hold_and_the_same_call_goes_on(
    tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch, commit: int
) -> None:
    """Four commits: a table and a model each; the fifth kill comes after the last."""
    output = str(tmp_path)
    _fill(output, keys)
    seen = []

    def dies(*arguments: Any) -> int:
        if len(seen) == commit:
            raise _Killed
        seen.append(arguments)
        return true_erase(*arguments)

    true_erase = erasure._erase
    with monkeypatch.context() as broken:
        broken.setattr(erasure, "_erase", dies)
        if commit < 4:
            with pytest.raises(_Killed):
                erase_patients(output, [keys[0]], delete=True)
        else:
            erase_patients(output, [keys[0]], delete=True)
    assert len(seen) == min(commit, 4)
    assert verify(output).findings == []
    erase_patients(output, [keys[0]], delete=True)
    assert verify(output).findings == []
    assert (_ids(output, "predictions"), _ids(output, "failures")) == (["3 m", "3 other"], ["4 m", "5 m"])


_ERASING = """
import sys
from medvision_ray.scoring.erasure import erase_patients
print("begins", flush=True)
erase_patients(sys.argv[1], [sys.argv[2]], delete=True)
"""


def test_killed_by_the_system_at_some_moment(tmp_path: Path, keys: tuple[str, str]) -> None:
    output = str(tmp_path)
    _fill(output, keys)
    for milliseconds in (60, 250):
        command = [sys.executable, "-c", _ERASING, output, keys[0]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            time.sleep(milliseconds / 1000)
            os.kill(process.pid, signal.SIGKILL)
        assert verify(output).findings == []
    erase_patients(output, [keys[0]], delete=True)
    assert verify(output).findings == []
    assert (_ids(output, "predictions"), _ids(output, "failures")) == (["3 m", "3 other"], ["4 m", "5 m"])


def test_a_failure_that_nothing_leads_to_goes_by_its_address(output: str) -> None:
    assert _rows(erase_patients(output, [], ["/archive/4.dcm"], delete=True)) == (0, 1)
    assert "4 m" not in _ids(output, "failures")
    assert verify(output).findings == []


def test_a_folder_takes_what_lies_below_and_no_neighbour(store: str) -> None:
    schema = tables.predictions_schema(("a",))
    uris = ["/a/jane/1.png", "/a/jane/deep/2.png", "/a/jane2/3.png", f"/a/jane/4.dcm{SUFFIX}", f"/a/joe.dcm{SUFFIX}"]
    rows = [{**_row(0, "n1", "m", "1"), "uri": uri, "image_id": image_id(uri, "1")} for uri in uris]
    tables.commit(store, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), "n1")
    erase_patients(store, [], ["/a/jane/", "/a/joe.dcm"], delete=True)
    left = tables.read(store, "predictions", ["uri"])
    assert left is not None
    assert left["uri"].to_pylist() == ["/a/jane2/3.png"]


def test_another_patient_at_the_same_address_keeps_the_prediction(tmp_path: Path, keys: tuple[str, str]) -> None:
    """The object was replaced: its new version failed with one model and was scored with the other."""
    output = str(tmp_path)
    _publish(output, "n1", "m", {1: keys[0]}, [])
    _publish(output, "n2", "m", {}, [1], etag="2")
    _publish(output, "n3", "other", {1: keys[1]}, [], etag="2")
    assert _rows(erase_patients(output, [keys[0]], delete=True)) == (1, 1)
    assert _ids(output, "predictions") == ["1 other"]
    assert verify(output).findings == []


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder as text, Parquet unpacked."""
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            yield path, str(pq.ParquetFile(path).read().to_pylist()) + str(pq.read_metadata(path).to_dict())
        elif path.is_file():
            yield path, path.read_bytes().decode("latin-1")


def test_what_is_written_names_no_patient_and_the_bytes_go_with_vacuum(
    tmp_path: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path)
    _publish(output, "n1", "m", {1: keys[0], 3: keys[1]}, [4])
    before = {path for path, text in _texts(tmp_path) if keys[0] in text or "/archive/1.dcm" in text}
    assert {path.suffix for path in before} == {".parquet", ".json"}  # rows, and the log's smallest and largest values
    erase_patients(output, [keys[0]], delete=True)
    holding = {path for path, text in _texts(tmp_path) if keys[0] in text or "/archive/1.dcm" in text}
    assert holding == before
    options = ["--output", output, "--retain-hours", "0", "--force", "--log"]
    assert main(["tables", "vacuum", *options]) == 0
    assert "predictions: 2 files of the log would go" in capsys.readouterr().out
    assert main(["tables", "vacuum", *options, "--delete"]) == 0
    assert not {path for path, text in _texts(tmp_path) if keys[0] in text or "/archive/1.dcm" in text}
    assert verify(output).findings == []
    _publish(output, "n2", "m", {1: keys[0]}, [])
    assert verify(output).findings == []


def test_logs_younger_than_asked_for_stay(tmp_path: Path, keys: tuple[str, str]) -> None:
    output = str(tmp_path)
    _fill(output, keys)
    assert sum(tables.shorten_logs(output, retain_hours=24, delete=True).values()) == 0
    assert len(tables.history(output)) == 12
    log = tmp_path / "tables/predictions/_delta_log"
    for path in log.iterdir():
        os.utime(path, (0, time.time() - 48 * 3600))
    _publish(output, "n3", "m", {7: keys[0]}, [])
    assert tables.shorten_logs(output, retain_hours=24, delete=True)["predictions"] == 3  # before the checkpoint
    assert {path.name for path in log.glob("*.json")} == {f"{version:020d}.json" for version in (3, 4)}
    assert verify(output).findings == []


def test_the_command_line_makes_the_keys_out_of_patient_ids(
    output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("0815\tHOSPITAL\n\n0815\n"))
    assert main(["tables", "erase-patient", "--output", output, "--ids-from-stdin", "--delete"]) == 0
    shown = capsys.readouterr().out
    assert "predictions: 2 rows deleted" in shown
    assert "1 of the 2 patients have no row here" in shown
    assert "0815" not in shown
    assert _ids(output, "predictions") == ["1 m", "1 other", "2 m"]


def test_hashed_addresses_are_found_by_the_address_itself(
    tmp_path: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = load_pseudonymiser(PrivacyConfig(uri="hash"))
    schema, output = tables.FAILURES, str(tmp_path)
    hashed = [names.address(uri) for uri in ("/a/jane.png", f"/a/jane.png{SUFFIX}", "/a/joe.png")]
    rows = [{**_row(0, "n1", "m", "1"), "uri": uri, "image_id": image_id(uri, "1")} for uri in hashed]
    tables.commit(output, "failures", schema, pa.Table.from_pylist(rows, schema).to_batches(), "n1")
    assert main(["tables", "erase-patient", "--output", output, "--uri", "/a/jane.png", "--delete"]) == 0
    assert "Of 2 objects it is not known whether the archive still holds them" in capsys.readouterr().out
    left = tables.read(output, "failures", ["uri"])
    assert left is not None
    assert left["uri"].to_pylist() == hashed[2:]


def test_what_stays_or_comes_back_is_said(
    tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, archive = str(tmp_path / "out"), tmp_path / "archive"
    archive.mkdir()
    (archive / "1.dcm").write_bytes(b"still here")
    schema = tables.predictions_schema(("a",))
    uris = [str(archive / f"{number}.dcm") for number in (1, 2)]
    rows = [
        {**_row(0, "n1", "m", "1"), "uri": uri, "image_id": image_id(uri, "1"), "patient_key": keys[0]} for uri in uris
    ]
    tables.commit(output, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), "n1")
    storage.write_bytes(f"{output}/runs/score-1-00002/rows/1.parquet", b"rows to come")
    for path in ("reports/m-night.html", "training/m/out_of_fold.parquet", "training/m/metrics.jsonl"):
        storage.write_bytes(f"{output}/{path}", b"pictures or rows")
    assert main(["tables", "erase-patient", "--output", output, "--patient-key", keys[0]]) == 0
    shown = capsys.readouterr().out
    assert "1 of their 2 objects are still in the archive: the next run scores them again" in shown
    assert "Run score-1-00002 is not finished" in shown
    assert "2 files were made from rows" in shown
    assert "  reports/m-night.html\n  training/m/out_of_fold.parquet\n" in shown


def test_a_run_between_the_tables_is_finished_first(tmp_path: Path, keys: tuple[str, str]) -> None:
    output = str(tmp_path)
    _fill(output, keys)
    storage.write_bytes(f"{output}/runs/score-1-00002/publish.json", b"{}")
    with pytest.raises(MedVisionError, match="Finish it"):
        erase_patients(output, [keys[0]], delete=True)
    assert len(_ids(output, "predictions")) == 5


def test_no_run_publishes_meanwhile(tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    _fill(output, keys)
    monkeypatch.setattr("medvision_ray.scoring.erasure._LEASE_WAIT_SECONDS", 0.0)
    with lease(output, "publish-other", "publishing rows of other"), pytest.raises(LeaseHeldError):
        erase_patients(output, [keys[0]], delete=True)
    assert len(_ids(output, "predictions")) == 5


def test_online_rows_go_too_and_are_looked_for_in_no_archive(
    tmp_path: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output, schema = str(tmp_path), tables.predictions_schema(("a",))
    uris = [f"api://{request}" for request in ("r1", "r2", "r3")]
    rows = [{**_row(0, "online-1", "m", "1"), "uri": uri, "image_id": image_id(uri, "1"), "p_a": 1.0} for uri in uris]
    rows[0]["patient_key"], rows[1]["patient_key"] = keys
    tables.commit(output, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), "online-1")
    command = ["tables", "erase-patient", "--output", output, "--patient-key", keys[0], "--uri", "api://r3", "--delete"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "archive" not in shown
    left = tables.read(output, "predictions", ["uri"])
    assert left is not None
    assert left["uri"].to_pylist() == ["api://r2"]


@pytest.mark.parametrize("key", ["", "4711", "A" * 26, "' OR 1=1 --", "a" * 25])
def test_what_is_no_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match="Expected values of the column patient_key"):
        erase_patients(str(tmp_path), [key], delete=True)


def test_nothing_to_erase_is_refused(tmp_path: Path, keys: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="Expected values"):
        erase_patients(str(tmp_path), [])
    with pytest.raises(UsageError, match="Expected tables below"):
        erase_patients(str(tmp_path), [keys[0]])


def _between(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], None]) -> None:
    """Let something happen after each counting and before its deletion is committed."""
    true_count, seen = erasure._counted, []

    def counted(*arguments: Any) -> Any:
        found = true_count(*arguments)
        if found:
            seen.append(found)
            happens(len(seen))
        return found

    monkeypatch.setattr(erasure, "_counted", counted)


def test_rows_that_are_appended_meanwhile_are_counted_too(
    output: str, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same objects, twice: a commit in between makes the deletion count again."""
    schema = tables.FAILURES

    def appends(time: int) -> None:
        if time < 3:
            rows = [{**_row(1, f"late{time}", "m", "0"), "stage": "decode", "error_code": "truncated"}]
            batches = pa.Table.from_pylist(rows, schema).to_batches()
            tables.commit(output, "failures", schema, batches, f"late{time}")

    _between(monkeypatch, appends)
    erase_patients(output, [keys[0]], delete=True)
    runs = [("m", run) for run in ("n0", "late1", "late2")]
    assert tables.erased_rows(output, "failures", runs) == dict.fromkeys(runs, 1)
    assert _ids(output, "failures") == ["4 m", "5 m"]


def test_appends_without_end_are_told(tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalake.exceptions import CommitFailedError

    def refuses(time: int) -> None:
        raise CommitFailedError("DOE JANE")

    output = str(tmp_path)
    _fill(output, keys)
    _between(monkeypatch, refuses)
    monkeypatch.setattr(erasure, "_LONGEST_PAUSE_SECONDS", 0.0)
    with pytest.raises(MedVisionError, match="Call again") as caught:
        erase_patients(output, [keys[0]], delete=True)
    assert "DOE" not in str(caught.value)


def test_many_images_go_in_several_commits(
    tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_IDS_A_COMMIT", 4)
    output = str(tmp_path)
    _publish(output, "n1", "m", dict.fromkeys(range(10), keys[0]), [])
    version = delta.open_table(output, "predictions").version()
    erase_patients(output, [keys[0]], delete=True)
    assert _ids(output, "predictions") == []
    assert tables.erased_rows(output, "predictions", [("m", "n1")]) == {("m", "n1"): 10}
    assert delta.open_table(output, "predictions").version() == version + 3


def test_the_tables_and_the_archive_mean_the_same_by_a_series() -> None:
    assert tables.SERIES == SUFFIX
