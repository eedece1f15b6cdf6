"""Folds by patient, out-of-fold predictions, mean and spread; nothing here starts a Ray."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray import tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle
from medvision_ray.config import LabelsConfig, PrivacyConfig, TrainJob, build_job
from medvision_ray.errors import ConfigError, LabelError, MedVisionError, UsageError
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.feed import Examples, Truth
from medvision_ray.learning.folds import assign_folds, cross_validate, fold_table, folds_at_once, summarise
from medvision_ray.learning.ingest import SCHEMA
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.learning.mask_threshold import CANDIDATES
from medvision_ray.learning.out_of_fold import (
    BY_THRESHOLD,
    GROUPS,
    PIXELS,
    fold_rows,
    identified,
    is_current,
    join_folds,
    predict_fold,
)
from medvision_ray.learning.splits import folds_by_patient
from medvision_ray.learning.train import train
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.predictor import Predictor

SIZE = (64, 64)


def real(data_dir: Path, name: str) -> LabelTable:
    return load_labels(LabelsConfig(table=str(data_dir / name / "labels.csv")))


@pytest.mark.parametrize(("name", "folds"), [("brain_mri", 5), ("chest_xray", 4)])
def test_real_patients_are_in_one_fold_each_and_classes_are_even(data_dir: Path, name: str, folds: int) -> None:
    table = real(data_dir, name)
    fold_of = assign_folds(table, ("",) * len(table), folds=folds, seed=0)
    assert ((fold_of < 0) == (table.splits == "test")).all()
    where = {patient: set() for patient in table.patients}
    for patient, fold in zip(table.patients, fold_of, strict=True):
        where[patient].add(int(fold))
    assert all(len(found) == 1 for found in where.values())
    seen = fold_of >= 0
    for number in range(len(table.classes)):
        whole = (table.labels[seen] == number).mean()
        shares = [(table.labels[fold_of == fold] == number).mean() for fold in range(folds)]
        assert max(abs(share - whole) for share in shares) < 0.06
    again = assign_folds(table, ("",) * len(table), folds=folds, seed=0)
    assert (again == fold_of).all()
    assert (assign_folds(table, ("",) * len(table), folds=folds, seed=1) != fold_of).any()


def test_a_fold_is_val_and_the_test_split_stays(data_dir: Path) -> None:
    table = real(data_dir, "brain_mri")
    fold_of = assign_folds(table, ("",) * len(table), folds=3, seed=0)
    held = Counter()
    for fold in range(3):
        one = fold_table(table, fold_of, fold)
        assert ((one.splits == "test") == (table.splits == "test")).all()
        held.update(np.flatnonzero(one.splits == "val").tolist())
        assert set(one.splits[fold_of >= 0]) == {"train", "val"}
    assert held == Counter(np.flatnonzero(table.splits != "test").tolist())


def test_patients_with_the_same_pixels_stay_together() -> None:
    patients = [f"P{number // 2}" for number in range(40)]
    digests = [f"d{number}" for number in range(40)]
    digests[0], digests[7], digests[30] = "same", "same", ""
    digests[6], digests[21] = "chain", "chain"  # P3 is with P0 by one image and with P10 by another
    for seed in range(5):
        fold_of = folds_by_patient(patients, [n % 3 for n in range(40)], digests, folds=4, seed=seed)
        together = [fold_of[row] for row in (0, 1, 6, 7, 20, 21)]
        assert len(set(together)) == 1
        assert len(set(fold_of.tolist())) == 4


@pytest.mark.parametrize(
    ("patients", "classes", "words"),
    [
        (["A", "A", "B", "B"], [0, 1, 0, 1], "at least 3 patients.*there are 2"),
        (["A", "B", "C", "D"], [0, 0, 1, 1], "a class with at least 3 images"),
    ],
)
def test_too_few_patients_are_refused_without_their_names(patients: list[str], classes: list[int], words: str) -> None:
    secret = [f"DOE-{name}" for name in patients]
    with pytest.raises(LabelError, match=words) as caught:
        folds_by_patient(secret, classes, [""] * 4, folds=3, seed=0)
    assert "DOE" not in str(caught.value)


def job(**options: Any) -> TrainJob:
    data = {"output": "/out", "labels": {"table": "/labels.csv"}, "folds": 5, **options}
    return build_job(TrainJob, data, "the test")


@pytest.mark.parametrize(
    ("options", "cpus", "gpus", "expected"),
    [
        ({}, 2, None, 1),
        ({"workers": 1}, 2, None, 2),
        ({"workers": 1}, 64, None, 5),
        ({"workers": 1, "cpus_per_worker": 0.5}, 2, None, 4),
        ({"workers": 2}, 64, 5, 2),
        ({"workers": 1}, 2, 8, 2),
    ],
)
def test_as_many_folds_train_at_once_as_there_is_room_for(
    options: dict[str, Any], cpus: float, gpus: int | None, expected: int
) -> None:
    assert folds_at_once(job(**options), cpus=cpus, gpus=gpus) == expected


def test_one_fold_a_long_name_and_the_plain_way_are_refused() -> None:
    with pytest.raises(ConfigError, match="`folds` must be 0"):
        job(folds=1)
    with pytest.raises(UsageError, match="without `folds`"):
        train(job())


def test_a_name_that_leaves_no_room_for_the_folds_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,label,patient_id\na.png,a,1\n")
    with pytest.raises(ConfigError, match="at most 56 characters"):
        cross_validate(job(name="n" * 60, labels={"table": str(tmp_path / "labels.csv")}))


def test_mean_and_spread_are_numpys_and_leave_out_what_a_fold_lacks() -> None:
    found = summarise(
        [{"val_f1": 0.5, "val_dice": None, "val_auroc": 0.7}, {"val_f1": 0.8, "val_dice": 0.3, "val_auroc": 0.9}]
    )
    assert found.keys() == {"val_f1", "val_auroc"}
    assert found["val_f1"] == pytest.approx((np.mean([0.5, 0.8]), np.std([0.5, 0.8], ddof=1)))


# Predictions


def _table() -> LabelTable:
    return LabelTable(
        uris=tuple(f"/data/{number}.png" for number in range(6)),
        masks=(None, "/m1.png", "/m2.png", None, "/m4.png", None),
        classes=("cavity", "consolidation", "nodule"),
        multi_label=False,
        labels=np.array([0, 1, 2, -1, 1, 0]),
        targets=None,
        patients=("A", "A", "B", "C", "C", "D"),
        splits=np.array(["train", "train", "val", "train", "train", "test"]),
    )


def _examples(table: LabelTable) -> tuple[Examples, np.ndarray[Any, Any], dict[int, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 1, *SIZE)).astype(np.uint8)
    masks = {1: np.zeros(SIZE, np.uint8), 2: np.zeros(SIZE, np.uint8), 4: np.ones(SIZE, np.uint8)}
    masks[2][10:30, 5:40] = 1
    rows = [
        {
            "index": row,
            "pixels": pixels[row].tobytes() if row not in (3, 5) else None,
            "mask": masks[row].tobytes() if row in masks else None,
            "digest": "",
            "error_code": "truncated" if row == 3 else "",
        }
        for row in range(6)
    ]
    examples = Examples([pa.Table.from_pylist(rows, SCHEMA)], Truth(table.labels, table.targets), 1, SIZE)
    return examples, pixels, masks


def test_out_of_fold_rows_are_what_the_predictor_says_and_failures_keep_their_code(bundle: Bundle) -> None:
    table = _table()
    examples, pixels, masks = _examples(table)
    codes = ("", "", "", "truncated", "", "")
    predictor = Predictor(bundle, "float32", "cpu")
    fold = fold_rows(table, np.array([0, 2, 3, 4, 1]), 2, codes, None)
    rows = {row["row"] - 1: row for row in predict_fold(predictor, examples, fold, 2).to_pylist()}
    assert list(rows) == [0, 2, 3, 4, 1]
    assert [rows[row]["true_label"] for row in (0, 1, 2, 3)] == ["cavity", "consolidation", "nodule", None]
    assert all(row["fold"] == 2 and row["model_id"] == bundle.model_id for row in rows.values())
    assert (rows[3]["error_code"], rows[3]["p_nodule"], rows[3]["predicted_label"]) == ("truncated", None, None)
    expected = predictor.predict(pixels)
    assert expected.probabilities is not None
    assert expected.masks is not None
    columns = tables.probability_columns(bundle.classes)
    for row in (0, 1, 2, 4):
        assert rows[row]["error_code"] is None
        np.testing.assert_allclose([rows[row][name] for name in columns], expected.probabilities[row], atol=1e-5)
        assert rows[row]["predicted_label"] == bundle.classes[expected.probabilities[row].argmax()]
        found = expected.masks[row] >= 0.5
        assert rows[row]["mask_fraction"] == pytest.approx(found.mean(), abs=2e-3)
        if row not in masks:
            assert (rows[row]["true_mask_fraction"], rows[row]["dice"], rows[row][BY_THRESHOLD]) == (None, None, None)
            continue
        true = masks[row] > 0
        areas = np.array([[(found & true).sum()], [found.sum()], [true.sum()]], dtype=float)
        assert rows[row]["dice"] == pytest.approx(dice_per_image(*areas)[0], abs=2e-3)
        counted = [rows[row][name] for name in PIXELS]
        assert counted[2] == true.sum()
        np.testing.assert_allclose(counted, areas[:, 0], atol=8)  # batches of another size round otherwise
        by_threshold = dict(zip(CANDIDATES.tolist(), rows[row][BY_THRESHOLD], strict=True))
        assert by_threshold[0.5] == pytest.approx(rows[row]["dice"], abs=1e-6)
        assert rows[row]["dice"] == pytest.approx(2 * counted[0] / (counted[1] + counted[2]))


def test_rows_name_images_and_patients_as_predictions_do_and_no_patient_is_in_them(tmp_path: Path) -> None:
    table = replace(_table(), patients=("DOE-A", "DOE-A", "DOE-B", "DOE-C", "DOE-C", "DOE-D"))
    facts = [{"height": 9, "width": 8, "frames": 1, "modality": "CT", **dict.fromkeys(GROUPS[1:])}] * 6
    fold = fold_rows(table, np.arange(6), 1, ("",) * 5 + ("corrupt",), None, facts=[*facts[:5], None])
    rows = pa.Table.from_pylist(fold.entries, schema=fold.schema)
    key = Pseudonymiser(b"k" * 32)
    found = identified(rows, table, None, key)
    assert found.schema == rows.schema
    assert found["image_id"].to_pylist() == list_uris(table.uris).objects["image_id"].to_pylist()
    assert found["patient_key"].to_pylist() == [key.patient(name) for name in table.patients]
    assert found["patient_number"].to_pylist() == [0, 0, 1, 2, 2, 3]
    assert found["modality"].to_pylist() == ["CT"] * 5 + [None]
    assert "DOE" not in str(found.to_pylist())
    assert identified(rows, table, None, None)["patient_key"].null_count == 6
    place = str(tmp_path / "fold.parquet")
    assert not is_current(place, table)
    pq.write_table(found.drop_columns(["patient_number"]), place)
    assert not is_current(place, table)  # of an earlier version: predicted again
    pq.write_table(rows, place)
    assert is_current(place, table)


def test_no_patient_and_no_plain_address_leaves_where_addresses_are_keyed() -> None:
    fold = fold_rows(_table(), np.array([0, 1]), 1, ("",) * 6, Pseudonymiser(b"k" * 32, PrivacyConfig(uri="hash")))
    assert "/data" not in str(fold.entries)
    assert not any("patient" in key for entry in fold.entries for key in entry)


def test_an_image_that_is_missing_or_twice_among_the_folds_is_an_error(tmp_path: Path) -> None:
    places = []
    for number, rows in enumerate(([3, 1], [2, 4])):
        places.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.table({"row": rows}), places[-1])
    assert join_folds(places, np.array([0, 1, 2, 3]))["row"].to_pylist() == [1, 2, 3, 4]
    for expected in ([0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2]):
        with pytest.raises(MedVisionError, match="once in the out-of-fold predictions"):
            join_folds(places, np.array(expected))
