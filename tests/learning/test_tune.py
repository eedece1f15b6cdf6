"""The search space, its refusals, and training in one process with its resume; nothing here starts a Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from medvision_ray.cli import main
from medvision_ray.config import TrainJob, TuneJob, build_job, show_job
from medvision_ray.errors import ConfigError, UsageError
from medvision_ray.learning.alone import train_alone
from medvision_ray.learning.feed import Truth
from medvision_ray.learning.history import read_history
from medvision_ray.learning.ingest import SCHEMA
from medvision_ray.learning.loop import TrainPlan
from medvision_ray.learning.search_space import draw_trials, trial_job
from medvision_ray.learning.tune import ranked

TRAIN = {"output": "/out", "labels": {"table": "/labels.csv"}}
SIZE = (32, 32)


def search(space: dict[str, Any], **options: Any) -> TuneJob:
    return build_job(TuneJob, {"train": TRAIN, "search": space, **options}, "the test")


def test_draws_keep_their_ranges_and_equal_seeds_draw_the_same() -> None:
    space = {
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.1, 0.5]},
        "batch_size": {"randint": [4, 6]},
        "model.decoder_channels": {"choice": [[8, 8, 8, 8, 8], [16, 16, 8, 8, 8]]},
    }
    trials = draw_trials(search(space, samples=400))
    rates = np.array([trial["learning_rate"] for trial in trials])
    assert 1e-4 <= rates.min() < 2e-4
    assert 5e-3 < rates.max() <= 1e-2
    assert math.isclose(float(np.log10(rates).mean()), -3, abs_tol=0.1)  # even in the logarithm
    assert {trial["batch_size"] for trial in trials} == {4, 5, 6}
    assert all(0.1 <= trial["model.dropout"] <= 0.5 for trial in trials)
    assert {len(trial["model.decoder_channels"]) for trial in trials} == {5}
    assert draw_trials(search(space, samples=400)) == trials
    assert draw_trials(search(space, samples=400, seed=1)) != trials


def test_grids_are_combined_and_each_combination_is_drawn_as_often() -> None:
    space = {"epochs": {"grid": [3, 5]}, "seed": {"grid": [0, 1, 2]}, "learning_rate": {"uniform": [0.1, 0.2]}}
    trials = draw_trials(search(space, samples=2))
    assert [(trial["epochs"], trial["seed"]) for trial in trials] == [(e, s) for e in (3, 5) for s in (0, 1, 2)] * 2
    assert len({trial["learning_rate"] for trial in trials}) == 12


def test_a_trial_is_the_train_job_with_its_values_and_without_whom_to_tell() -> None:
    base = build_job(TrainJob, {**TRAIN, "on_finish": {"webhook": "https://example.org/x"}}, "the test")
    job = trial_job(
        base, {"learning_rate": 0.5, "preprocess.clahe.clip_limit": 3.0, "model.pooling": "mask_guided"}, "x"
    )
    assert job.preprocess.clahe is not None
    assert (job.learning_rate, job.preprocess.clahe.clip_limit, job.model.pooling) == (0.5, 3.0, "mask_guided")
    assert job.on_finish.webhook is None
    assert base.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rat": 0.1}, "did you mean `learning_rate`"),
        ({"model.dropout": 2.0}, "`model.dropout`"),
        ({"model.encoder": 3}, "`model.encoder`: expected text"),
    ],
)
def test_options_that_the_train_job_refuses_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"trial 3(.|\n)*{words}"):
        trial_job(build_job(TrainJob, TRAIN, "the test"), values, "trial 3")


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "names no option"),
        ({"workers": {"choice": [1]}}, "`search.workers` is no hyperparameter"),
        ({"labels.fractions": {"choice": [1]}}, "is no hyperparameter"),
        ({"seed": {}}, "exactly one of choice, grid"),
        ({"seed": {"normal": [0, 1]}}, "exactly one of choice, grid"),
        ({"seed": {"choice": [1], "grid": [1]}}, "exactly one of choice, grid"),
        ({"seed": {"choice": []}}, "has no values"),
        ({"learning_rate": {"uniform": [1, 0]}}, "lower end first"),
        ({"learning_rate": {"uniform": [1]}}, "must be two numbers"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "above 0"),
        ({"seed": {"randint": [0, 1.5]}}, "two whole numbers"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(space: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search(space)


def test_a_cross_validation_is_not_tuned() -> None:
    with pytest.raises(ConfigError, match="tune first"):
        search({"seed": {"choice": [1]}}, train={**TRAIN, "folds": 3})


def test_the_train_job_of_another_file_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.yaml").write_text(json.dumps({**TRAIN, "epochs": 7}))
    (tmp_path / "tune.yaml").write_text(json.dumps({"search": {"seed": {"choice": [1]}}}))
    seen: list[TuneJob] = []

    def note(job: TuneJob, *_: Any) -> None:
        seen.append(job)
        raise UsageError("seen")

    monkeypatch.setattr("medvision_ray.learning.tune.tune", note)
    command = ["tune", "--config", str(tmp_path / "tune.yaml"), "--train", str(tmp_path / "train.yaml")]
    assert main([*command, "--set", "train.batch_size=3"]) == 2
    assert (seen[0].train.epochs, seen[0].train.batch_size) == (7, 3)


def test_a_trial_that_failed_after_a_good_epoch_is_not_the_best() -> None:
    rows = [
        {"trial": number, "state": state, "val_score": score}
        for number, (state, score) in enumerate(
            [("failed", 0.9), ("stopped", 0.7), ("finished", 0.85), ("failed", None)]
        )
    ]
    assert [row["trial"] for row in ranked(rows)] == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "brain mri"}, "a name has letters"),
        ({"name": "../x"}, "a name has letters"),
        ({"name": ""}, "a name has letters"),
        ({"name": "n" * 65}, "at most 64"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"augment": {"scale": [1.1, 0.9]}}, "smallest zoom and the largest"),
    ],
)
def test_what_would_only_fail_after_the_training_is_refused_before(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_job(TrainJob, {**TRAIN, **values}, "the test")


def test_every_option_of_a_search_is_shown() -> None:
    job = search({"seed": {"choice": [1, 2]}})
    assert "search: {seed: {choice: [1, 2]}}" in show_job(TuneJob, job)
    assert "# search: (required)" in show_job(TuneJob)


# Training in one process


@pytest.fixture
def plan(tmp_path: Path) -> TrainPlan:
    job = build_job(
        TrainJob,
        {
            **TRAIN,
            "preprocess": {"size": list(SIZE)},
            "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
            "epochs": 3,
            "batch_size": 4,
            "precision": "float32",
        },
        "the test",
    )
    truth = Truth(np.arange(12) % 2, None)
    rows = np.arange(12)
    return TrainPlan(job, str(tmp_path / "trial"), job.model, ("a", "b"), truth, rows[:8], rows[8:], None)


@pytest.fixture
def decoded() -> list[pa.Table]:
    rng = np.random.default_rng(0)
    rows = [
        {
            "index": row,
            "pixels": rng.integers(0, 256, (1, *SIZE)).astype(np.uint8).tobytes(),
            "mask": (rng.random(SIZE) > 0.7).astype(np.uint8).tobytes(),
            "digest": "",
            "error_code": "",
        }
        for row in range(12)
    ]
    return [pa.Table.from_pylist(rows, SCHEMA)]


def _figures(lines: Any) -> list[dict[str, float]]:
    times = ("seconds", "images_per_second", "wait_seconds")
    return [  # NaN is null in a history
        {key: None if value is None or math.isnan(value) else value for key, value in line.items() if key not in times}
        for line in lines
    ]


def test_a_trial_that_was_stopped_goes_on_to_the_same_end(
    plan: TrainPlan, decoded: list[pa.Table], tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    whole = _figures(train_alone(plan, decoded, cpu))
    assert [line["epoch"] for line in whole] == [1, 2, 3]
    other = replace(plan, folder=str(tmp_path / "other"))
    first: Iterator[dict[str, Any]] = train_alone(other, decoded, cpu)
    assert _figures([next(first)]) == whole[:1]
    del first  # the scheduler, or a kill, ends it between two epochs
    assert _figures(train_alone(other, decoded, cpu)) == whole[1:]
    assert _figures(read_history(f"{other.folder}/metrics.jsonl")) == whole
    assert sorted(path.name for path in Path(other.folder).glob("checkpoint-*")) == ["checkpoint-3"]
    assert list(train_alone(other, decoded, cpu)) == []


def test_a_checkpoint_without_its_line_is_an_epoch_that_is_done_again(
    plan: TrainPlan, decoded: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    whole = _figures(train_alone(plan, decoded, cpu))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    Path(plan.folder, "metrics.jsonl").unlink()
    trial = train_alone(plan, decoded, cpu)
    next(trial)
    with monkeypatch.context() as patch:
        patch.setattr("medvision_ray.learning.alone.append_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            next(trial)
    assert _figures(train_alone(plan, decoded, cpu)) == whole[1:]
