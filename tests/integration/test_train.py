"""The Ray Train job on a local Ray of two CPUs: order of batches, ingest, bundle, resume, refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from medvision_ray.bundle import image_digest, load_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import RayConfig, TrainJob, build_job
from medvision_ray.demo.archive import PhantomArchive, make_archive
from medvision_ray.errors import LabelError, MedVisionError, UsageError
from medvision_ray.learning.feed import Examples, Truth, epoch_batches, plain_batches, steps_per_epoch
from medvision_ray.learning.history import append_epoch, read_history
from medvision_ray.learning.ingest import check_images, decode_images
from medvision_ray.learning.labels import load_labels
from medvision_ray.learning.train import TrainResult, train


@pytest.mark.parametrize(("n", "world", "batch"), [(1, 4, 8), (5, 2, 16), (90, 2, 16), (101, 3, 7)])
def test_every_worker_gets_batches_of_the_same_sizes_and_all_rows_are_seen(n: int, world: int, batch: int) -> None:
    rows = np.arange(100, 100 + n)
    shares = [epoch_batches(rows, seed=1, epoch=3, rank=rank, world=world, batch_size=batch) for rank in range(world)]
    sizes = [[len(part) for part in share] for share in shares]
    assert all(size == sizes[0] for size in sizes)
    assert len(sizes[0]) == steps_per_epoch(n, world, batch)
    assert max(sizes[0]) <= batch
    seen = np.concatenate([np.concatenate(share) for share in shares])
    assert set(seen) == set(rows)
    assert len(seen) < n + world


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(
            epoch_batches(np.arange(50), seed=seed, epoch=epoch, rank=0, world=2, batch_size=8)
        ).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_each_validation_row_is_on_exactly_one_worker() -> None:
    rows = np.arange(11)
    seen = [row for rank in range(3) for part in plain_batches(rows, rank=rank, world=3, batch_size=2) for row in part]
    assert sorted(seen) == rows.tolist()


def test_history_drops_the_epochs_of_a_lost_run(tmp_path: Path) -> None:
    place = str(tmp_path / "metrics.jsonl")
    for epoch, loss in ((1, 3.0), (2, float("nan")), (3, 1.0), (2, 1.5)):
        append_epoch(place, {"epoch": epoch, "train_loss": loss})
    assert read_history(place) == [{"epoch": 1, "train_loss": 3.0}, {"epoch": 2, "train_loss": 1.5}]


def test_undefined_figures_are_null_in_history(tmp_path: Path) -> None:
    place = str(tmp_path / "metrics.jsonl")
    append_epoch(place, {"epoch": 1, "val_dice": float("nan")})
    assert json.loads(Path(place).read_text()) == {"epoch": 1, "val_dice": None}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> PhantomArchive:
    return make_archive(tmp_path_factory.mktemp("phantoms") / "archive", patients=15)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    torch.set_num_threads(1)
    with ray_session(RayConfig(num_cpus=2), dashboard=True):
        yield


def _job(archive: PhantomArchive, output: Path, **options: Any) -> TrainJob:
    data: dict[str, Any] = {
        "output": str(output),
        "name": "tiny",
        "labels": {"table": str(archive.labels)},
        "preprocess": {"size": [64, 64]},
        "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
        "epochs": 2,
        "batch_size": 8,
        "ray": {"num_cpus": 2},
        **options,
    }
    return build_job(TrainJob, data, "the test")


@pytest.fixture(scope="module")
def trained(local_ray: None, archive: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("output")
    lines: list[str] = []
    return _job(archive, output), train(_job(archive, output), lines.append), lines


@pytest.mark.integration
def test_training_with_two_workers_leaves_a_bundle_and_every_epoch(trained: tuple[TrainJob, TrainResult, Any]) -> None:
    job, result, lines = trained
    bundle = load_bundle(f"{job.output}/bundles/tiny")
    assert bundle.model_id == result.bundle.model_id
    assert bundle.classes == ("cavity", "consolidation", "nodule")
    written = read_history(f"{job.output}/training/tiny/metrics.jsonl")
    assert [line["epoch"] for line in written] == [1, 2]
    assert result.history == written
    assert sum("epoch" in line for line in lines) == 2
    assert bundle.trained["best_score"] == max(line["val_score"] for line in written)
    assert list(Path(f"{job.output}/training/tiny/tensorboard").iterdir())
    assert not Path(f"{job.output}/training/tiny/candidate").exists()


@pytest.mark.integration
def test_bundle_remembers_exactly_the_images_it_was_trained_on(trained: tuple[TrainJob, TrainResult, Any]) -> None:
    job, result, _ = trained
    table = load_labels(job.labels).select("train")
    assert set(result.bundle.train_digest) == {image_digest(uri) for uri in table.uris}


@pytest.mark.integration
def test_bundle_has_the_fingerprint_of_its_training(trained: tuple[TrainJob, TrainResult, Any]) -> None:
    job, result, _ = trained
    table = load_labels(job.labels)
    fingerprint = load_bundle(result.bundle.uri).fingerprint
    assert fingerprint is not None
    features = fingerprint.features
    scores = {"p_cavity", "p_consolidation", "p_nodule", "mask_fraction"}
    assert {"input_mean", "height", "row_spacing_mm", "modality", "manufacturer", *scores} <= set(features)
    train, val = table.select("train"), table.select("val")
    assert (features["input_mean"].images, features["input_mean"].patients) == (len(train), len(set(train.patients)))
    assert {features[name].split for name in scores} == {"val"}
    assert 0 < features["p_nodule"].images <= len(val)
    written = Path(f"{result.bundle.uri}/fingerprint.json").read_text()
    assert not [name for name in (*table.patients, *table.uris) if name in written]
    leakage = result.summary["leakage"]
    assert leakage["near_duplicates"]["compared"] == len(table)
    assert result.bundle.trained["leakage"] == leakage
    assert result.summary["shortcuts"]["sentence"]


@pytest.mark.integration
def test_same_job_again_is_done_at_once(trained: tuple[TrainJob, TrainResult, Any]) -> None:
    job, result, _ = trained
    started = time.monotonic()
    again = train(job)
    assert time.monotonic() - started < 3
    assert again.summary["already_done"] is True
    assert again.bundle == result.bundle
    assert again.history == result.history


@pytest.mark.integration
def test_another_configuration_under_the_same_name_is_refused(trained: tuple[TrainJob, TrainResult, Any]) -> None:
    job, _, _ = trained
    with pytest.raises(UsageError, match="new name"):
        train(job.model_copy(update={"seed": 1}))


@pytest.mark.integration
def test_more_workers_than_cpus_are_refused_before_anything_is_decoded(
    local_ray: None, archive: PhantomArchive, tmp_path: Path
) -> None:
    with pytest.raises(MedVisionError, match="Expected 3 CPUs for 3 workers"):
        train(_job(archive, tmp_path, workers=3))


def _table(archive: PhantomArchive, place: Path, change: Any) -> Path:
    with archive.labels.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["image"] = str(archive.folder / row["image"])
        row["mask"] = str(archive.folder / row["mask"]) if row["mask"] else ""
    change(rows)
    with place.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return place


@pytest.mark.integration
def test_broken_images_and_masks_of_another_size_are_counted_by_code(
    local_ray: None, archive: PhantomArchive, tmp_path: Path
) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        rows[0]["image"] = str(tmp_path / "absent.dcm")
        rows[1]["mask"] = str(tmp_path / "small.png")

    import cv2

    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((8, 8), np.uint8))
    labels = {"table": str(_table(archive, tmp_path / "labels.csv", change))}
    job = _job(archive, tmp_path, labels=labels)
    table = load_labels(job.labels)
    decoded = decode_images(table, job)
    assert decoded.failures == {"dimension_mismatch": 1, "not_found": 1}
    assert np.flatnonzero(~decoded.usable).tolist() == [0, 1]
    with pytest.raises(MedVisionError, match=r"2 did \(dimension_mismatch 1, not_found 1\).*rows 1, 2"):
        check_images(table, decoded, 0.01)
    check_images(table, decoded, 0.5)


@pytest.mark.integration
def test_a_copy_of_a_training_image_in_the_test_split_is_refused(
    local_ray: None, archive: PhantomArchive, tmp_path: Path
) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        copied = next(row for row in rows if row["split"] == "test")
        (tmp_path / "copy.bin").write_bytes(Path(rows[0]["image"]).read_bytes())
        copied.update(image=str(tmp_path / "copy.bin"), mask="")

    job = _job(archive, tmp_path, labels={"table": str(_table(archive, tmp_path / "labels.csv", change))})
    table = load_labels(job.labels)
    with pytest.raises(LabelError, match="1 images have an exact copy in another split"):
        check_images(table, decode_images(table, job), 0.0)


@pytest.mark.integration
def test_decoded_pixels_are_those_of_the_single_process_way(
    local_ray: None, archive: PhantomArchive, tmp_path: Path
) -> None:
    from medvision_ray.imaging.decode import decode
    from medvision_ray.imaging.preprocess import prepare

    job = _job(archive, tmp_path)
    table = load_labels(job.labels)
    decoded = decode_images(table, job)
    tables = decoded.dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    examples = Examples(tables, Truth(table.labels, table.targets), 1, (64, 64))
    rows = np.flatnonzero(table.splits == "train")
    batch = examples.batch(rows)
    for place, row in enumerate(rows):
        image = decode(Path(table.uris[row]).read_bytes(), job.decode)
        assert np.array_equal(batch.images[place], prepare(image, job.preprocess).pixels[image.frames // 2])
        assert bool(batch.has_mask[place]) == (table.masks[row] is not None)


_LONGEST_SECONDS = 400  # on a machine with four times as much to do; a training hangs if it takes longer
_DRIVER = """
import sys
from medvision_ray.config import TrainJob
from medvision_ray.learning.train import train
job = TrainJob.model_validate_json(sys.argv[1])
result = train(job, lambda line: print(line, flush=True))
"""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_driver_resumes_to_the_model_of_an_undisturbed_training(archive: PhantomArchive, tmp_path: Path) -> None:
    job = _job(archive, tmp_path, epochs=6)
    command = [sys.executable, "-c", _DRIVER, job.model_dump_json()]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    history = tmp_path / "training/tiny/metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + _LONGEST_SECONDS
        while len(read_history(str(history))) < 2 and time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    before = read_history(str(history))
    assert 2 <= len(before) < 6
    assert not (tmp_path / "bundles/tiny").exists()
    subprocess.run(command, env=environment, check=True, timeout=_LONGEST_SECONDS, capture_output=True)
    after = read_history(str(history))
    assert [line["epoch"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert after[0] == before[0]  # the wall times in it would differ had it been trained again
    bundle = load_bundle(str(tmp_path / "bundles/tiny"))
    assert bundle.trained["epochs"] == 6
    undisturbed = train(_job(archive, tmp_path / "undisturbed", epochs=6))
    assert [_trained(line) for line in undisturbed.history] == [_trained(line) for line in after]
    assert undisturbed.bundle.model_id == bundle.model_id  # which hangs on each bit of the weights


def _trained(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without how long it took."""
    return {key: value for key, value in line.items() if key not in ("seconds", "images_per_second", "wait_seconds")}


@pytest.fixture(autouse=True, scope="module")
def _no_ray_left() -> Iterator[None]:
    yield
    ray.shutdown()
