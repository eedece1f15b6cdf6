"""Training in one process, without Ray Train: what a trial of a search runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import torch

from medvision_ray import storage
from medvision_ray.learning.feed import Examples
from medvision_ray.learning.history import append_epoch, read_history
from medvision_ray.learning.loop import TrainPlan, Worker, new_state

HISTORY = "metrics.jsonl"


def train_alone(plan: TrainPlan, tables: Iterable[pa.Table], device: torch.device) -> Iterator[dict[str, Any]]:
    """Train as the only worker, from the checkpoint under `plan.folder` where there is one; yields each new epoch's line.

    An epoch is yielded when its checkpoint and its line are written, so that whoever stops asking can go on later.

    Args:
        tables: Arrow tables of `ingest.SCHEMA`.
    """
    preprocess = plan.job.preprocess
    examples = Examples(tables, plan.truth, preprocess.channels, preprocess.size)
    examples.keep_on(device)
    place = storage.join(plan.folder, HISTORY)
    history = read_history(place)
    state = new_state(plan, device, with_weights=not history)
    with tempfile.TemporaryDirectory() as folder:
        if history:
            _copy(_checkpoint(plan, len(history)), folder)
            state.load(folder)
    worker = Worker(plan, examples, state, device=device, rank=0, world=1)
    while not worker.finished:
        figures = worker.run_epoch()
        with tempfile.TemporaryDirectory() as folder:
            state.save(folder)
            _copy(folder, _checkpoint(plan, state.epoch))
        append_epoch(place, figures)  # after its checkpoint: a line says that there is one
        storage.delete_tree(_checkpoint(plan, state.epoch - 1))
        yield figures


def _checkpoint(plan: TrainPlan, epoch: int) -> str:
    return storage.join(plan.folder, f"checkpoint-{epoch}")


def _copy(source: str, target: str) -> None:
    (here, place), (there, other) = storage.filesystem(source), storage.filesystem(target)
    there.create_dir(other)
    pafs.copy_files(place, other, source_filesystem=here, destination_filesystem=there)
