"""The same results on a GPU as on a CPU; skipped without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import AugmentConfig, RayConfig, ScoreJob, TrainJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.learning.augment import build_augment
from medvision_ray.logs import silent
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.run import score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

FLOAT32_TOLERANCE = 1e-4
"""Of probabilities: other kernels sum in another order."""
BF16_TOLERANCE = 3e-2
"""Of probabilities: 8 bits of mantissa through some fifty layers, beside float32."""


def _frames(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(3).integers(0, 256, (count, 1, 64, 64), dtype=np.uint8)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bf16", BF16_TOLERANCE)])
def test_a_gpu_predicts_what_a_cpu_predicts(bundle: Bundle, precision: str, tolerance: float) -> None:
    frames = _frames(37)
    expected = Predictor(bundle, "float32", "cpu").predict(frames)
    found = Predictor(bundle, precision, "cuda", batch_frames=64).predict(frames)
    for ours, theirs in ((found.probabilities, expected.probabilities), (found.masks, expected.masks)):
        assert ours is not None
        assert theirs is not None
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_frames_result_does_not_hang_on_its_company(bundle: Bundle, precision: str) -> None:
    frames = _frames(50)
    predictor = Predictor(bundle, precision, "cuda", batch_frames=32)
    whole = [prediction for prediction, _ in predictor.stream([frames[:32], frames[32:]])]
    uneven = [prediction for prediction, _ in predictor.stream([frames[:5], frames[5:30], frames[30:31], frames[31:]])]
    for name in ("probabilities", "masks"):
        one = np.concatenate([getattr(part, name) for part in whole])
        other = np.concatenate([getattr(part, name) for part in uneven])
        np.testing.assert_array_equal(one, other)


def test_a_batch_that_the_memory_does_not_hold_goes_in_halves(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = _frames(40)
    predictor = Predictor(bundle, "float32", "cuda")
    expected = predictor.predict(frames)
    compute, sizes = predictor._compute, []

    def small(batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        if len(batch) > 12:
            raise torch.OutOfMemoryError
        return compute(batch)

    monkeypatch.setattr(predictor, "_compute", small)
    found = predictor.predict(frames)
    assert sizes == [40, 20, 10, 10, 10, 10]
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(found.masks, expected.masks, rtol=0, atol=FLOAT32_TOLERANCE)


def test_a_gpu_augments_as_a_cpu_does() -> None:
    coarse = torch.rand((16, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    images = (255 * torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")).to(torch.uint8)
    masks = (images[:, 0] > 128).to(torch.uint8)
    augment = build_augment(AugmentConfig(), (64, 64))
    expected_images, expected_masks = augment(images, masks, 5)
    found_images, found_masks = augment(images.cuda(), masks.cuda(), 5)
    assert found_masks is not None
    assert expected_masks is not None
    difference = (found_images.cpu().int() - expected_images.int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).float().mean() < 0.01
    assert (found_masks.cpu() != expected_masks).float().mean() < 0.001


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[None]:
    with ray_session(RayConfig(), dashboard=True):
        yield


def _rows(archive: PhantomArchive, bundle: Bundle, output: Path, placement: str, precision: str) -> Any:
    settings = {
        "archive": {"uri": str(Path(archive.night_1).parent)},
        "bundle": bundle.uri,
        "output": str(output / placement),
        "privacy": {"demo_key": True},
        "scoring": {"block_rows": 8, "placement": placement, "precision": precision, "batch_size": 16},
        "budget": {"max_failure_fraction": 1.0},
    }
    score(build_job(ScoreJob, settings, "a test"), silent)
    found = []
    for name in ("predictions", "failures"):
        rows = tables.read(settings["output"], name)
        assert rows is not None
        own = [
            column for column in rows.column_names if column not in ("run_key", "run_date", "scored_at", "failed_at")
        ]
        found.append(rows.select(own).sort_by("image_id"))
    return found


@pytest.mark.integration
@pytest.mark.usefixtures("gpu_cluster")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_staged_and_fused_give_the_same_rows_on_a_gpu(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, precision: str
) -> None:
    staged, fused = (_rows(phantom, bundle, tmp_path, placement, precision) for placement in ("staged", "fused"))
    assert staged[0].num_rows > 20
    for one, other in zip(staged, fused, strict=True):
        assert one.drop_columns(["attempts"] if "attempts" in one.column_names else []).equals(
            other.drop_columns(["attempts"] if "attempts" in other.column_names else [])
        )


@pytest.mark.integration
@pytest.mark.usefixtures("gpu_cluster")
def test_an_epoch_trains_on_a_gpu(phantom: PhantomArchive, tmp_path: Path) -> None:
    from medvision_ray.learning.train import train

    settings = {
        "output": str(tmp_path),
        "name": "one-epoch",
        "labels": {"table": str(phantom.labels)},
        "preprocess": {"size": [64, 64]},
        "model": {"encoder": "resnet18", "decoder_channels": [32, 16, 16, 8, 8]},
        "epochs": 2,
        "batch_size": 4,
        "workers": 1,
        "use_gpu": True,
        "privacy": {"demo_key": True},
    }
    started = time.monotonic()
    result = train(build_job(TrainJob, settings, "a test"), lambda line: None)
    losses = [epoch["train_loss"] for epoch in result.history]
    assert len(losses) == 2
    assert all(np.isfinite(loss) for loss in losses)
    assert losses[1] < losses[0]
    assert time.monotonic() - started < 120
    Predictor(result.bundle, "float32", "cpu")  # what a GPU trained, a CPU can load


def test_a_gpu_explains_what_a_cpu_explains(bundle: Bundle) -> None:
    frames = _frames(11)
    expected = Predictor(bundle, "float32", "cpu").explain(frames, 1)
    found = Predictor(bundle, "bf16", "cuda").explain(frames, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
