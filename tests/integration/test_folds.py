"""Cross-validation on a local Ray of two CPUs: folds side by side, each image predicted once, the folds as an ensemble."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from medvision_ray import tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import image_digest, load_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import RayConfig, ReportJob, TrainJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.learning.folds import cross_validate
from medvision_ray.learning.labels import load_labels
from medvision_ray.learning.train import TrainResult
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.reporting.collect import build_report

pytestmark = pytest.mark.integration
FOLDS = 2


@pytest.fixture(scope="module")
def validated(phantom: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.set_num_threads(1)
    data: dict[str, Any] = {
        "output": str(tmp_path_factory.mktemp("output")),
        "name": "cv",
        "labels": {"table": str(phantom.labels)},
        "preprocess": {"size": [64, 64]},
        "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
        "epochs": 1,
        "batch_size": 8,
        "workers": 1,
        "folds": FOLDS,
        "operating_points": {"class_offsets": "auto"},
        "privacy": {"demo_key": True},
    }
    job = build_job(TrainJob, data, "the test")
    lines: list[str] = []
    with ray_session(RayConfig(num_cpus=2), dashboard=True):
        yield job, cross_validate(job, lines.append), lines
    ray.shutdown()


def test_folds_side_by_side_leave_an_ensemble_and_every_image_once(
    validated: tuple[TrainJob, TrainResult, list[str]],
) -> None:
    job, result, lines = validated
    assert any("2 at once" in line for line in lines)
    table = load_labels(job.labels)
    rows = pq.read_table(f"{job.output}/training/cv/out_of_fold.parquet").to_pylist()
    seen = np.flatnonzero(table.splits != "test")
    assert [row["row"] for row in rows] == (seen + 1).tolist()
    assert [row["uri"] for row in rows] == [table.uris[row] for row in seen]
    assert all(row["p_nodule"] is not None and row["mask_fraction"] is not None for row in rows)
    ensemble = load_bundle(f"{job.output}/bundles/cv")
    assert ensemble.model_id == result.bundle.model_id
    assert set(ensemble.train_digest) == {image_digest(table.uris[row]) for row in seen}
    members = [load_bundle(f"{job.output}/bundles/cv-fold-{number}") for number in range(1, FOLDS + 1)]
    assert [one.content_hash for one in ensemble.members] == [one.content_hash for one in members]
    assert [(one.class_offsets, one.mask_threshold) for one in members] == [((), 0.5)] * FOLDS  # left to the whole
    assert {"class_offsets", "mask_threshold"} <= set(ensemble.trained)
    assert (
        sum("out of fold" not in line and ("class_offsets" in line or "mask_threshold" in line) for line in lines) == 2
    )
    for row in rows:  # no model speaks of an image that it was trained on
        member = members[row["fold"] - 1]
        assert row["model_id"] == member.model_id
        assert image_digest(row["uri"]) not in member.train_digest
    patients = [{table.patients[row["row"] - 1] for row in rows if row["fold"] == 1 + fold} for fold in range(FOLDS)]
    assert not patients[0] & patients[1]


def test_pooled_metrics_are_those_of_the_rows_and_the_report_shows_them(
    validated: tuple[TrainJob, TrainResult, list[str]],
) -> None:
    job, result, lines = validated
    rows = pq.read_table(f"{job.output}/training/cv/out_of_fold.parquet").to_pandas()
    table = load_labels(job.labels)
    key = load_pseudonymiser(job.privacy)
    assert rows["patient_key"].tolist() == [key.patient(table.patients[row - 1]) for row in rows["row"]]
    assert rows["image_id"].tolist() == list_uris(rows["uri"].tolist()).objects["image_id"].to_pylist()
    metrics = tables.read(job.output, "metrics")
    assert metrics is not None
    found = metrics.to_pandas()
    assert set(found["split"]) == {"out_of_fold"}
    assert set(found["model_id"]) == {result.bundle.model_id}
    whole = found[found["subgroup"] == "all"].set_index(["class", "metric"])
    right = rows["true_label"] == rows["predicted_label"]
    assert whole.loc[("all", "accuracy"), "value"] == pytest.approx(right[rows["true_label"].notna()].mean())
    assert whole.loc[("all", "dice"), "value"] == pytest.approx(rows["dice"][rows["true_mask_pixels"] > 0].mean())
    assert whole.loc[("all", "accuracy"), "n_patients"] == rows["patient_number"].nunique()
    assert any("out of fold accuracy" in line for line in lines)
    for kind in ("evaluation", "training"):
        settings = {"output": job.output, "bundle": result.bundle.uri, "kind": kind}
        page = Path(build_report(build_job(ReportJob, settings, "the test"))).read_text()
        assert "Cross-validation" in page
        assert "Near-duplicates in two splits" in page


def test_mean_and_spread_are_those_of_the_folds(validated: tuple[TrainJob, TrainResult, list[str]]) -> None:
    job, result, _ = validated
    written = json.loads(Path(f"{job.output}/training/cv/folds.json").read_text())
    losses = [row["metrics"]["val_loss"] for row in written["folds"]]
    assert written["mean"]["val_loss"] == pytest.approx(np.mean(losses))
    assert written["std"]["val_loss"] == pytest.approx(np.std(losses, ddof=1))
    assert result.bundle.metrics["val_loss_mean"] == written["mean"]["val_loss"]


def test_same_job_again_is_done_and_a_lost_ensemble_is_made_from_the_folds(
    validated: tuple[TrainJob, TrainResult, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, result, _ = validated
    assert cross_validate(job).summary["already_done"] is True
    Path(f"{job.output}/bundles/cv/bundle.yaml").unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a fold that was finished is trained or predicted again")

    monkeypatch.setattr("medvision_ray.learning.folds.train_decoded", refuse)
    monkeypatch.setattr("medvision_ray.learning.folds._predictions", refuse)
    again = cross_validate(job)
    assert again.summary["already_done"] is False
    assert again.bundle.model_id == result.bundle.model_id
