"""Commits happen once a run, whole, and admit new columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.errors import LabelError, MedVisionError
from medvision_ray.tables import delta


def _failures(run_key: str, ids: list[int], model_id: str = "m") -> pa.Table:
    rows = [{"run_key": run_key, "model_id": model_id, "image_id": i, "uri": f"u{i}"} for i in ids]
    return pa.Table.from_pylist(rows, schema=tables.FAILURES)


def _commit_prediction(output: str, run_key: str, image_id: int, classes: tuple[str, ...]) -> None:
    schema = tables.predictions_schema(classes)
    row = {"run_key": run_key, "model_id": "m", "image_id": image_id}
    rows = pa.Table.from_pylist([row], schema=schema)
    assert tables.commit(output, "predictions", schema, rows.to_batches(), run_key)


def _ids(output: str, name: str) -> list[int]:
    rows = tables.read(output, name, ["image_id"])
    return [] if rows is None else sorted(rows["image_id"].to_pylist())


def test_commit_is_seen_whole_and_once(store: str) -> None:
    assert tables.read(store, "failures") is None
    rows = _failures("run-1", [1, 2])
    assert tables.commit(store, "failures", tables.FAILURES, rows.to_batches(), "run-1")
    assert not tables.commit(store, "failures", tables.FAILURES, rows.to_batches(), "run-1")
    found = tables.read(store, "failures", ["image_id"])
    assert found is not None
    assert sorted(found["image_id"].to_pylist()) == [1, 2]
    assert tables.is_committed(store, "failures", "run-1")
    assert not tables.is_committed(store, "failures", "run-2")


def test_failing_stream_leaves_nothing(store: str) -> None:
    def broken() -> object:
        yield _failures("run-1", [1]).to_batches()[0]
        raise OSError("the rows end here")

    with pytest.raises(MedVisionError, match="Nothing of this commit is visible"):
        tables.commit(store, "failures", tables.FAILURES, broken(), "run-1")  # type: ignore[arg-type]
    assert tables.read(store, "failures") is None or tables.read(store, "failures").num_rows == 0


def test_another_model_adds_its_columns(store: str) -> None:
    for run, classes in (("r1", ("a", "b")), ("r2", ("b", "c d"))):
        schema = tables.predictions_schema(classes)
        row = {"run_key": run, "model_id": run, "image_id": 1, tables.probability_column(classes[1]): 0.5}
        tables.commit(store, "predictions", schema, pa.Table.from_pylist([row], schema=schema).to_batches(), run)
    found = tables.read(store, "predictions", ["p_a", "p_b", "p_c_d"], pads.field("model_id") == "r2")
    assert found is not None
    assert found.to_pylist() == [{"p_a": None, "p_b": None, "p_c_d": 0.5}]


def test_a_condition_opens_only_files_that_can_hold_its_rows(tmp_path: Path) -> None:
    """The other nights' files are gone, and nobody misses them."""
    for run in ("r1", "r2", "r3"):
        _commit_prediction(str(tmp_path), run, int(run[1]), ("a",))
        tables.commit(str(tmp_path), "failures", tables.FAILURES, _failures(run, [7], f"m{run}").to_batches(), run)
    for name in ("predictions", "failures"):
        found = tables.dataset(str(tmp_path), name)
        assert found is not None
        for path in found.files:
            if "r2" not in set(pq.read_table(path, columns=["run_key"])["run_key"].to_pylist()):
                Path(path).unlink()
    of_run, of_model = pads.field("run_key") == "r2", pads.field("model_id") == "mr2"
    assert tables.read(str(tmp_path), "predictions", ["image_id"], of_run).to_pydict() == {"image_id": [2]}
    assert tables.read(str(tmp_path), "failures", ["image_id"], of_model).to_pydict() == {"image_id": [7]}


def test_commit_without_rows_marks_the_run(store: str) -> None:
    assert tables.commit(store, "failures", tables.FAILURES, [], "run-1")
    assert tables.is_committed(store, "failures", "run-1")


def test_classes_that_share_a_column_are_refused() -> None:
    with pytest.raises(LabelError, match="rename"):
        tables.probability_columns(("a b", "A_b"))


def test_two_processes_of_one_run_commit_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process commits after this one has looked whether the run is committed."""
    rows = _failures("run-1", [1, 2])
    tables.commit(store, "failures", tables.FAILURES, _failures("run-0", [0]).to_batches(), "run-0")
    inner, calls = delta._assert_same_types, []

    def other_is_first(*arguments: Any) -> None:
        if not calls:
            calls.append(1)
            assert tables.commit(store, "failures", tables.FAILURES, rows.to_batches(), "run-1")
        inner(*arguments)

    monkeypatch.setattr(delta, "_assert_same_types", other_is_first)
    assert not tables.commit(store, "failures", tables.FAILURES, iter(rows.to_batches()), "run-1")
    assert _ids(store, "failures") == [0, 1, 2]


def test_a_commit_survives_columns_that_another_run_adds_meanwhile(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.commit(store, "predictions", tables.predictions_schema(("a",)), [], "run-0")
    inner, calls = delta._assert_same_types, []

    def other_is_first(*arguments: Any) -> None:
        if not calls:
            calls.append(1)
            _commit_prediction(store, "run-1", 1, ("b",))
        inner(*arguments)

    monkeypatch.setattr(delta, "_assert_same_types", other_is_first)
    _commit_prediction(store, "run-2", 2, ("a",))
    assert _ids(store, "predictions") == [1, 2]


# Retries of failures


def _all_failures(output: str) -> list[tuple[str, str, int]]:
    rows = tables.read(output, "failures", ["model_id", "run_key", "image_id"])
    assert rows is not None
    return sorted((row["model_id"], row["run_key"], row["image_id"]) for row in rows.to_pylist())


@pytest.mark.parametrize("model", ["m", "it's; a 'model'"])
def test_a_retry_replaces_this_models_failures_in_one_commit(store: str, model: str) -> None:
    tables.commit(store, "failures", tables.FAILURES, _failures("r1", [1, 2, 3, 4], model).to_batches(), "r1")
    tables.commit(store, "failures", tables.FAILURES, _failures("r2", [1, 2, 3], "other").to_batches(), "r2")
    again = _failures("r3", [2, 9], model).to_batches()  # 1 and 3 are scored now, 2 failed again, 9 is new
    replacing = (model, np.array([1, 2, 3]))
    before = delta.open_table(store, "failures").version()
    assert tables.commit(store, "failures", tables.FAILURES, again, "r3", replacing=replacing)
    assert delta.open_table(store, "failures").version() == before + 1
    assert not tables.commit(store, "failures", tables.FAILURES, again, "r3", replacing=replacing)
    expected = [("other", "r2", i) for i in (1, 2, 3)] + [(model, "r1", 4), (model, "r3", 2), (model, "r3", 9)]
    assert _all_failures(store) == sorted(expected)


def test_a_retry_in_which_all_is_scored_leaves_no_failures(store: str) -> None:
    tables.commit(store, "failures", tables.FAILURES, _failures("r1", [1, 2]).to_batches(), "r1")
    tables.commit(store, "failures", tables.FAILURES, [], "r2", replacing=("m", np.array([1, 2])))
    assert _all_failures(store) == []
    assert tables.is_committed(store, "failures", "r1")
    assert tables.is_committed(store, "failures", "r2")


@pytest.mark.parametrize("meanwhile", ["same model", "other model", "compaction"])
def test_a_retry_loses_nothing_that_is_committed_meanwhile(
    store: str, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    for run, image in (("r1", 1), ("r2", 2)):
        tables.commit(store, "failures", tables.FAILURES, _failures(run, [image]).to_batches(), run)
    inner, calls = delta._replace, []

    def other_is_first(*arguments: Any) -> None:
        if not calls:
            calls.append(1)
            if meanwhile == "compaction":
                tables.compact(store)
            else:
                rows = _failures("r3", [3], "m" if meanwhile == "same model" else "x")
                tables.commit(store, "failures", tables.FAILURES, rows.to_batches(), "r3")
        inner(*arguments)

    monkeypatch.setattr(delta, "_replace", other_is_first)
    again = _failures("r4", [1]).to_batches()
    assert tables.commit(store, "failures", tables.FAILURES, again, "r4", replacing=("m", np.array([1, 2])))
    third = {"same model": [("m", "r3", 3)], "other model": [("x", "r3", 3)], "compaction": []}[meanwhile]
    assert _all_failures(store) == [*third, ("m", "r4", 1)] or _all_failures(store) == [("m", "r4", 1), *third]


# Versions


def _as_pandas(output: str, name: str) -> pd.DataFrame:
    table = delta.open_table(output, name)
    assert table is not None
    return pd.DataFrame(table.to_pandas())


NEWER = tables.FAILURES.append(pa.field("camera", pa.string()))
OLDER = pa.schema([field for field in tables.FAILURES if field.name != "attempts"])


def _engines(output: str) -> dict[str, list[tuple[int, str | None, int | None]]]:
    """`(image_id, camera, attempts)` as each engine reads it."""
    uri, options = storage.table_uri(tables.address(output, "failures")), storage.table_options(output)
    columns = ["image_id", "camera", "attempts"]
    frame = _as_pandas(output, "failures")[columns].astype(object)
    lazy = pl.scan_delta(uri, storage_options=options or None).select(columns)
    dataset = delta.open_table(output, "failures").to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by name
    found = {
        "pandas": list(frame.where(frame.notna(), None).itertuples(index=False, name=None)),
        "duckdb": duckdb.sql("SELECT image_id, camera, attempts FROM dataset").fetchall(),
        "polars": lazy.collect().rows(),
    }
    return {engine: sorted(rows, key=str) for engine, rows in found.items()}


def test_versions_with_other_columns_share_a_table(store: str) -> None:
    """An older version, a newer one, then this one; every engine reads null where a version wrote nothing."""
    store = store.replace(" ", "_")  # polars (2.1) does not find a Delta table below a folder with a blank
    for run, schema, values in (
        ("old", OLDER, {}),
        ("new", NEWER, {"camera": "c", "attempts": 2}),
        ("this", tables.FAILURES, {"attempts": 3}),
    ):
        row = {"run_key": run, "model_id": "m", "image_id": len(run), **values}  # "old" and "new" share image 3
        rows = pa.Table.from_pylist([row], schema=schema)
        tables.commit(store, "failures", schema, rows.to_batches(), run)
    files = delta.open_table(store, "failures").file_uris()
    assert len(files) == 3  # nothing was rewritten
    expected = [(3, "c", 2), (3, None, None), (4, None, 3)]
    assert _engines(store) == dict.fromkeys(("pandas", "duckdb", "polars"), expected)
    tables.compact(store)
    assert _engines(store) == dict.fromkeys(("pandas", "duckdb", "polars"), expected)


def test_a_retry_leaves_null_where_only_a_newer_version_writes(store: str) -> None:
    row = {"run_key": "new", "model_id": "m", "image_id": 1, "camera": "c"}
    tables.commit(store, "failures", NEWER, pa.Table.from_pylist([row], schema=NEWER).to_batches(), "new")
    again = _failures("r2", [1]).to_batches()
    tables.commit(store, "failures", tables.FAILURES, again, "r2", replacing=("m", np.array([1])))
    frame = _as_pandas(store, "failures")
    assert frame["run_key"].tolist() == ["r2"]
    assert frame["camera"].isna().all()


@pytest.mark.parametrize("kind", [pa.string(), pa.int32(), pa.float64()])
def test_a_column_of_another_type_is_refused_by_name(store: str, kind: pa.DataType) -> None:
    tables.commit(store, "failures", tables.FAILURES, _failures("r1", [1]).to_batches(), "r1")
    schema = tables.FAILURES.set(3, pa.field("image_id", kind))
    with pytest.raises(MedVisionError, match=rf"column image_id .* as {kind}, but there it is int64"):
        tables.commit(store, "failures", schema, [], "r2")
    assert not tables.is_committed(store, "failures", "r2")


def test_a_nested_record_may_have_more_fields_but_no_other_types() -> None:
    def frames(*fields: tuple[str, pa.DataType]) -> pa.DataType:
        return pa.list_(pa.struct([pa.field(*field) for field in fields]))

    one = frames(("frame", pa.int32()), ("mask", pa.binary()))
    assert delta.same_type(one, frames(("mask", pa.binary()), ("frame", pa.int32()), ("dose", pa.float32())))
    assert not delta.same_type(one, frames(("frame", pa.int64())))
    assert not delta.same_type(one, pa.int32())


def test_columns_of_this_version_are_null_in_an_older_table(store: str) -> None:
    first = pa.schema([field for field in tables.RUNS if field.name not in tables.LATER["runs"]])
    row = {"run_key": "r1", "job": "score"}
    tables.commit(store, "runs", first, pa.Table.from_pylist([row], schema=first).to_batches(), "r1")
    found = tables.read(store, "runs", ["run_key", "state", "retried"], pads.field("state").is_null())
    assert found is not None
    assert found.to_pylist() == [{"run_key": "r1", "state": None, "retried": None}]
    whole = tables.read(store, "runs")
    assert whole is not None
    assert set(whole.column_names) == set(tables.RUNS.names)
