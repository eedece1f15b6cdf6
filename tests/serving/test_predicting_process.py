"""The predicting process: what it answers is what this process would, and its end costs only those that wait for it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvision_ray.bundle import Bundle
from medvision_ray.config import DecodeConfig
from medvision_ray.config.serving import ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.scoring.objects import Effort, ObjectReader
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving import predicting_process
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.local import LocalEngine
from medvision_ray.serving.model_memory import ModelMemory, StaleModelError
from medvision_ray.serving.predicting_process import PredictingProcess
from medvision_ray.serving.problems import RequestError

COSTS = {"scored_at", "predict_seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def job(bundle: Bundle) -> ServeJob:
    return ServeJob(bundles=(bundle.uri,), scale=ScaleConfig(batch_size=4))


@pytest.fixture(scope="module")
def process(job: ServeJob) -> Iterator[PredictingProcess]:
    process = PredictingProcess(job)
    yield process
    process.close()


@pytest.fixture(scope="module")
def outcomes(bundle: Bundle, phantom: PhantomArchive) -> list[Outcome]:
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    files = [path.read_bytes() for path in sorted(Path(phantom.night_1).rglob("*.dcm"))]
    entry = {"image_id": 0, "uri": "", "etag": ""}
    whole = [data for data in files if len(data) > 9999][:6]
    return [Outcome(entry, reader.prepare(data, Effort()), Effort(), 1) for data in whole]


def numbers(rows: list[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in COSTS} for row in rows]


def test_rows_and_explanations_are_those_of_this_process(
    process: PredictingProcess, job: ServeJob, bundle: Bundle, outcomes: list[Outcome]
) -> None:
    torch.set_num_threads(1)
    here = ModelMemory(job)
    items = [(bundle, outcome) for outcome in outcomes]
    there = process.score(items)
    assert numbers(there) == numbers(here.score(items))
    assert all(row["predict_seconds"] > 0 for row in there if isinstance(row, dict))
    assert process.loaded() == here.loaded() == {bundle.model_id}
    ready = outcomes[0].result
    assert np.array_equal(process.explain(bundle, ready, 0, 1), here.explain(bundle, ready, 0, 1))  # type: ignore[arg-type]


def test_threads_are_those_of_the_settings(job: ServeJob, bundle: Bundle, outcomes: list[Outcome]) -> None:
    items = [(bundle, outcomes[0])]
    running, scores = [], []
    for threads in (1, 3):
        process = PredictingProcess(job.model_copy(update={"scale": ScaleConfig(batch_size=4, threads=threads)}))
        (row,) = process.score(items)
        assert isinstance(row, dict)
        assert process._child is not None
        running.append(len(list(Path(f"/proc/{process._child.pid}/task").iterdir())))
        scores.append(row["predicted_probability"])
        process.close()
    assert running[1] >= running[0] + 2
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_an_answer_says_what_predicting_cost(
    process: PredictingProcess, job: ServeJob, phantom: PhantomArchive
) -> None:
    engine = LocalEngine(job, memory=process)
    data = next(Path(phantom.night_1).rglob("chest.dcm")).read_bytes()
    answer = asyncio.run(engine.predict(data, PredictOptions("0" * 32, explain="gradcam")))
    engine.decoders.close()
    timing = answer.timing
    assert timing.decode_ms > 0
    assert timing.predict_ms > 0
    assert timing.decode_ms + timing.preprocess_ms + timing.predict_ms < timing.total_ms
    assert answer.explanation is not None


def test_errors_come_through(process: PredictingProcess, bundle: Bundle, outcomes: list[Outcome]) -> None:
    gone = dataclasses.replace(bundle, name="gone", uri=f"{bundle.uri}-gone")
    stale, row = process.score([(gone, outcomes[0]), (bundle, outcomes[0])])
    assert isinstance(stale, StaleModelError)
    assert isinstance(row, dict)
    with pytest.raises(StaleModelError):
        process.load(gone)
    ready = outcomes[0].result
    wrong = dataclasses.replace(ready, pixels=ready.pixels[:, :, :-1, :-1])  # type: ignore[type-var, union-attr]
    (failed,) = process.score([(bundle, dataclasses.replace(outcomes[0], result=wrong))])
    assert isinstance(failed, DecodeError)
    assert (failed.code, failed.stage) == (ErrorCode.INTERNAL_ERROR, Stage.PREDICT)
    with pytest.raises(RuntimeError, match="predicting process raised"):
        process.explain(bundle, ready, 99, 1)  # type: ignore[arg-type]
    assert isinstance(process.score([(bundle, outcomes[0])])[0], dict)


def test_a_process_that_dies_is_replaced_and_its_batch_told_to_come_again(
    process: PredictingProcess, bundle: Bundle, outcomes: list[Outcome]
) -> None:
    process.load(bundle)
    child = process._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    killer = threading.Thread(target=lambda: (time.sleep(0.3), os.kill(child.pid, signal.SIGKILL)))
    killer.start()
    lost = process.score([(bundle, outcome) for outcome in outcomes])
    killer.join()
    assert [(error.status, error.code) for error in lost if isinstance(error, RequestError)] == [
        (503, "predictor_lost")
    ] * len(outcomes)
    assert process._call("loaded") == set()
    assert process._child is not child


def test_a_child_ends_with_its_parent(job: ServeJob) -> None:
    other = PredictingProcess(job)
    child = other._living()
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(30) == 0
    with pytest.raises(EOFError):
        predicting_process._read(child.stdout)
