"""Whole tables verify; each thing that can be wrong is found, alone and by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import image_id
from medvision_ray.cli import main
from medvision_ray.errors import UsageError
from medvision_ray.tables import delta
from medvision_ray.verification import CHECKS, verify

CLASSES = ("a", "b c")
DAY = date(2026, 3, 1)


def _object(number: int, run: str, model: str) -> dict[str, Any]:
    uri, etag = f"s3://archive/DOE^JANE/{number}.dcm", f"{number:x}"
    keys = {"run_key": run, "run_date": DAY, "model_id": model}
    return {**keys, "image_id": image_id(uri, etag), "uri": uri, "etag": etag}


def _prediction(number: int, run: str = "n2", model: str = "m's 1", **changes: Any) -> dict[str, Any]:
    share = (number % 10) / 10
    return {**_object(number, run, model), "p_a": share, "p_b_c": 1 - share, **changes}


def _failure(number: int, run: str = "n2", model: str = "m's 1", **changes: Any) -> dict[str, Any]:
    return {**_object(number, run, model), "stage": "decode", "error_code": "truncated", **changes}


def _add(output: str, name: str, rows: list[dict[str, Any]], run: str, **options: Any) -> None:
    schema = tables.predictions_schema(CLASSES) if name == "predictions" else tables.known_schema(name)
    tables.commit(output, name, schema, pa.Table.from_pylist(rows, schema=schema).to_batches(), run, **options)


def _publish(output: str, run: str, scored: list[int], failed: list[int], **facts: Any) -> None:
    """A run as the protocol publishes it; `retried` are image numbers."""
    model, retried = facts.pop("model_id", "m's 1"), facts.pop("retried", [])
    ids = np.array([_object(number, run, model)["image_id"] for number in retried], np.int64)
    _add(output, "predictions", [_prediction(number, run, model) for number in scored], run)
    _add(output, "failures", [_failure(number, run, model) for number in failed], run, replacing=(model, ids))
    counts = {"already_done": 0, "scored": len(scored), "failed": len(failed), "retried": len(retried)}
    listed = facts.pop("listed", len(scored) + len(failed) + facts.get("already_done", 0) + facts.get("not_scored", 0))
    row = {"run_key": run, "job": "score", "model_id": model, "listed": listed, **counts, **facts}
    _add(output, "runs", [row], run)


def _nights(store: str) -> str:
    """Three nights: some fail, some are tried again and fail or are scored, one night stops at its deadline."""
    _publish(store, "n1", [1, 2, 3], [4, 5, 6], not_scored=2, state="deadline")
    _publish(store, "n2", [7, 8], [9], already_done=6)
    _publish(store, "n3", [4], [5], already_done=7, retried=[4, 5])
    _publish(store, "o1", [1, 2], [4], model_id="other")
    return store


@pytest.fixture
def output(tmp_path: Path) -> str:
    return _nights(str(tmp_path / "a store"))


def _checks(output: str, run: str | None = None) -> dict[str, list[str]]:
    return {finding.check: finding.examples for finding in verify(output, run).findings}


def test_whole_tables_verify(store: str) -> None:
    found = verify(_nights(store))
    assert found.findings == []
    assert found.rows == {"predictions": 8, "failures": 4, "runs": 4}
    assert found.runs == 4


@pytest.mark.parametrize("run", ["n1", "n2", "n3", "o1"])
def test_each_run_verifies_alone(output: str, run: str) -> None:
    assert verify(output, run).findings == []
    assert verify(output, run).runs == 1


def test_compaction_changes_no_finding(output: str) -> None:
    tables.compact(output)
    assert _checks(output) == {}
    _add(output, "predictions", [_prediction(1, "n9")], "n9")
    tables.compact(output)
    assert set(_checks(output)) == {"unpublished_run"}


def test_tables_of_the_first_version_verify(tmp_path: Path) -> None:
    first = pa.schema([field for field in tables.RUNS if field.name not in tables.LATER["runs"]])
    row = {"run_key": "n1", "job": "score", "model_id": "m's 1", "listed": 1, "already_done": 0, "scored": 1}
    tables.commit(str(tmp_path), "runs", first, pa.Table.from_pylist([row], schema=first).to_batches(), "n1")
    _add(str(tmp_path), "predictions", [_prediction(1, "n1")], "n1")
    assert _checks(str(tmp_path)) == {}


def _again(name: str, row: dict[str, Any], **run: Any) -> Callable[[str], None]:
    """One more run of one row, with its own row in `runs`."""

    def change(output: str) -> None:
        _add(output, name, [{**row, "run_key": "bad"}], "bad")
        counts = {
            "scored": int(name == "predictions"),
            "failed": int(name == "failures"),
            "already_done": 0,
            "listed": 1,
        }
        facts = {"run_key": "bad", "job": "score", "model_id": row["model_id"], **counts, **run}
        _add(output, "runs", [facts], "bad")

    return change


_ID_1, _ID_50 = str(_object(1, "", "")["image_id"]), str(_object(50, "", "")["image_id"])
WRONG = {
    "scored twice": (_again("predictions", _prediction(1)), {"duplicate_row": [_ID_1]}),
    "failed and scored": (_again("failures", _failure(1)), {"duplicate_row": [_ID_1]}),
    "more predictions than scored": (
        _again("predictions", _prediction(50), scored=0, listed=0),
        {"scored_count": ["0 in runs, 1 rows"]},
    ),
    "fewer predictions than scored": (
        _again("predictions", _prediction(50), scored=2, listed=2),
        {"scored_count": ["2 in runs, 1 rows"]},
    ),
    "more failures than failed": (
        _again("failures", _failure(50), failed=0, listed=0),
        {"failed_count": ["0 in runs, 1 rows"], "model_failures": ["2 by its runs, 3 rows"]},
    ),
    "a failure lost": (
        _again("failures", _failure(50), failed=2, listed=2),
        {"model_failures": ["4 by its runs, 3 rows"]},
    ),
    "counts that do not add up": (
        _again("predictions", _prediction(50), listed=3),
        {"listed_count": ["3 listed, 1 accounted for"]},
    ),
    "an image_id of other content": (_again("failures", _failure(50, etag="x")), {"image_id": [_ID_50]}),
    "no etag": (_again("predictions", _prediction(50, etag=None)), {"null_value": [_ID_50]}),
    "probability over 1": (
        _again("predictions", _prediction(50, p_a=1.5, p_b_c=-0.5)),
        {"probability_range": [_ID_50] * 1},
    ),
    "calibrated probability over 1": (_again("predictions", _prediction(50, c_a=1.5)), {"probability_range": [_ID_50]}),
    "probability not a number": (
        _again("predictions", _prediction(50, p_a=float("nan"))),
        {"probability_range": [_ID_50], "probability_sum": [_ID_50]},
    ),
    "probabilities that do not sum to 1": (
        _again("predictions", _prediction(50, p_a=0.5, p_b_c=0.6)),
        {"probability_sum": [_ID_50]},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found_alone(tmp_path: Path, case: str) -> None:
    output = str(tmp_path)
    _publish(output, "n1", [1, 2, 3], [4, 5])
    change, expected = WRONG[case]
    change(output)
    assert _checks(output) == expected
    by_run = {key: value for key, value in expected.items() if key not in ("model_failures", "probability_sum")}
    found = {key: value for key, value in _checks(output, "bad").items() if key != "probability_sum"}
    assert found == by_run


def test_probabilities_of_a_multi_label_model_need_not_sum_to_1(tmp_path: Path) -> None:
    rows = [_prediction(number, p_a=0.9, p_b_c=0.8) for number in range(5)]
    _add(str(tmp_path), "predictions", rows, "n2")
    _add(str(tmp_path), "runs", [{"run_key": "n2", "model_id": "m's 1", "job": "evaluate", "scored": 5}], "n2")
    assert _checks(str(tmp_path)) == {}


def test_a_run_in_publication_shows_as_that_alone(output: str) -> None:
    """A retry whose predictions are in, and whose failures still stand: the object is in both tables."""
    _add(output, "predictions", [_prediction(5, "n4")], "n4")
    assert _checks(output) == {"unpublished_run": ["1 rows"]}
    assert _checks(output, "n3") == {}


def test_a_run_listed_twice_is_found(tmp_path: Path) -> None:
    _publish(str(tmp_path), "n1", [1], [])
    row = {"run_key": "n1", "job": "score", "model_id": "m's 1", "listed": 1, "scored": 1, "failed": 0}
    _add(str(tmp_path), "runs", [row], "another transaction")
    assert _checks(str(tmp_path)) == {"run_listed": ["n1"]}


def _a_file(output: str) -> str:
    table = delta.open_table(output, "failures")
    path = pa.table(table.get_add_actions(flatten=True))["path"][0].as_py()
    return storage.join(tables.address(output, "failures"), path)


def test_a_missing_file_is_found(store: str) -> None:
    output = _nights(store)
    lost = _a_file(output)
    storage.delete_object(lost)
    found = _checks(output)
    assert found["missing_file"] == [lost.rsplit("/", 1)[1]]
    assert set(found) <= {"missing_file", "model_failures"}


def test_a_cut_file_and_an_altered_one_are_found(tmp_path: Path) -> None:
    for index, (name, expected) in enumerate((("cut", "file_size"), ("altered", "unreadable_file"))):
        output = str(tmp_path / str(index))
        _publish(output, "n1", [1, 2, 3], [4])
        path = Path(_a_file(output))
        data = path.read_bytes()
        path.write_bytes(data[:-9] if name == "cut" else bytes(len(data)))
        assert set(_checks(output)) == {expected, "model_failures"}


def test_rows_that_the_log_does_not_state_are_found(tmp_path: Path) -> None:
    """The file has another row and, by luck, the size that the log states."""
    _publish(str(tmp_path), "n1", [], [4, 5])
    path = Path(_a_file(str(tmp_path)))
    size = path.stat().st_size
    pq.write_table(pq.read_table(path).slice(1), path)
    (log,) = [entry for entry in (path.parent / "_delta_log").glob("*.json") if path.name in entry.read_text()]
    log.write_text(log.read_text().replace(f'"size":{size}', f'"size":{path.stat().st_size}'))
    assert set(_checks(str(tmp_path))) == {"row_count", "model_failures"}


def test_a_missing_and_a_changed_column_are_found(tmp_path: Path) -> None:
    fields = [field for field in tables.FAILURES if field.name not in ("stage", "attempts")]
    schema = pa.schema([*fields, pa.field("attempts", pa.string())])
    tables.commit(str(tmp_path), "failures", schema, [], "n1")
    assert _checks(str(tmp_path)) == {
        "missing_column": ["stage"],
        "column_type": ["attempts: string instead of int32"],
    }


def test_an_unknown_run_is_refused(output: str) -> None:
    with pytest.raises(UsageError, match="does not hold n99"):
        verify(output, "n99")


def test_the_command_line_names_what_is_wrong_and_no_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path)
    _publish(output, "n1", [1, 2, 3], [4])
    assert main(["tables", "verify", "--output", output]) == 0
    assert "All invariants hold." in capsys.readouterr().out
    WRONG["scored twice"][0](output)
    assert main(["tables", "verify", "--output", output]) == 1
    printed = capsys.readouterr().out
    assert f"{CHECKS['duplicate_row']} (1, for example {_ID_1})" in printed
    assert main(["tables", "verify", "--output", output, "--json"]) == 1
    as_json = capsys.readouterr().out
    assert [finding["check"] for finding in json.loads(as_json)["findings"]] == ["duplicate_row"]
    assert "DOE" not in printed + as_json


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(6000)
    rows = [_prediction(number, "n1", mask=noise[number % 3000 :][:3000]) for number in range(20_000)]
    _add(str(tmp_path), "predictions", rows, "n1")
    _add(str(tmp_path), "runs", [{"run_key": "n1", "model_id": "m's 1", "job": "x", "scored": len(rows)}], "n1")
    code = (
        "import sys, pyarrow\nfrom medvision_ray.verification import verify\n"
        "assert verify(sys.argv[1]).findings == []\nprint(pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    held = sum(len(row["mask"]) for row in rows)
    assert 0 < int(done.stdout) < held / 2
