"""Calibrated probabilities in rows: beside the raw ones, made from them, null without a calibration or in older rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from medvision_ray import tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.calibration import PlattScaling, TemperatureScaling
from medvision_ray.config import ArchiveConfig, DecodeConfig, ScoringConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.rows import working_schema
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.worker import ScoringWorker

Score = Callable[[Bundle], list[dict[str, object]]]


@pytest.fixture(scope="module")
def score(phantom: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> Score:
    objects = list_archive(ArchiveConfig(uri=phantom.night_1)).objects

    def run(bundle: Bundle) -> list[dict[str, object]]:
        folder = str(tmp_path_factory.mktemp("run"))
        scoring = ScoringConfig(precision="float32")
        ScoringWorker(WorkerSettings(bundle.uri, folder, scoring, DecodeConfig(), Pseudonymiser(b"k" * 32)))(objects)
        found = CommittedRows(folder).dataset(working_schema(bundle.classes)).to_table().to_pylist()
        return sorted((row for row in found if row["status"] == "scored"), key=lambda row: row["image_id"])

    return run


def copy(bundle: Bundle, place: Path, **changes: object) -> Bundle:
    """The same network as another bundle."""
    same = ("name", "architecture", "preprocess", "classes", "multi_label", "thresholds", "mask_threshold")
    fields = {name: getattr(bundle, name) for name in same}
    rest = {"trained": {}, "metrics": {}, "train_digest": (), "model": bundle.build_model()}
    return save_bundle(str(place), **{**fields, **rest, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def raw(score: Score, bundle: Bundle) -> list[dict[str, object]]:
    return score(bundle)


def values(rows: list[dict[str, object]], bundle: Bundle, prefix: str) -> np.ndarray:
    names = [prefix + column[2:] for column in tables.probability_columns(bundle.classes)]
    return np.array([[row[name] for name in names] for row in rows], np.float32)


def test_without_a_calibration_the_columns_are_null(raw: list[dict[str, object]], bundle: Bundle) -> None:
    assert np.isnan(values(raw, bundle, "c_")).all()
    assert {frame["calibrated"] for row in raw for frame in row["frame_results"]} == {None}  # type: ignore[attr-defined]


def test_a_temperature_is_applied_to_rows_and_frames_and_decides_nothing(
    score: Score, raw: list[dict[str, object]], bundle: Bundle, tmp_path: Path
) -> None:
    scaling = TemperatureScaling(0.05)
    rows = score(copy(bundle, tmp_path / "b", calibration=scaling))
    for name in ("predicted_label", "predicted_probability", "mask"):
        assert [row[name] for row in rows] == [row[name] for row in raw]
    np.testing.assert_array_equal(values(rows, bundle, "p_"), values(raw, bundle, "p_"))
    got = values(rows, bundle, "c_")
    np.testing.assert_allclose(got, scaling.apply(values(rows, bundle, "p_")), rtol=1e-6)
    assert np.abs(got - values(rows, bundle, "p_")).max() > 0.01
    frames = [frame for row in rows for frame in row["frame_results"]]  # type: ignore[attr-defined]
    assert frames
    expected = scaling.apply(np.array([frame["probabilities"] for frame in frames], np.float32))
    np.testing.assert_allclose(np.array([frame["calibrated"] for frame in frames]), expected, rtol=1e-6)


def test_offsets_name_another_class_in_rows_and_frames_and_leave_probabilities_alone(
    score: Score, raw: list[dict[str, object]], bundle: Bundle, tmp_path: Path
) -> None:
    offsets = (-3.0, -3.0, 0.0)
    rows = score(copy(bundle, tmp_path / "b", class_offsets=offsets))
    stated = values(rows, bundle, "p_")
    np.testing.assert_array_equal(stated, values(raw, bundle, "p_"))
    named = [bundle.classes.index(str(row["predicted_label"])) for row in rows]
    assert named == (np.log(stated) + offsets).argmax(axis=1).tolist()
    assert named != stated.argmax(axis=1).tolist()
    assert [row["predicted_probability"] for row in rows] == stated[np.arange(len(rows)), named].tolist()
    frames = [frame for row in rows for frame in row["frame_results"]]  # type: ignore[attr-defined]
    each = np.array([frame["probabilities"] for frame in frames], np.float32)
    expected = (np.log(each) + offsets).argmax(axis=1)
    assert [frame["predicted_label"] for frame in frames] == [bundle.classes[k] for k in expected]


def test_a_finding_without_a_sigmoid_is_null_and_the_others_are_not(
    score: Score, bundle: Bundle, tmp_path: Path
) -> None:
    scaling = PlattScaling(((2.0, -1.0), None, (0.5, 0.0)))
    found = copy(bundle, tmp_path / "b", multi_label=True, thresholds=(0.5, 0.5, 0.5), calibration=scaling)
    rows = score(found)
    assert [row["c_consolidation"] for row in rows] == [None] * len(rows)
    expected = scaling.apply(values(rows, bundle, "p_"))[:, [0, 2]]
    np.testing.assert_allclose(values(rows, bundle, "c_")[:, [0, 2]], expected, rtol=1e-6)
    assert rows[0]["frame_results"] == [] or rows[0]["frame_results"][0]["calibrated"][1] is None  # type: ignore[index]


def older(schema: pa.Schema) -> pa.Schema:
    """As versions before calibration wrote it: no `c_<class>`, no `calibrated` in a frame."""
    frame = pa.struct([item for item in tables.FRAME if item.name != "calibrated"])
    kept = [item for item in schema if not item.name.startswith("c_")]
    return pa.schema([pa.field(item.name, pa.list_(frame)) if item.name == "frame_results" else item for item in kept])


def test_a_table_of_an_earlier_version_takes_the_columns_and_its_rows_have_null(store: str) -> None:
    schema = tables.predictions_schema(("a b",))
    frame = {"frame": 0, "predicted_label": "a b", "probabilities": [0.5]}
    for run, columns in (("old", older(schema)), ("new", schema)):
        row = {"run_key": run, "model_id": "m", "image_id": len(run), "p_a_b": 0.5, "frame_results": [frame]}
        if run == "new":
            row |= {"image_id": 4, "c_a_b": 0.25, "frame_results": [{**frame, "calibrated": [0.25]}]}
        rows = pa.Table.from_pylist([row], schema=columns)
        tables.commit(store, "predictions", columns, rows.to_batches(), run)
        found = tables.read(store, "predictions", ["run_key", "c_a_b"], pads.field("run_key") == "old")
        assert found.to_pylist() == [{"run_key": "old", "c_a_b": None}]
    names = ["run_key", "p_a_b", "c_a_b", "frame_results"]
    found = {row["run_key"]: row for row in tables.read(store, "predictions", names).to_pylist()}
    assert (found["new"]["c_a_b"], found["new"]["frame_results"][0]["calibrated"]) == (0.25, [0.25])
    assert (found["old"]["p_a_b"], found["old"]["frame_results"][0]["calibrated"]) == (0.5, None)


def test_models_with_and_without_a_calibration_share_a_table(store: str) -> None:
    for run, classes in (("one", ("a",)), ("other", ("b",))):
        schema = tables.predictions_schema(classes)
        row = {"run_key": run, "model_id": run, "image_id": 1, f"p_{classes[0]}": 0.5}
        row |= {"c_b": 0.75} if run == "other" else {}
        tables.commit(store, "predictions", schema, pa.Table.from_pylist([row], schema=schema).to_batches(), run)
    rows = tables.read(store, "predictions", ["model_id", "p_a", "c_a", "p_b", "c_b"]).to_pylist()
    assert sorted(rows, key=lambda row: row["model_id"]) == [
        {"model_id": "one", "p_a": 0.5, "c_a": None, "p_b": None, "c_b": None},
        {"model_id": "other", "p_a": None, "c_a": None, "p_b": 0.5, "c_b": 0.75},
    ]


def test_working_rows_of_a_run_that_an_earlier_version_began_are_published(bundle: Bundle, tmp_path: Path) -> None:
    schema = working_schema(bundle.classes)
    frame = {"frame": 0, "predicted_label": "nodule", "probabilities": [0.1, 0.2, 0.7]}
    row = {"status": "scored", "image_id": 1, "p_nodule": 0.7, "frame_results": [frame, {**frame, "frame": 1}]}
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=older(schema)), tmp_path / "rows" / "1.parquet")
    found = CommittedRows(str(tmp_path)).dataset(schema).to_table().to_pylist()[0]
    assert (found["c_nodule"], found["frame_results"][1]["calibrated"]) == (None, None)
    assert found["frame_results"][1]["frame"] == 1
