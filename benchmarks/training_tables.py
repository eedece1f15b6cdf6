"""Label tables for the training benchmark, and the table of its results."""

from __future__ import annotations

import csv
import hashlib
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from medvision_ray.learning.splits import folds_by_patient

VALIDATION_SHARE = 0.1
SHOWN = (
    ("all", "accuracy"),
    ("macro", "f1"),
    ("macro", "auroc"),
    ("all", "dice"),
    ("all", "iou"),
    ("all", "missed_masks"),
)


def brain_labels(data: Path, target: Path, limit: int | None, fold: str | None) -> dict[str, Any]:
    """The rows whose image is an image file, in the splits that the table gives.

    Args:
        data: folder of the data set.
        target: where to write.
        limit: about how many images each split keeps, as whole patients; None keeps all.
        fold: `2of5` makes the second fifth of the train and val patients the val split, and leaves the test split out.
    """
    rows = _rows(data)
    kept = [row for row in rows if row["image"].lower().endswith((".jpg", ".jpeg", ".png"))]
    if fold is not None:
        kept = _with_fold(data, kept, fold)
    return {"rows": len(rows), **_write(target, kept, limit)}


def _with_fold(data: Path, rows: list[dict[str, str]], fold: str) -> list[dict[str, str]]:
    number, parts = (int(text) for text in fold.split("of"))
    rows = [row for row in rows if row["split"] != "test"]
    names = sorted({row["label"] for row in rows})
    found = folds_by_patient(
        [row["patient_id"] for row in rows],
        [names.index(row["label"]) for row in rows],
        [hashlib.sha256((data / row["image"]).read_bytes()).hexdigest() for row in rows],
        folds=parts,
        seed=0,
    )
    return [{**row, "split": "val" if place == number - 1 else "train"} for row, place in zip(rows, found, strict=True)]


def chest_labels(data: Path, target: Path, limit: int | None, fold: str | None) -> dict[str, Any]:
    """All rows; a tenth of each label's train images becomes val, as whole patients, exact copies on one side; no folds."""
    if fold is not None:
        raise SystemExit("Expected a whole recipe of chest X-rays, but a fold was asked for")
    rows = _rows(data)
    groups = _one_side(data, [row for row in rows if row["split"] == "train"])
    order = sorted(groups)
    random.Random(0).shuffle(order)
    wanted = {
        label: VALIDATION_SHARE * n for label, n in Counter(r["label"] for r in rows if r["split"] == "train").items()
    }
    taken: Counter[str] = Counter()
    for group in order:
        found = Counter(row["label"] for row in groups[group])
        if all(taken[label] + n <= wanted[label] for label, n in found.items()):
            taken.update(found)
            for row in groups[group]:
                row["split"] = "val"
    return {"rows": len(rows), **_write(target, rows, limit)}


def _rows(data: Path) -> list[dict[str, str]]:
    with (data / "labels.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def _one_side(data: Path, rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows by patient, patients that share an exact copy of a file together."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    first: dict[str, str] = {}
    for row in rows:
        digest = hashlib.sha256((data / row["image"]).read_bytes()).hexdigest()
        leader[find(row["patient_id"])] = find(first.setdefault(digest, row["patient_id"]))
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[find(row["patient_id"])].append(row)
    return groups


def _write(target: Path, rows: list[dict[str, str]], limit: int | None) -> dict[str, Any]:
    """Write a table once: a training is tied to its content."""
    if limit is not None:
        rows = _some(rows, limit)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    patients = {(row["split"], row["patient_id"]) for row in rows}
    return {
        "images": dict(Counter(row["split"] for row in rows)),
        "patients": dict(Counter(split for split, _ in patients)),
    }


def _some(rows: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """About `limit` images a split, its labels in equal parts, whole patients only."""
    labels = sorted({row["label"] for row in rows})
    patients: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        patients[row["split"], row["patient_id"]].append(row)
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for (split, _), found in patients.items():
        label = found[0]["label"]
        if taken[split, label] < limit / len(labels):
            taken[split, label] += len(found)
            kept += found
    return kept


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds of each recipe; for chest X-rays the epochs that each start needs."""
    recipes: dict[str, Any] = {}
    for name in dict.fromkeys(record["recipe"] for record in records):
        found = [record for record in records if record["recipe"] == name]
        row: dict[str, Any] = {"seeds": sorted(record["seed"] for record in found)}
        row["val_score"] = _mean([record["validation"]["val_score"] for record in found])
        for class_name, metric in SHOWN:
            values = [value for record in found if (value := _value(record, class_name, metric)) is not None]
            if values:
                row[metric] = _mean(values)
        row["images_per_second"] = _mean([record["images_per_second"] for record in found])
        recipes[name] = row
    return {"recipes": recipes, "chest_epochs_to_f1": _epochs_to_f1(records)}


def _value(record: dict[str, Any], class_name: str, metric: str) -> float | None:
    scored = record.get("test") or record.get("val") or []
    values = [row["value"] for row in scored if (row["class_name"], row["metric"]) == (class_name, metric)]
    return values[0] if values else None


def _mean(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def _epochs_to_f1(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each seed with both starts: the best validation F1 of the random start, and the first epoch of each to reach it."""
    chest = {(record["recipe"], record["seed"]): record["history"] for record in records}
    rows = []
    for (recipe, seed), history in chest.items():
        if recipe != "chest_random" or ("chest_transfer", seed) not in chest:
            continue
        target = max(epoch["val_f1"] for epoch in history)
        both = {"random": history, "transfer": chest["chest_transfer", seed]}
        first = {
            name: next((epoch["epoch"] for epoch in lines if epoch["val_f1"] >= target), None)
            for name, lines in both.items()
        }
        rows.append({"seed": seed, "val_f1": target, **first})
    return rows
