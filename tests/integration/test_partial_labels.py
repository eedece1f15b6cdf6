"""One training on what a hospital has: blank findings, images with a mask only or labels only, rare findings; then its points."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ray
import torch

from medvision_ray import tables
from medvision_ray.bundle import load_bundle
from medvision_ray.calibration import PlattScaling
from medvision_ray.cluster import ray_session
from medvision_ray.config import EvaluateJob, RayConfig, TrainJob, build_job
from medvision_ray.evaluation.evaluate import evaluate
from medvision_ray.learning.train import train

SIZE = 64
SPLITS = {"train": 32, "val": 40, "test": 12}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    torch.set_num_threads(1)
    with ray_session(RayConfig(num_cpus=2), dashboard=True):
        yield
    ray.shutdown()


def write_site(folder: Path) -> Path:
    """Images of one patient each; `disc` is a bright disc, with a mask, `bar` a dark bar."""
    generator = np.random.default_rng(0)
    rows = []
    for split, count in SPLITS.items():
        for number in range(count):
            name = f"{split}-{number}"
            disc, bar = bool(number % 2), number % 5 < 2
            pixels = generator.normal(110, 12, (SIZE, SIZE))
            mask = np.zeros((SIZE, SIZE), np.uint8)
            if disc:
                cv2.circle(mask, (int(generator.integers(16, 48)), int(generator.integers(16, 48))), 8, 255, -1)
            pixels[mask > 0] += 90
            if bar:
                pixels[:, 4:14] -= 70
            cv2.imwrite(str(folder / f"{name}.png"), pixels.clip(0, 255).astype(np.uint8))
            cv2.imwrite(str(folder / f"{name}-mask.png"), mask)
            # A fifth has labels only, a fifth a mask only, and of the rest some findings are blank.
            rows.append(
                {
                    "image": f"{name}.png",
                    "mask": "" if number % 5 == 0 else f"{name}-mask.png",
                    "disc": "" if number % 5 == 1 else int(disc),
                    "bar": "" if number % 5 == 1 or number % 7 == 3 else int(bar),
                    "patient_id": name,
                    "split": split,
                }
            )
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return folder / "labels.csv"


@pytest.mark.integration
def test_partial_findings_train_calibrate_decide_and_are_measured_at_stored_points(tmp_path: Path) -> None:
    labels = {"table": str(write_site(tmp_path)), "findings": ["disc", "bar"]}
    common: dict[str, Any] = {"output": str(tmp_path / "out"), "labels": labels, "ray": {"num_cpus": 2}}
    options = {
        "name": "partial",
        "preprocess": {"size": [SIZE, SIZE], "percentiles": [0, 100]},
        "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
        "loss": {"classification": "asymmetric", "asymmetric_gammas": [0, 2], "class_weights": [1.0, 2.0]},
        "sampling": "balanced",
        "calibration": {"min_patients": 10, "only_if_better": False},
        "operating_points": {"decide_at": "f1", "cost": [5, 1]},
        "epochs": 4,
        "batch_size": 4,
        "learning_rate": 0.003,
        "ema_decay": 0.9,
        "workers": 2,
    }
    result = train(build_job(TrainJob, {**common, **options}, "the test"))
    assert all(math.isfinite(line["train_loss"]) and line["val_dice"] is not None for line in result.history)
    bundle = load_bundle(result.bundle.uri)
    assert bundle.classes == ("disc", "bar")
    assert bundle.architecture.segmentation
    assert isinstance(bundle.calibration, PlattScaling), bundle.trained["calibration"]
    points = {point.name: point for point in bundle.operating_points}
    assert set(points) == {"specificity_90", "specificity_95", "f1", "cost"}
    assert list(bundle.thresholds) == [one.threshold for one in points["f1"].thresholds if one is not None]
    known = {"disc": 32, "bar": 32 - sum(number % 7 == 3 and number % 5 != 1 for number in range(40))}
    for name, one in zip(bundle.classes, points["f1"].thresholds, strict=True):
        assert one is not None
        assert one.patients == known[name]
        counts = (one.true_positives, one.false_positives, one.false_negatives, one.true_negatives)
        assert sum(counts) == known[name]
    chosen = bundle.trained["mask_threshold"]  # healthy images, whose mask is empty, have their say
    assert (chosen["images"], chosen["patients"]) == (32, 32)
    assert bundle.mask_threshold == (0.5 if "reason" in chosen else chosen["best"])
    reliability = bundle.metrics["reliability"]["raw"]["disc"]
    assert sum(part["images"] for part in reliability) == known["disc"]

    settings = {**common, "privacy": {"demo_key": True}, "bundle": bundle.uri, "dataset": "site", "resamples": 20}
    found = evaluate(build_job(EvaluateJob, settings, "the test"), lambda *_, **__: None)  # type: ignore[arg-type]
    columns = ["uri", "p_disc", "p_bar", "c_disc", "c_bar", "predicted_label"]
    rows = tables.read(str(tmp_path / "out"), "predictions", columns).to_pandas()
    assert len(rows) == SPLITS["test"]
    raw = rows[["p_disc", "p_bar"]].to_numpy(np.float32)
    np.testing.assert_allclose(rows[["c_disc", "c_bar"]], bundle.calibration.apply(raw), rtol=1e-5)
    flagged = points["f1"].apply(raw)
    assert [set(filter(None, label.split("|"))) for label in rows["predicted_label"]] == [
        {name for name, on in zip(bundle.classes, row, strict=True) if on} for row in flagged
    ]
    number = rows["uri"].str.extract(r"test-(\d+)\.png")[0].astype(int).to_numpy()
    there = (number % 2 == 1) & (number % 5 != 1)
    assert found.value("sensitivity@f1", "disc") == pytest.approx(flagged[there, 0].mean())
    assert found.value("sensitivity@f1", "disc") == found.value("recall", "disc")  # decided at the same thresholds
    for name, pair in zip(bundle.classes, bundle.calibration.sigmoids, strict=True):
        assert (found.value("ece_calibrated", name) is None) == (pair is None)
    assert found.value("npv@cost", "bar") is not None or not (~points["cost"].apply(raw)[:, 1]).any()
