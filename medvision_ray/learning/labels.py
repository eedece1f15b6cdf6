"""Label tables: read a CSV or Parquet, check it row by row, split it by patient."""

from __future__ import annotations

import io
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.config import LabelsConfig
from medvision_ray.errors import LabelError, StorageError
from medvision_ray.learning.splits import (
    SPLITS,
    SplitAssignment,
    duplicate_groups,
    patient_strata,
    row_numbers,
    split_by_patient,
)
from medvision_ray.tables import probability_columns

__all__ = ["LabelTable", "SplitAssignment", "duplicate_groups", "load_labels"]


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labelled images, one entry a row of the table, in its order.

    Attributes:
        uris: absolute address of each image.
        masks: absolute address of each mask; None where there is none.
        classes: class names in the order of the model's outputs; empty where the table has no labels.
        multi_label: classes are findings that may occur together.
        labels: class index, shape `(n,)`; -1 where blank, and throughout where `multi_label`.
        targets: 0 or 1 a finding, NaN where blank, shape `(n, classes)`; None unless `multi_label`.
        patients: patient of each image, surrounding blanks removed and in capitals as the pseudonyms take it. Never
            written anywhere: identifiers leave only as keyed pseudonyms.
        splits: `train`, `val` or `test`, shape `(n,)`.
        columns: further columns that were asked for, one text a row, empty where blank.
    """

    uris: tuple[str, ...]
    masks: tuple[str | None, ...]
    classes: tuple[str, ...]
    multi_label: bool
    labels: NDArray[np.int64]
    targets: NDArray[np.float32] | None
    patients: tuple[str, ...]
    splits: NDArray[np.str_]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SplitAssignment(self.patients, tuple(self.splits.tolist()))

    def __len__(self) -> int:
        return len(self.uris)

    def __repr__(self) -> str:
        return f"LabelTable({len(self)} images, classes={self.classes})"

    def select(self, split: str) -> LabelTable:
        """The rows of one split; classes stay as they are.

        Raises:
            LabelError: no split of that name.
        """
        if split not in SPLITS:
            raise LabelError(f"Expected a split of {', '.join(SPLITS)}, but got {split!r}.")
        return self.take(np.flatnonzero(self.splits == split))

    def take(self, rows: NDArray[np.int64]) -> LabelTable:
        """Some rows, in the order given; classes stay as they are."""
        return LabelTable(
            uris=tuple(self.uris[row] for row in rows),
            masks=tuple(self.masks[row] for row in rows),
            classes=self.classes,
            multi_label=self.multi_label,
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            patients=tuple(self.patients[row] for row in rows),
            splits=self.splits[rows],
            columns={name: tuple(cells[row] for row in rows) for name, cells in self.columns.items()},
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts of each split: images, patients, images per class (positives of a finding), masks, unlabelled."""
        return {split: self.select(split)._counts() for split in SPLITS}

    def _counts(self) -> dict[str, Any]:
        if self.targets is not None:
            per_class = np.nansum(self.targets, axis=0).astype(int)
            labelled = ~np.isnan(self.targets).all(axis=1)
        else:
            per_class = np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))
            labelled = self.labels >= 0
        masked = np.array([mask is not None for mask in self.masks], dtype=bool)
        return {
            "images": len(self),
            "patients": len(set(self.patients)),
            "classes": {name: int(count) for name, count in zip(self.classes, per_class, strict=True)},
            "with_mask": int(masked.sum()),
            "unlabelled": int((~labelled & ~masked).sum()),
        }


def load_labels(config: LabelsConfig, columns: Sequence[str] = ()) -> LabelTable:
    """Read and check a label table and give every row its split.

    Relative `image` and `mask` paths start from `config.root`, or from the table's own folder. A given split column is
    kept; where it has train but no val, val is taken out of train by patient; where it is absent or blank throughout, all
    three splits are made by patient from `config.fractions` and `config.seed`.

    Args:
        columns: further columns to keep as text; none of them the patient's.

    Raises:
        LabelError: the table cannot be used. The message gives counts and row numbers, and never quotes a cell, which
            can hold a patient's identifier.
        StorageError: the table cannot be read.
    """
    frame = _read_table(config.table)
    root = config.root if config.root is not None else posixpath.dirname(storage.absolute(config.table))
    uris = _images(frame, root)
    masks = tuple(_resolve(root, text) if text else None for text in _column(frame, "mask"))
    classes, labels, targets = _findings(frame, config) if config.findings else _labels(frame, config)
    labelled = (labels >= 0).any() if targets is None else bool((~np.isnan(targets)).any())
    if not labelled and not any(masks):
        wanted = "one of the columns in `labels.findings`" if config.findings else f"column `{config.label_column}`"
        raise LabelError(
            f"Expected a label ({wanted}) or a mask (column `mask`) in some row of the label table, but there is neither."
        )
    patients, splits = _splits(frame, config, uris, strata_classes(labels, targets))
    kept = {name: tuple(_column(frame, name)) for name in _further(frame, config, columns)}
    return LabelTable(uris, masks, classes, targets is not None, labels, targets, patients, splits, kept)


def _further(frame: pd.DataFrame, config: LabelsConfig, columns: Sequence[str]) -> Sequence[str]:
    if config.patient_column in columns:
        raise LabelError(f"Expected columns other than `{config.patient_column}`, which identifies patients.")
    if absent := [name for name in columns if name not in frame.columns]:
        raise LabelError(
            f"Expected the columns {', '.join(columns)} in the label table, but it lacks {', '.join(absent)}."
        )
    return columns


def _read_table(uri: str) -> pd.DataFrame:
    """All columns as text without surrounding blanks; blank and null cells are empty texts."""
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        if error.code == "read_error" and uri not in str(error):  # such as a folder
            raise StorageError(f"Expected a label table at {uri}, but it cannot be read. {error}") from None
        raise
    try:
        if uri.lower().endswith((".parquet", ".pq")):
            frame = _texts(pq.ParquetFile(io.BytesIO(data)).read())
        else:
            # utf-8-sig: Excel puts a byte order mark before the first column's name.
            frame = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pa.ArrowException):  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        raise LabelError(
            f"Expected a CSV file (UTF-8, commas) or a Parquet file at {uri}, but it cannot be parsed as one."
        ) from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise LabelError(f"Expected as many cells a row as the first line of {uri} names columns, but rows have more.")
    frame = frame.fillna("").rename(columns=str.strip)
    for name in frame.columns:
        frame[name] = frame[name].str.strip()
    if "image" not in frame.columns:
        raise LabelError(
            f"Expected a column `image` in the label table {uri}, but none of its {len(frame.columns)} columns has that "
            "name. The first line names the columns, in small letters and separated by commas."
        )
    if frame.empty:
        raise LabelError(f"Expected labelled images in {uri}, but the table has no rows.")
    return frame


_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def _texts(table: pa.Table) -> pd.DataFrame:
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_nested(column.type) or any(is_bytes(column.type) for is_bytes in _BYTES):
            continue
        if name in columns:
            raise LabelError("Expected different names of the label table's columns, but one occurs twice.")
        # Cast in Arrow: pandas would turn whole numbers beside nulls into floats, and an id 7 into "7.0".
        columns[name] = pc.fill_null(pc.cast(_plain(column), pa.string()), "").to_numpy()
    return pd.DataFrame(columns, dtype=str)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """True and false as 1 and 0; what is not a number as null."""
    if pa.types.is_boolean(column.type):
        return pc.cast(column, pa.int8())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def _column(frame: pd.DataFrame, name: str) -> list[str]:
    return [str(text) for text in frame[name]] if name in frame.columns else [""] * len(frame)


def _resolve(root: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return storage.absolute(path)
    return storage.absolute(storage.join(root, posixpath.normpath(path)))


def _images(frame: pd.DataFrame, root: str) -> tuple[str, ...]:
    paths = _column(frame, "image")
    blank = [row for row, path in enumerate(paths) if not path]
    if blank:
        raise LabelError(f"Expected a path in column `image` of every row, but it is blank in {row_numbers(blank)}.")
    uris = tuple(_resolve(root, path) for path in paths)
    counts = Counter(uris)
    repeated = [row for row, uri in enumerate(uris) if counts[uri] > 1]
    if repeated:
        raise LabelError(
            f"Expected one row an image, but {len({uris[row] for row in repeated})} images have several "
            f"({row_numbers(repeated)}). Keep one row of each; findings go into columns of the same row."
        )
    return uris


_Labels = tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.float32] | None]


def _labels(frame: pd.DataFrame, config: LabelsConfig) -> _Labels:
    names = _column(frame, config.label_column)
    classes = config.classes or tuple(sorted({name for name in names if name}))
    if len(set(classes)) != len(classes):
        raise LabelError("Expected different names in `labels.classes`, but one occurs twice.")
    probability_columns(classes)  # names that the tables could not tell apart are said here, not after a training
    index = {name: number for number, name in enumerate(classes)}
    unknown = [row for row, name in enumerate(names) if name and name not in index]
    if unknown:
        raise LabelError(
            f"Expected column `{config.label_column}` to be blank or one of `labels.classes` ({', '.join(classes)}), but "
            f"it is another name in {row_numbers(unknown)}. Correct the rows, or add their class to `labels.classes`."
        )
    return classes, np.array([index.get(name, -1) for name in names], dtype=np.int64), None


def _findings(frame: pd.DataFrame, config: LabelsConfig) -> _Labels:
    classes = config.classes or config.findings
    if sorted(classes) != sorted(set(config.findings)):
        raise LabelError("Expected `labels.classes` to be blank or the names in `labels.findings`, each once.")
    probability_columns(classes)
    missing = [name for name in classes if name not in frame.columns]
    if missing:
        raise LabelError(
            f"Expected a column for each of `labels.findings`, but there is none for {', '.join(missing)}."
        )
    targets = np.full((len(frame), len(classes)), np.nan, dtype=np.float32)
    for number, name in enumerate(classes):
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
        filled = (frame[name] != "").to_numpy(dtype=bool)
        wrong = np.flatnonzero(filled & ~np.isin(values, (0.0, 1.0)))
        if wrong.size:
            raise LabelError(
                f"Expected 0, 1 or blank in finding column `{name}`, but it is something else in "
                f"{row_numbers(wrong.tolist())}. An uncertain finding is left blank: it then adds nothing to the loss."
            )
        targets[filled, number] = values[filled]
    return classes, np.full(len(frame), -1, dtype=np.int64), targets


def strata_classes(labels: NDArray[np.int64], targets: NDArray[np.float32] | None) -> list[int]:
    """The class by which a row counts in stratifying: its label, or its first positive finding."""
    if targets is None:
        return [int(label) for label in labels]
    positive = np.nan_to_num(targets) > 0
    return [int(row.argmax()) if row.any() else -1 for row in positive]


def _splits(
    frame: pd.DataFrame, config: LabelsConfig, uris: tuple[str, ...], classes: list[int]
) -> tuple[tuple[str, ...], NDArray[np.str_]]:
    given = _given_splits(frame, config)
    train, val, test = config.fractions
    divide: dict[str, float] = {}  # how the patients of a missing split are taken, and from which rows
    if given is None:
        divide, source = {"train": train, "val": val, "test": test}, list(range(len(uris)))
    elif "train" in given and "val" not in given and val > 0:
        divide = {"train": train / (train + val), "val": val / (train + val)}
        source = [row for row, split in enumerate(given) if split == "train"]
    patients = _patients(frame, config, uris, made=bool(divide))
    splits = given or [""] * len(uris)
    if divide:
        if given is not None:
            SplitAssignment(patients, tuple(given))  # before val is made: the message is about the given rows
        strata = patient_strata([patients[row] for row in source], [classes[row] for row in source])
        assigned = split_by_patient(strata, divide, config.seed)
        for row in source:
            splits[row] = assigned[patients[row]]
    return patients, np.array(splits, dtype=np.str_)


def _given_splits(frame: pd.DataFrame, config: LabelsConfig) -> list[str] | None:
    splits = _column(frame, config.split_column)
    if not any(splits):
        return None
    unknown = [row for row, split in enumerate(splits) if split and split not in SPLITS]
    if unknown:
        raise LabelError(
            f"Expected column `{config.split_column}` to be one of {', '.join(SPLITS)} (`val`, not `validation`), but it "
            f"is something else in {row_numbers(unknown)}."
        )
    blank = [row for row, split in enumerate(splits) if not split]
    if blank:
        raise LabelError(
            f"Expected column `{config.split_column}` to be filled in every row or in none, but it is blank in "
            f"{row_numbers(blank)}. Fill them, or clear the column to have splits made by patient."
        )
    return splits


def _patients(frame: pd.DataFrame, config: LabelsConfig, uris: tuple[str, ...], made: bool) -> tuple[str, ...]:
    name = config.patient_column
    if name not in frame.columns:
        if made:
            raise LabelError(
                f"A split by patient needs column `{name}`, but the label table has none, and its `{config.split_column}` "
                "column does not give train, val and test. Name the column in `labels.patient_column`, or fill in the "
                "splits (val too) with each patient's images in one of them."
            )
        return uris
    # Blanks around and letter case do not make another patient, as for the pseudonyms (privacy.py).
    patients = tuple(text.upper() for text in _column(frame, name))
    blank = [row for row, patient in enumerate(patients) if not patient]
    if blank:
        raise LabelError(
            f"Expected a patient in column `{name}` of every row, but it is blank in {row_numbers(blank)}. Give an image "
            "of an unknown patient an identifier of its own only if it cannot be of another patient in the table."
        )
    return patients
