"""Rows of studies out of committed predictions, against values by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.calibration import PlattScaling, TemperatureScaling
from medvision_ray.cli import main
from medvision_ray.reporting.studies import study_rows

FIRST = datetime(2026, 11, 1, tzinfo=timezone.utc)


def commit(output: str, bundle: Bundle, *rows: dict[str, Any], run: str = "r-1") -> None:
    schema = tables.predictions_schema(bundle.classes)
    full = [
        {
            "run_key": run,
            "run_date": date(2026, 11, 1),
            "model_id": bundle.model_id,
            "image_id": hash(row["uri"]) & 0xFFFF,
            "etag": "e",
            "frames": 1,
            "scored_at": FIRST,
            **dict(zip(tables.probability_columns(bundle.classes), row.pop("p"), strict=True)),
            **row,
        }
        for row in rows
    ]
    tables.commit(output, "predictions", schema, pa.Table.from_pylist(full, schema=schema).to_batches(), run)


@pytest.fixture
def output(tmp_path: Path, bundle: Bundle) -> str:
    place = str(tmp_path)
    commit(
        place,
        bundle,
        {"uri": "ct#series", "image_id": 1, "study_key": "s1", "patient_key": "p", "modality": "CT", "frames": 40,
         "p": (0.1, 0.2, 0.7), "mask_fraction": 0.01},
        {"uri": "mr#series", "image_id": 2, "study_key": "s1", "patient_key": "p", "modality": "MR", "frames": 20,
         "p": (0.6, 0.3, 0.1), "mask_fraction": 0.25},
        {"uri": "alone", "image_id": 3, "study_key": "s2", "p": (1.0, 0.0, 0.0)},
        {"uri": "png", "image_id": 4, "study_key": None, "p": (1.0, 0.0, 0.0)},
    )  # fmt: skip
    return place


def test_what_was_sent_to_a_server_counts_in_no_study(output: str, bundle: Bundle) -> None:
    before = study_rows(output, bundle)
    again = {"uri": "api://r1", "image_id": 9, "study_key": "s1", "patient_key": "p", "p": (0.0, 0.0, 1.0)}
    commit(output, bundle, again, run="online-1")
    assert study_rows(output, bundle) == before


def test_the_classes_of_a_study_are_means_over_its_objects(output: str, bundle: Bundle) -> None:
    [row] = study_rows(output, bundle).to_pylist()
    assert (row["study_key"], row["patient_key"], row["objects"], row["volumes"], row["frames"]) == (
        "s1",
        "p",
        2,
        2,
        60,
    )
    assert [row[f"p_{name}"] for name in bundle.classes] == pytest.approx([0.35, 0.25, 0.4])
    assert (row["predicted_label"], row["predicted_probability"]) == (bundle.classes[2], pytest.approx(0.4))
    assert (row["key_image_id"], row["largest_mask_fraction"], row["modalities"]) == (1, 0.25, ["CT", "MR"])


def test_the_findings_of_a_study_are_the_most_that_any_object_shows(output: str, bundle: Bundle) -> None:
    findings = replace(bundle, multi_label=True, thresholds=(0.5, 0.5, 0.5))
    [row] = study_rows(output, findings).to_pylist()
    assert [row[f"p_{name}"] for name in bundle.classes] == pytest.approx([0.6, 0.3, 0.7])
    assert row["predicted_label"] == f"{bundle.classes[0]}|{bundle.classes[2]}"


def test_a_study_has_the_calibrated_probability_of_its_own_raw_one(output: str, bundle: Bundle) -> None:
    [raw] = study_rows(output, bundle).to_pylist()
    columns = [f"c_{name}" for name in bundle.classes]
    assert [raw[name] for name in columns] == [None, None, None]
    soft = TemperatureScaling(2.0)
    [row] = study_rows(output, replace(bundle, calibration=soft)).to_pylist()
    expected = soft.apply(np.array([[0.35, 0.25, 0.4]], np.float32))[0]
    assert [row[name] for name in columns] == pytest.approx(expected)
    assert {key: value for key, value in row.items() if key not in columns} == {
        key: value for key, value in raw.items() if key not in columns
    }
    findings = replace(bundle, multi_label=True, thresholds=(0.5, 0.5, 0.5))
    sigmoids = PlattScaling(((0.5, -1.0), None, (1.0, 0.0)))
    [row] = study_rows(output, replace(findings, calibration=sigmoids)).to_pylist()
    assert [row[name] for name in columns] == [pytest.approx(0.3106, abs=1e-4), None, pytest.approx(0.7)]


def test_of_a_series_that_grew_the_last_row_counts(output: str, bundle: Bundle) -> None:
    later = {"uri": "mr#series", "image_id": 5, "study_key": "s1", "scored_at": FIRST + timedelta(days=1), "frames": 24}
    commit(output, bundle, {**later, "p": (0.0, 0.0, 1.0)}, run="r-2")
    [row] = study_rows(output, bundle).to_pylist()
    assert (row["objects"], row["frames"], row["key_image_id"]) == (2, 64, 5)
    assert row["p_nodule"] == pytest.approx(0.85)


def test_no_predictions_are_no_studies(tmp_path: Path, bundle: Bundle) -> None:
    assert study_rows(str(tmp_path), bundle).num_rows == 0


def test_the_command_writes_them(output: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "studies", "--output", output, "--bundle", bundle.uri, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["studies"] == 1
    assert pq.read_table(told["file"])["study_key"].to_pylist() == ["s1"]
