"""The examples of docs/reading-the-tables.md run, and say what was published."""

from __future__ import annotations

import re
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medvision_ray import tables
from medvision_ray.scoring.masks import encode_mask

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reading-the-tables.md"
NIGHT = date(2026, 2, 2)
MASK = np.zeros((40, 60), bool)
MASK[5:11, 20:33] = True


def _prediction(number: int, day: int, model: str, label: str, **changes: Any) -> dict[str, Any]:
    mask = encode_mask(MASK)
    return {
        "run_key": f"{model}-{day}",
        "run_date": date(2026, 2, day),
        "model_id": model,
        "image_id": 100 * day + number,
        "uri": f"s3://archive/{number}.dcm",
        "etag": str(day),
        "height": 40,
        "width": 60,
        "frames": 1,
        "predicted_label": label,
        "predicted_probability": 0.75,
        "p_a": 0.75,
        "p_b": 0.25,
        "mask_fraction": mask.fraction,
        "mask_box": list(mask.box or ()),
        "mask": mask.data,
        "scored_at": datetime(2026, 2, day, 3, number, tzinfo=timezone.utc),
        "frame_results": [],
        **changes,
    }


def _commit(output: str, name: str, rows: list[dict[str, Any]], run: str) -> None:
    schema = tables.predictions_schema(("a", "b")) if name == "predictions" else tables.known_schema(name)
    tables.commit(output, name, schema, pa.Table.from_pylist(rows, schema=schema).to_batches(), run)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Model m scores two objects one night, and the next night object 1 in a new version and a volume; n one."""
    output = str(tmp_path_factory.mktemp("output"))
    frames = [{"frame": i, "predicted_label": "a", "mask_fraction": i / 10, "mask_area_mm2": i * 1.0} for i in range(3)]
    _commit(output, "predictions", [_prediction(1, 1, "m", "a"), _prediction(2, 1, "m", "a")], "m-1")
    volume = _prediction(3, 2, "m", "a", frames=3, frame_results=frames, mask=None, mask_box=None)
    _commit(output, "predictions", [_prediction(1, 2, "m", "b"), volume], "m-2")
    _commit(output, "predictions", [_prediction(2, 1, "n", "b")], "n-1")
    codes = ["truncated", "truncated", "no_pixels"]
    keys = {"run_key": "m-1", "model_id": "m", "stage": "decode"}
    failures = [{**keys, "image_id": i, "uri": f"f{i}", "error_code": code} for i, code in enumerate(codes)]
    _commit(output, "failures", failures, "m-1")
    _commit(output, "runs", [{"run_key": "m-1", "job": "score", "scored": 2, "failed": 3, "retried": 0}], "m-1")
    return output


def _run(engine: str, output: str) -> dict[str, Any]:
    """Run the document's blocks of one engine, in order, after its setup."""
    blocks = re.findall(r"```python\n# (\w+)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert {name for name, _ in blocks} == {"setup", "pandas", "duckdb", "polars"}
    scope: dict[str, Any] = {"OUTPUT": output, "NIGHT": NIGHT}
    for name, code in blocks:
        if name in ("setup", engine):
            exec(compile(code, f"{DOCUMENT.name}, {name}", "exec"), scope)
    return scope


LAST_NIGHT, NEWEST = {201, 203}, {("m", 1, "b"), ("m", 2, "a"), ("m", 3, "a"), ("n", 2, "b")}
REASONS = [("decode", "truncated", 2), ("decode", "no_pixels", 1)]


def _newest(rows: Any) -> set[tuple[str, int, str]]:
    return {(model, int(uri.rsplit("/", 1)[1][:-4]), label) for model, uri, label in rows}


def test_pandas(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = _run("pandas", output)
    assert set(found["last_night"]["image_id"]) == set(found["same_night"]["image_id"]) == LAST_NIGHT
    assert [(*index, count) for index, count in found["by_reason"]["objects"].items()] == REASONS
    newest = found["newest"][["model_id", "uri", "predicted_label"]]
    assert _newest(newest.itertuples(index=False, name=None)) == NEWEST
    assert sorted(found["earlier"]["image_id"]) == [101, 102]
    assert np.array_equal(found["mask"], MASK)
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert [frame["frame"] for frame in found["per_frame"]] == [0, 1, 2]
    assert found["largest"].to_dict() == {203: 0.2}


def test_duckdb(output: str) -> None:
    found = _run("duckdb", output)
    assert {row[0] for row in found["last_night"]} == LAST_NIGHT
    assert found["by_reason"] == REASONS
    assert found["disagree"] == [("m", "n", "a", "b", 1)]
    assert _newest(found["newest"]) == NEWEST
    assert sorted(found["per_frame"]) == [(203, i, "a", float(i)) for i in range(3)]
    assert found["nights"] == [("m-1", 2, 3, 0, None)]


def test_polars(output: str) -> None:
    found = _run("polars", output)
    assert set(found["last_night"]["image_id"]) == LAST_NIGHT
    assert found["by_reason"].rows() == REASONS
    assert _newest(found["newest"].rows()) == NEWEST
    assert found["per_frame"]["frame"].to_list() == [0, 1, 2]
    assert sorted(found["earlier"]["image_id"]) == [101, 102]


def test_every_column_of_every_table_is_explained() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z0-9_]+)`", text))
    for name in tables.TABLES:
        assert set(tables.known_schema(name).names) <= explained, name
