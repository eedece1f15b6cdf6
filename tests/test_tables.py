"""Commits happen once a run, whole, and admit new columns."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from medvision_ray import tables
from medvision_ray.errors import LabelError


def _failures(run_key: str, ids: list[int]) -> pa.Table:
    rows = [{"run_key": run_key, "model_id": "m", "image_id": i, "uri": f"u{i}"} for i in ids]
    return pa.Table.from_pylist(rows, schema=tables.FAILURES)


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

    with pytest.raises(Exception, match=r"rows end here|refused"):
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


def test_commit_without_rows_marks_the_run(store: str) -> None:
    assert tables.commit(store, "failures", tables.FAILURES, [], "run-1")
    assert tables.is_committed(store, "failures", "run-1")


def test_classes_that_share_a_column_are_refused() -> None:
    with pytest.raises(LabelError, match="rename"):
        tables.probability_columns(("a b", "A_b"))
