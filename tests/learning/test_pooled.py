"""Pooled out-of-fold metrics: against scikit-learn, by patient, once a cross-validation; nothing here starts a Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import TrainJob, build_job
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.mask_threshold import CANDIDATES
from medvision_ray.learning.out_of_fold import BY_THRESHOLD, schema
from medvision_ray.learning.pooled import SPLIT, choose_pooled, commit_pooled, pooled_metrics

CLASSES = ("cavity", "consolidation", "nodule")
SIZE = (64, 64)
N = 120


def table_of(rows: list[dict[str, Any]], *, findings: bool = False) -> pa.Table:
    targets = np.zeros((0, len(CLASSES)), np.float32) if findings else None
    labels = LabelTable((), (), CLASSES, findings, np.zeros(0, np.int64), targets, (), np.zeros(0, np.str_))
    return pa.Table.from_pylist(rows, schema=schema(labels))


def rows(*, findings: bool = False, images: int = 2) -> list[dict[str, Any]]:
    """Predictions with masks on every other image, two that failed, `images` a patient."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(N):
        truth = int(rng.integers(3))
        probabilities = rng.dirichlet(np.where(np.arange(3) == truth, 3.0, 1.0)).astype(np.float32)
        row: dict[str, Any] = {
            "row": number + 1, "uri": f"/{number}.png", "fold": 1, "patient_number": number // images,
            "patient_sex": "F" if number < 60 else "M", "model_id": "m", "mask_fraction": 0.1,
            "predicted_label": CLASSES[int(probabilities.argmax())],
            **{f"p_{name}": float(value) for name, value in zip(CLASSES, probabilities, strict=True)},
        }  # fmt: skip
        if findings:
            row |= {f"t_{name}": float(rng.random() < 0.5) if number % 5 else None for name in CLASSES}
        else:
            row["true_label"] = CLASSES[truth] if number % 10 else None
        if number % 2:
            areas = {"overlap_pixels": number, "mask_pixels": number + 20, "true_mask_pixels": 150}
            row |= {**areas, "dice": 2 * number / (number + 170)}
        found.append(row)
    kept = ("row", "uri", "fold", "patient_number")
    failed = [{name: row[name] for name in kept} | {"error_code": "corrupt"} for row in found[:2]]
    return [*failed, *found[2:]]


def measured(found: pa.Table, *, findings: bool = False) -> dict[tuple[str, str], Any]:
    metrics = pooled_metrics(found.to_pandas(), CLASSES, findings, size=SIZE, seed=0)
    return {(row.class_name, row.metric): row for row in metrics if row.subgroup == "all"}


def test_classes_and_masks_are_measured_as_scikit_learn_does_and_failures_are_counted() -> None:
    table = table_of(rows())
    found = measured(table)
    frame = table.to_pandas()
    known = frame[frame["true_label"].notna()]
    scores = known[[f"p_{name}" for name in CLASSES]].to_numpy()
    truth = known["true_label"]
    assert found["all", "accuracy"].value == pytest.approx(accuracy_score(truth, known["predicted_label"]))
    assert found["macro", "f1"].value == pytest.approx(f1_score(truth, known["predicted_label"], average="macro"))
    auroc = np.mean([roc_auc_score(truth == name, scores[:, k]) for k, name in enumerate(CLASSES)])
    assert found["macro", "auroc"].value == pytest.approx(auroc, abs=1e-9)
    assert found["all", "dice"].value == pytest.approx(frame["dice"].mean())
    assert (found["all", "dice"].n_images, found["all", "failed_images"].value) == (59, 2.0)
    for key in (("all", "accuracy"), ("macro", "auroc"), ("all", "dice")):
        assert found[key].ci_low < found[key].value < found[key].ci_high


def test_intervals_are_over_patients() -> None:
    """Copies of an image are no news: six images a patient that are one image six times leave the interval as it was."""
    single = [row for row in rows(images=1) if row.get("true_label")]
    copies = [{**row, "row": 0} for row in single for _ in range(6)]
    one, six = measured(table_of(single)), measured(table_of(copies))
    for key in (("all", "accuracy"), ("macro", "auroc"), ("all", "dice")):
        assert (one[key].ci_low, one[key].ci_high) == pytest.approx((six[key].ci_low, six[key].ci_high))
        assert (six[key].n_images, six[key].n_patients) == (6 * one[key].n_images, one[key].n_patients)


def test_findings_are_decided_at_a_half_and_blank_ones_left_out() -> None:
    table = table_of(rows(findings=True), findings=True)
    found, frame = measured(table, findings=True), table.to_pandas()
    known = frame[frame["t_nodule"].notna()]
    expected = f1_score(known["t_nodule"], known["p_nodule"] >= 0.5)
    assert found["nodule", "f1"].value == pytest.approx(expected)
    precision = average_precision_score(known["t_nodule"], known["p_nodule"])
    assert found["nodule", "average_precision"].value == pytest.approx(precision, abs=1e-9)


def test_subgroups_are_measured_and_add_up() -> None:
    metrics = pooled_metrics(table_of(rows()).to_pandas(), CLASSES, False, size=SIZE, seed=0)
    images = {
        row.subgroup_value: row.value for row in metrics if (row.subgroup, row.metric) == ("patient_sex", "images")
    }
    assert images == {"F": 58.0, "M": 60.0}
    sizes = {row.subgroup_value for row in metrics if row.subgroup == "mask_size"}
    assert sizes == {"over 2 %", "unknown"}  # 150 of 4096 pixels


def test_where_everything_failed_failures_alone_are_told() -> None:
    failed = [{**row, "error_code": "corrupt"} for row in rows()]
    metrics = pooled_metrics(table_of(failed).to_pandas(), CLASSES, False, size=SIZE, seed=0)
    assert [(row.metric, row.value) for row in metrics] == [("failed_images", float(N))]


def skewed_rows(patients: int, skew: Any) -> pa.Table:
    """Predictions that favour classes by `skew`, and masks that were drawn too small: Dice is best at 0.3."""
    rng = np.random.default_rng(4)
    found = []
    for number in range(2 * patients):
        fair = rng.normal(0, 1.5, 3)
        stated = softmax(fair + skew)
        found.append(
            {
                "row": number + 1,
                "patient_number": number // 2,
                "true_label": CLASSES[rng.choice(3, p=softmax(fair))],
                **{f"p_{name}": float(value) for name, value in zip(CLASSES, stated, strict=True)},
                "mask_fraction": 0.1,
                BY_THRESHOLD: (0.8 - np.abs(CANDIDATES - 0.3) / 5 + rng.normal(0, 0.01, len(CANDIDATES))).tolist(),
            }
        )
    failed = {"row": 0, "patient_number": 0, "true_label": "nodule", "error_code": "corrupt"}
    return table_of([failed, *found])


def pooled_job(**settings: Any) -> TrainJob:
    points = {"operating_points": {"class_offsets": "auto"}}
    return build_job(TrainJob, {"output": "o", "labels": {"table": "t.csv"}, **points, **settings}, "the test")


def test_the_ensemble_decides_as_was_best_out_of_fold() -> None:
    frame = skewed_rows(120, (0.0, 0.8, -1.5)).to_pandas()
    found = choose_pooled(frame, pooled_job(), CLASSES, False)
    np.testing.assert_allclose(np.array(found.class_offsets) - found.class_offsets[0], (0.0, -0.8, 1.5), atol=0.4)
    assert found.mask_threshold == 0.3
    for option in ("class_offsets", "mask_threshold"):
        assert found.facts[option]["patients"] == 120
        assert 0 < found.facts[option]["gain"][1] < found.facts[option]["gain"][0]


def test_what_is_not_shown_or_was_given_is_left_alone() -> None:
    fair = choose_pooled(skewed_rows(120, 0.0).to_pandas(), pooled_job(), CLASSES, False)
    assert fair.class_offsets == ()
    assert "not shown" in fair.facts["class_offsets"]["reason"]
    given = pooled_job(mask_threshold=0.4, operating_points={"class_offsets": "none"})
    found = choose_pooled(skewed_rows(120, (0.0, 0.8, -1.5)).to_pandas(), given, CLASSES, False)
    assert (found.class_offsets, found.mask_threshold, found.facts) == ((), None, {})
    findings = choose_pooled(table_of(rows(findings=True), findings=True).to_pandas(), pooled_job(), CLASSES, True)
    assert (findings.class_offsets, findings.mask_threshold) == ((), None)


def test_they_are_committed_once_under_the_ensemble_and_rows_of_earlier_versions_are_not(
    bundle: Bundle, tmp_path: Path
) -> None:
    job = build_job(TrainJob, {"output": str(tmp_path), "labels": {"table": "/data/lungs/labels.csv"}}, "the test")
    place, told = str(tmp_path / "out_of_fold.parquet"), []
    ensemble = replace(bundle, name="cv")
    pq.write_table(table_of(rows()).drop_columns(["overlap_pixels"]), place)
    commit_pooled(job, ensemble, "hash", place, told.append)
    assert tables.read(job.output, "metrics") is None
    pq.write_table(table_of(rows()), place)
    for _ in range(2):
        commit_pooled(job, ensemble, "hash", place, told.append)
    found = tables.read(job.output, "metrics")
    assert found is not None
    frame: pd.DataFrame = found.to_pandas()
    facts = frame[["dataset", "split", "model_id"]].drop_duplicates().to_numpy().tolist()
    assert facts == [["lungs", SPLIT, ensemble.model_id]]
    assert ((frame["metric"] == "accuracy") & (frame["subgroup"] == "all")).sum() == 1
    assert any(line.startswith("cv: out of fold accuracy 0.") for line in told)
