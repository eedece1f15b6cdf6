"""A search through Ray Tune on two CPUs: trials, early stops, the best as a train job, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch

from medvision_ray import storage
from medvision_ray.cluster import ray_session
from medvision_ray.config import RayConfig, TrainJob, TuneJob, build_job, load_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import UsageError
from medvision_ray.learning.alone import train_alone
from medvision_ray.learning.history import read_history
from medvision_ray.learning.labels import load_labels
from medvision_ray.learning.tune import TuneResult, tune

Searched = tuple[TuneJob, TuneResult, list[str], list[dict[str, Any]]]
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def searched(phantom: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.set_num_threads(1)
    job = build_job(
        TuneJob,
        {
            "train": {
                "output": str(tmp_path_factory.mktemp("output")),
                "labels": {"table": str(phantom.labels)},
                "preprocess": {"size": [64, 64]},
                "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
                "epochs": 3,
                "batch_size": 8,
                "workers": 2,
                "ray": {"num_cpus": 2},
            },
            "search": {
                "learning_rate": {"loguniform": [1e-4, 1e-2]},
                "model.pooling": {"grid": ["average", "mask_guided"]},
            },
            "samples": 2,
            "asha": {"reduction": 2.0},
            "name": "search",
        },
        "the test",
    )
    lines: list[str] = []
    with ray_session(RayConfig(num_cpus=2)):
        first = _killed_after_an_epoch(job)
        yield job, tune(job, lines.append), lines, first
    ray.shutdown()


def _killed_after_an_epoch(job: TuneJob) -> list[dict[str, Any]]:
    """What a search that was killed leaves of its first trial: one epoch."""

    def die(job: Any, base: Any, folder: str, trials: Any, progress: Any) -> None:
        tables = trials.datasets[0].iter_batches(batch_size=None, batch_format="pyarrow")
        next(train_alone(trials.plans[0], tables, torch.device("cpu")))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medvision_ray.learning.tune._run", die)
        with pytest.raises(KeyboardInterrupt):
            tune(job)
    return _history(job, 0)


def _history(job: TuneJob, trial: int) -> list[dict[str, Any]]:
    return read_history(f"{job.train.output}/tuning/search/trials/{trial:03}/metrics.jsonl")


def test_every_trial_has_a_row_and_the_best_is_a_train_job(searched: Searched) -> None:
    job, result, lines, _ = searched
    rows = pq.read_table(f"{job.train.output}/tuning/search/trials.parquet").to_pylist()
    assert rows == result.trials
    assert sorted(row["trial"] for row in rows) == [0, 1, 2, 3]
    assert [row["model.pooling"] for row in sorted(rows, key=lambda row: row["trial"])] == [
        "average",
        "mask_guided",
    ] * 2
    assert rows[0]["val_score"] == max(row["val_score"] for row in rows)
    for row in rows:
        history = _history(job, row["trial"])
        assert row["epochs"] == len(history)
        assert row["val_score"] == max(line["val_score"] for line in history)
        assert row["state"] == ("finished" if len(history) == 3 else "stopped")
    assert {"stopped", "finished"} == {row["state"] for row in rows}  # successive halving ends some early
    assert sum("epoch" in line and line.startswith("trial") for line in lines) == sum(row["epochs"] for row in rows) - 1
    best = load_job(TrainJob, result.best_uri)
    assert best.learning_rate == rows[0]["learning_rate"]
    assert best.model.pooling == rows[0]["model.pooling"]
    assert (best.epochs, best.workers, best.batch_size, best.output) == (3, 2, 8, job.train.output)


def test_the_test_split_is_not_even_read(searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _, _, _ = searched
    seen: list[str] = []

    def note(table: Any, *_: Any) -> None:
        seen.extend(table.uris)
        raise UsageError("seen enough")

    monkeypatch.setattr("medvision_ray.learning.tune.decode_images", note)
    with pytest.raises(UsageError, match="seen enough"):
        tune(job.model_copy(update={"name": "other"}))
    table = load_labels(job.train.labels)
    assert set(seen) == set(table.uris) - set(table.select("test").uris)


def test_a_killed_search_goes_on_where_its_trials_were(searched: Searched) -> None:
    job, _, lines, first = searched
    assert len(first) == 1
    assert _history(job, 0)[0] == first[0]  # the wall times in it would differ had it been trained again
    assert not any(line.startswith("trial 0: epoch 1/") for line in lines)
    assert any(line.startswith("trial 1: epoch 1/") for line in lines)


def test_a_finished_search_is_found_done(searched: Searched) -> None:
    job, result, _, _ = searched
    again = tune(job)
    assert again.summary["already_done"] is True
    assert again.trials == result.trials
    left = {path.name for path in (Path(job.train.output) / "tuning/search").rglob("*")}
    assert not {name for name in left if name.startswith("checkpoint") or name == "ray"}


def test_another_search_under_the_same_name_is_refused(searched: Searched) -> None:
    job, _, _, _ = searched
    with pytest.raises(UsageError, match="new name"):
        tune(job.model_copy(update={"samples": 3}))
    claim = json.loads(storage.read_bytes(f"{job.train.output}/tuning/search/tuning.json"))
    assert set(claim) == {"key"}
