"""Label tables: real tables, hand-made refusals, splits by patient."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvision_ray.config import LabelsConfig
from medvision_ray.errors import LabelError, StorageError
from medvision_ray.learning.labels import LabelTable, SplitAssignment, duplicate_groups, load_labels

SECRET = "DOE-JANE-1970"


def write(folder: Path, text: str) -> LabelsConfig:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return LabelsConfig(table=str(folder / "labels.csv"))


def rows(n_patients: int, images: int = 2) -> list[str]:
    return [f"p{p}_{i}.png,{'ab'[p % 2]},{SECRET}-{p}" for p in range(n_patients) for i in range(images)]


def refused(config: LabelsConfig, *words: str) -> str:
    with pytest.raises(LabelError) as caught:
        load_labels(config)
    message = str(caught.value)
    assert SECRET not in message
    for word in words:
        assert word in message
    return message


# Real tables


def test_brain_mri_keeps_its_split_and_finds_each_mask(data_dir: Path) -> None:
    path = data_dir / "brain_mri/labels.csv"
    table = load_labels(LabelsConfig(table=str(path)))
    with path.open() as stream:
        given = list(csv.DictReader(stream))
    assert table.splits.tolist() == [row["split"] for row in given]
    assert [table.classes[label] for label in table.labels] == [row["label"] for row in given]
    assert table.classes == ("glioma", "meningioma", "pituitary")
    assert Path(table.uris[0]).is_file()
    assert all(Path(str(mask)).is_file() for mask in table.masks)
    test = [row for row in given if row["split"] == "test"]
    assert table.summary()["test"] == {
        "images": len(test),
        "patients": len({row["patient_id"] for row in test}),
        "classes": {name: sum(row["label"] == name for row in test) for name in table.classes},
        "with_mask": len(test),
        "unlabelled": 0,
    }


def test_chest_xray_gets_a_val_split_out_of_train_only(data_dir: Path) -> None:
    path = data_dir / "chest_xray/labels.csv"
    table = load_labels(LabelsConfig(table=str(path)))
    with path.open() as stream:
        given = [row["split"] for row in csv.DictReader(stream)]
    assert [s == "test" for s in given] == [s == "test" for s in table.splits]
    patients = {s: set(table.select(s).patients) for s in ("train", "val", "test")}
    assert not patients["train"] & patients["val"]
    share = len(patients["val"]) / (len(patients["val"]) + len(patients["train"]))
    assert share == pytest.approx(0.15 / 0.85, abs=0.001)
    pneumonia = {s: table.select(s).labels.mean() for s in ("train", "val")}
    assert pneumonia["val"] == pytest.approx(pneumonia["train"], abs=0.02)


def test_chest_ct_without_splits_is_split_by_patient(data_dir: Path) -> None:
    table = load_labels(LabelsConfig(table=str(data_dir / "chest_ct_dicom/labels.csv")))
    patients = {s: set(table.select(s).patients) for s in ("train", "val", "test")}
    assert sum(map(len, patients.values())) == len(set(table.patients)) == 54
    assert (len(patients["train"]), len(patients["val"]), len(patients["test"])) == (38, 8, 8)


# Splits


def test_a_made_split_does_not_depend_on_row_order(tmp_path: Path) -> None:
    lines = rows(20)
    first = load_labels(write(tmp_path, "\n".join(["image,label,patient_id", *lines])))
    second = load_labels(write(tmp_path, "\n".join(["image,label,patient_id", *reversed(lines)])))
    assert dict(zip(first.uris, first.splits, strict=True)) == dict(zip(second.uris, second.splits, strict=True))


def test_another_seed_makes_another_split(tmp_path: Path) -> None:
    config = write(tmp_path, "\n".join(["image,label,patient_id", *rows(20)]))
    other = load_labels(config.model_copy(update={"seed": 1}))
    assert (load_labels(config).splits != other.splits).any()


def test_a_made_split_is_stratified_by_the_patients_class(tmp_path: Path) -> None:
    lines = [f"{p}.png,{'rare' if p < 20 else 'common'},{p}" for p in range(200)]
    table = load_labels(write(tmp_path, "\n".join(["image,label,patient_id", *lines])))
    rare = Counter(table.splits[table.labels == table.classes.index("rare")].tolist())
    assert rare == {"train": 14, "val": 3, "test": 3}


def test_patient_ids_that_are_numbers_or_differ_in_case_and_blanks_are_one_text(tmp_path: Path) -> None:
    text = "image,label,patient_id,split\na.png,a,ab1,train\nb.png,b, AB1 ,train\nc.png,a,7,val\n"
    assert load_labels(write(tmp_path, text)).patients == ("AB1", "AB1", "7")


def test_parquet_with_whole_number_ids_beside_nulls_reads_as_csv_does(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    columns = {"image": ["a.png", "b.png"], "x": [1, None], "y": [True, False], "patient_id": [7, 8]}
    pq.write_table(pa.table({**columns, "split": ["train", "val"]}), path)
    table = load_labels(LabelsConfig(table=str(path), findings=("x", "y")))
    assert table.patients == ("7", "8")
    assert table.targets is not None
    np.testing.assert_array_equal(table.targets, np.array([[1, 1], [np.nan, 0]], dtype=np.float32))


def parquet(folder: Path, columns: dict[str, pa.Array]) -> LabelsConfig:
    pq.write_table(pa.table(columns), folder / "labels.parquet")
    return LabelsConfig(table=str(folder / "labels.parquet"), findings=("nodule",))


def test_parquet_cells_that_are_not_a_number_are_blank_and_columns_of_bytes_are_left_out(tmp_path: Path) -> None:
    bytes_of = [b"x", b"y", b"z"]
    columns = {
        "image": pa.array(["1.png", "2.png", "3.png"]),
        "patient_id": pa.array([7.0, 8.0, 9.0]),
        "nodule": pa.array([1.0, float("nan"), 0.0]),
        "thumbnail": pa.array(bytes_of, pa.large_binary()),
        "hash": pa.array(bytes_of, pa.binary(1)),
        "split": pa.array(["train", "val", "test"]),
    }
    table = load_labels(parquet(tmp_path, columns))
    assert table.patients == ("7", "8", "9")
    assert table.targets is not None
    assert np.array_equal(table.targets[:, 0], [1, np.nan, 0], equal_nan=True)
    unknown = {**columns, "patient_id": pa.array([7.0, float("nan"), float("nan")]), "split": pa.array([""] * 3)}
    refused(parquet(tmp_path, unknown), "patient_id")


def test_a_folder_in_place_of_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(f"a label table at {tmp_path}, but it cannot be read")):
        load_labels(LabelsConfig(table=str(tmp_path)))


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a.png"])] * 2, names=["image", "image"]), tmp_path / "l.parquet")
    refused(LabelsConfig(table=str(tmp_path / "l.parquet")), "one occurs twice")


def test_blanks_around_the_names_of_columns_are_no_part_of_them(tmp_path: Path) -> None:
    table = load_labels(write(tmp_path, "image, label ,patient_id, split\na.png,x,1,train\nb.png,y,2,val\n"))
    assert (table.classes, table.splits.tolist()) == (("x", "y"), ["train", "val"])


def test_classes_that_the_tables_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "image,label,patient_id\na.png,Normal,1\nb.png,normal,2\n"), "letter case")
    config = write(tmp_path, "image,Nodule,nodule,patient_id\na.png,1,0,1\n")
    refused(config.model_copy(update={"findings": ("Nodule", "nodule")}), "letter case")


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(tmp_path: Path) -> None:
    config = write(tmp_path, "image,label,split\n./x/a.png,a,train\n/data/b.png,b,val\ns3://k/c.png,b,test\n")
    table = load_labels(config.model_copy(update={"root": "s3://bucket/set"}))
    assert table.uris == ("s3://bucket/set/x/a.png", "/data/b.png", "s3://k/c.png")


def test_without_patients_a_full_split_makes_each_image_its_own_patient(tmp_path: Path) -> None:
    table = load_labels(write(tmp_path, "image,label,split\na.png,a,train\nb.png,b,val\nc.png,b,test\n"))
    assert table.patients == table.uris


def test_a_label_table_cannot_exist_with_a_patient_in_two_splits(tmp_path: Path) -> None:
    table = load_labels(write(tmp_path, "image,label,split\na.png,a,train\nb.png,b,val\n"))
    with pytest.raises(LabelError, match="rows 1, 2"):
        LabelTable(table.uris, table.masks, table.classes, False, table.labels, None, (SECRET, SECRET), table.splits)


def test_blank_labels_and_masks_are_none_and_counted(tmp_path: Path) -> None:
    text = "image,label,mask,split\na.png,a,,train\nb.png,,m.png,train\nc.png,,,train\nd.png,b,,val\n"
    table = load_labels(write(tmp_path, text))
    assert table.labels.tolist() == [0, -1, -1, 1]
    assert table.masks == (None, str(tmp_path / "m.png"), None, None)
    train = table.summary()["train"]
    assert (train["with_mask"], train["unlabelled"], train["classes"]) == (1, 1, {"a": 1, "b": 0})


# Refusals: each names rows and what to do, never a cell


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{SECRET},b\nx,y\n", ("column `image`", "2 columns")),
        ("image,label,split\n", ("no rows",)),
        (f"image,label,split\n{SECRET}.png,a,train\n./{SECRET}.png,b,val\n", ("one row an image", "rows 1, 2")),
        ("image,label,split\na.png,a,train\n,b,val\n", ("blank in row 2",)),
        (f"image,label,split\na.png,a,train\nb.png,b,{SECRET}\n", ("`validation`", "row 2")),
        ("image,label,patient_id,split\na.png,a,1,train\nb.png,b,2,\n", ("in every row or in none", "row 2")),
        (
            f"image,label,patient_id,split\na.png,a,1,train\nb.png,b,{SECRET},train\nc.png,b,{SECRET},test\n",
            ("1 of 2 patients", "rows 2, 3"),
        ),
        (f"image,label,patient_id,split\na.png,a,{SECRET},train\nb.png,b,,val\n", ("blank in row 2",)),
        ("image,label\na.png,a\nb.png,b\n", ("A split by patient needs column `patient_id`",)),
        ("image,label,split\na.png,a,train\nb.png,b,test\n", ("A split by patient needs column `patient_id`",)),
        (f"image,patient_id\na.png,{SECRET}\n", ("neither",)),
        (f"image,label,patient_id\na.png,a,{SECRET}\nb.png,b,{SECRET}2\n", ("with 2 patients", "stays empty")),
        (f"image,label\na.png,a,{SECRET}\nb.png,b,{SECRET}\n", ("rows have more",)),
        (f"image,label\na.png,a\nb.png,b,{SECRET},{SECRET}\n", ("cannot be parsed",)),
    ],
)
def test_an_unusable_table_is_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(write(tmp_path, text), *words)


def test_a_label_outside_the_given_classes_is_refused_without_its_text(tmp_path: Path) -> None:
    config = write(tmp_path, f"image,label,split\na.png,a,train\nb.png,{SECRET},val\n")
    refused(config.model_copy(update={"classes": ("a", "b")}), "(a, b)", "row 2")


@pytest.mark.parametrize("value", ["-1", "2", "yes", SECRET])
def test_a_finding_other_than_0_1_or_blank_is_refused(tmp_path: Path, value: str) -> None:
    config = write(tmp_path, f"image,edema,split\na.png,1,train\nb.png,{value},val\n")
    refused(config.model_copy(update={"findings": ("edema",)}), "`edema`", "row 2", "left blank")


def test_a_finding_without_its_column_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, "image,edema,split\na.png,1,train\n")
    refused(config.model_copy(update={"findings": ("edema", "mass")}), "none for mass")


def test_a_split_assignment_with_an_overlap_refuses_to_exist() -> None:
    with pytest.raises(LabelError) as caught:
        SplitAssignment((SECRET, "b", SECRET), ("train", "val", "test"))
    assert "rows 1, 3" in str(caught.value)
    assert SECRET not in str(caught.value)


# Duplicates


def test_duplicates_count_only_across_splits_and_unread_images_match_nothing() -> None:
    digests = ["x", "y", "x", "z", "z", "", ""]
    splits = ["train", "train", "test", "train", "train", "train", "test"]
    assert duplicate_groups(digests, splits) == [[0, 2]]
