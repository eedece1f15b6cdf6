"""Which images a report shows, out of what an evaluation wrote."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import ReportJob, build_job
from medvision_ray.evaluation.evaluate import _with_shares, _write_details
from medvision_ray.reporting import pictures, sources
from medvision_ray.reporting.collect import build_report
from medvision_ray.reporting.figures import confidences
from medvision_ray.scoring.masks import encode_mask


def details(bundle: Bundle, folder: Path, count: int = 9) -> pd.DataFrame:
    """Grey pictures on the disk, and rows of an evaluation: image i is of class i % 3, every fourth is told wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        uri, mask_uri = str(folder / f"{index}.png"), str(folder / f"{index}-mask.png")
        mask = np.zeros((50, 70), bool)
        mask[10 : 12 + index, 20:30] = True
        cv2.imwrite(uri, np.random.default_rng(index).integers(0, 255, (50, 70), dtype=np.uint8))
        cv2.imwrite(mask_uri, mask.astype(np.uint8) * 255)
        true, told = index % 3, (index + (index % 4 == 3)) % 3
        encoded = encode_mask(mask)
        probabilities = np.full(3, (1 - (0.5 + index / 20)) / 2)
        probabilities[told] = 0.5 + index / 20
        rows.append(
            {
                "image_id": 100 + index,
                "uri": uri,
                "mask_uri": mask_uri,
                "frames": 1,
                "height": 50,
                "width": 70,
                "true_label": bundle.classes[true],
                "predicted_label": bundle.classes[told],
                **dict(zip(tables.probability_columns(bundle.classes), probabilities, strict=True)),
                **dict.fromkeys(tables.calibrated_columns(bundle.classes)),
                "dice": index / 10,
                "mask_box": list(encoded.box or ()),
                "mask": encoded.data,
                "patient": f"p:{index // 2}",
                "true_area": float(mask.sum()),
            }
        )
    return pd.DataFrame(rows)


def test_the_spread_goes_from_the_worst_to_the_best(bundle: Bundle, tmp_path: Path) -> None:
    assert pictures.spread(details(bundle, tmp_path), 3)["image_id"].tolist() == [100, 104, 108]


def test_the_worst_are_sure_errors_then_low_dice(bundle: Bundle, tmp_path: Path) -> None:
    chosen = pictures.worst(details(bundle, tmp_path), bundle, 4)
    assert chosen["image_id"].tolist() == [107, 103, 100, 101]  # 3 and 7 are told wrong, 7 with the greater certainty
    assert pictures.worst_rows(chosen)[0] == ("107", bundle.classes[1], bundle.classes[2], "0.850", "0.700")


def test_right_ones_are_explained_by_turns_and_errors_beside_them(bundle: Bundle, tmp_path: Path) -> None:
    chosen = pictures.to_explain(details(bundle, tmp_path), bundle, 5)
    assert chosen["image_id"].tolist()[-2:] == [107, 103]
    assert len(set(chosen["predicted_label"][:3])) == 3


def test_pseudonyms_and_volumes_are_not_shown(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path)
    frame.loc[0, "frames"] = 30
    frame.loc[1, "uri"] = "hashed:abc"
    shown = pictures.showable(frame)
    assert shown is not None
    assert 100 not in set(shown["image_id"])


def test_a_picture_has_its_masks_and_one_that_is_gone_is_counted(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path)
    Path(frame.loc[0, "uri"]).unlink()
    shown, unread = pictures.examples(frame, bundle)
    assert (len(shown), unread) == (8, 1)
    assert shown[0].predicted is not None
    assert shown[0].true is not None
    np.testing.assert_array_equal(shown[0].predicted, shown[0].true)
    assert shown[0].image.shape == shown[0].true.shape == (46, 64)  # 50 x 70 in 64 x 64, without the padding


def test_an_image_that_may_have_burned_in_text_is_not_shown(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = details(bundle, tmp_path)
    plain = pictures.decode

    def suspicious(*given: object) -> object:
        image = plain(*given)  # type: ignore[arg-type]
        return replace(image, source_format="dicom", header=replace(image.header, may_contain_text=True))

    monkeypatch.setattr(pictures, "decode", suspicious)
    assert pictures.examples(frame, bundle) == ([], 9)


def test_what_an_evaluation_writes_is_reported_with_pictures_and_reasons(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path / "images")
    found = SimpleNamespace(scored=frame, samples=SimpleNamespace(true_area=frame["true_area"].to_numpy()))
    place = storage.join(str(tmp_path), "evaluations", bundle.model_id, "d-test.parquet")
    _write_details(place, bundle, _with_shares(found), None)  # type: ignore[arg-type]
    written = pq.read_table(io.BytesIO(storage.read_bytes(place))).to_pandas()
    assert written["patient_number"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    np.testing.assert_allclose(written["true_mask_fraction"], frame["true_area"] / 3500)
    assert "patient" not in written
    read = sources.details(str(tmp_path), bundle, "d", "test")
    assert read is not None
    assert sources.details(str(tmp_path), bundle, "e", "test") is None
    measured(tmp_path, bundle, "d", accuracy=7 / 9)
    scored, predicted = sources.scored_of(bundle, read)
    assert predicted is not None
    assert int((predicted != scored.labels).sum()) == 2
    options = {"output": str(tmp_path), "bundle": bundle.uri, "examples": 4, "explanations": 3, "kind": "evaluation"}
    html = Path(build_report(build_job(ReportJob, options, "a test"))).read_text()
    assert html.count("data:image/jpeg") == 4 + 4 + 3
    widths = [
        cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR).shape[1]
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    ]
    assert widths == [320] * 8 + [640] * 3
    assert str(tmp_path) not in html


def measured(output: Path, bundle: Bundle, dataset: str, accuracy: float, **other: object) -> None:
    """A row of the metrics table."""
    row: dict[str, Any] = {
        "run_key": f"metrics-{dataset}",
        "model_id": bundle.model_id,
        "dataset": dataset,
        "split": "test",
        "subgroup": "all",
        "class": "all",
        "metric": "accuracy",
        "value": accuracy,
        "n_images": 9,
        "n_patients": 5,
        "measured_at": datetime.now(timezone.utc),
    }
    row |= other
    rows = pa.Table.from_pylist([row], tables.METRICS)
    tables.commit(str(output), "metrics", tables.METRICS, rows.to_batches(), row["run_key"])


def test_figures_are_of_the_dataset_that_the_headline_is_of(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path / "images")
    wrong = frame.assign(predicted_label=np.roll(frame["true_label"], 1))
    for dataset, rows in (("a", wrong), ("b", frame)):  # the files' order is not the measurements'
        found = SimpleNamespace(scored=rows, samples=SimpleNamespace(true_area=rows["true_area"].to_numpy()))
        place = storage.join(str(tmp_path), "evaluations", bundle.model_id, f"{dataset}-test.parquet")
        _write_details(place, bundle, _with_shares(found), None)  # type: ignore[arg-type]
    measured(tmp_path, bundle, "b", accuracy=7 / 9)
    measured(tmp_path, bundle, "a", accuracy=0.0)
    options = {"output": str(tmp_path), "bundle": bundle.uri, "examples": 0, "explanations": 0, "kind": "evaluation"}
    html = Path(build_report(build_job(ReportJob, options, "a test"))).read_text()
    assert "test split of a, and so are the figures below" in html  # the newest
    assert "Confusion matrix: 0 of 9 images" in html
    measured(tmp_path, bundle, "b", accuracy=7 / 9, run_key="metrics-b-2")
    html = Path(build_report(build_job(ReportJob, options, "a test"))).read_text()
    assert "test split of b, and so are the figures below" in html
    assert "Confusion matrix: 7 of 9 images" in html


def test_what_is_stated_is_the_probability_of_the_class_that_is_named(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path)
    other = bundle.classes[2]
    frame.loc[0, "predicted_label"] = other  # class offsets name another than the likeliest
    chosen = pictures.to_explain(frame, bundle, 9).set_index("image_id")
    column = tables.probability_columns(bundle.classes)[2]
    assert chosen.loc[100, "probability"] == pytest.approx(frame.loc[0, column])
    assert chosen.loc[101, "probability"] == pytest.approx(0.55)
    scored, predicted = sources.scored_of(bundle, frame)
    assert predicted is not None
    stated, right = confidences(scored, scored.probabilities)
    assert stated[0] == pytest.approx(frame.loc[0, column])
    assert right.tolist() == (predicted == scored.labels).tolist()


def test_calibrated_columns_are_drawn_where_there_are_any(bundle: Bundle, tmp_path: Path) -> None:
    frame = details(bundle, tmp_path)
    assert sources.scored_of(bundle, frame)[0].calibrated is None
    for name in tables.probability_columns(bundle.classes):
        frame["c_" + name.removeprefix("p_")] = frame[name]
    calibrated = sources.scored_of(bundle, frame)[0].calibrated
    assert calibrated is not None
    np.testing.assert_array_equal(calibrated, sources.scored_of(bundle, frame)[0].probabilities)
