"""The scoring actors: blocks of inventory rows in, exactly as many result rows written.

`ScoringWorker` does an object's whole way (the fused plan). In the staged plan `PrepareWorker`
goes as far as the model's uint8 input and `PredictWorker`, on a GPU, does the rest.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from medvision_ray import monitoring
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.native import reuse_freed_memory
from medvision_ray.scoring.attempts import block_attempt
from medvision_ray.scoring.objects import Effort, Failure, PreparedObject
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.preparing import Outcome, Preparer
from medvision_ray.scoring.rows import SCORED, to_table, write_rows
from medvision_ray.scoring.settings import WorkerSettings

_CHUNK_BYTES = 64 << 20
"""Prepared pixels that cross to a predicting actor at once, about."""

_CROSSING = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("attempts", pa.int32()),
        pa.field("effort", pa.string()),
        pa.field("failure", pa.string()),
        pa.field("facts", pa.string()),
        pa.field("pixels", pa.large_binary()),
    ]
)


class ScoringWorker:
    """Scores blocks; state is the loaded model and what reads ahead."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._bundle = _start(settings)
        self._make = _row_maker(settings, self._bundle)
        self._preparer = Preparer(settings, self._bundle.preprocess)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a block of inventory rows and write one row for each, or fewer past the deadline; answers how many."""
        entries = block.to_pylist()
        if not entries or self._settings.past_deadline:
            return _count(0)
        self._preparer.read_ahead(entries)
        with block_attempt(self._settings.run_folder, "prepare", entries) as earlier:
            rows = self._make.rows(self._preparer.prepare(entries, earlier))
            write_rows(to_table(rows, self._bundle.classes), self._settings.run_folder)
        _record(rows, self._settings, self._make.batch_size)
        return _count(len(rows))


class PrepareWorker:
    """Prepares blocks for a `PredictWorker`; needs no model and no GPU."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._preparer = Preparer(settings, _start(settings).preprocess)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Prepare a block of inventory rows; chunks hold whole objects, in order."""
        entries = block.to_pylist()
        if not entries or self._settings.past_deadline:
            yield _CROSSING.empty_table()
            return
        self._preparer.read_ahead(entries)
        with block_attempt(self._settings.run_folder, "prepare", entries) as earlier:
            chunk: list[dict[str, Any]] = []
            size = 0
            for outcome in self._preparer.prepare(entries, earlier):
                chunk.append(_pack(outcome))
                size += len(chunk[-1]["pixels"] or b"")
                if size >= _CHUNK_BYTES:
                    yield pa.Table.from_pylist(chunk, schema=_CROSSING)
                    chunk, size = [], 0
            yield pa.Table.from_pylist(chunk, schema=_CROSSING)


class PredictWorker:
    """Scores prepared blocks; state is the loaded model."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._bundle = _start(settings)
        self._make = _row_maker(settings, self._bundle)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score prepared objects and write one row for each; answers how many."""
        if chunk.num_rows == 0:
            return _count(0)
        entries = chunk.select(["image_id"]).to_pylist()
        with block_attempt(self._settings.run_folder, "predict", entries) as earlier:
            outcomes = _unpack(chunk)
            if earlier >= self._settings.scoring.max_attempts:
                lost = Failure.of(DecodeError(ErrorCode.WORKER_CRASH, Stage.PREDICT, attempts=earlier))
                outcomes = (Outcome(item.entry, lost, item.effort, earlier) for item in outcomes)
            rows = self._make.rows(outcomes)
            write_rows(to_table(rows, self._bundle.classes), self._settings.run_folder)
        _record(rows, self._settings, self._make.batch_size)
        return _count(len(rows))


def _count(rows: int) -> pa.Table:
    """What crosses back to the driver of a block whose rows are written."""
    return pa.table({"rows": pa.array([rows], pa.int64())})


def _start(settings: WorkerSettings) -> Bundle:
    """One thread for native code (the actors are the parallelism), freed memory kept, the bundle read."""
    import cv2

    cv2.setNumThreads(1)
    reuse_freed_memory()
    return load_bundle(settings.bundle_uri)


def _row_maker(settings: WorkerSettings, bundle: Bundle) -> RowMaker:
    import torch

    from medvision_ray.scoring.predictor import Predictor

    torch.set_num_threads(1)
    size = settings.scoring.batch_size or (128 if torch.cuda.is_available() else 16)
    predictor = Predictor(bundle, settings.scoring.precision, batch_frames=size)
    return RowMaker(bundle, predictor, size, settings.scoring.save_masks, reduced=settings.decode.reduced)


def _record(rows: list[dict[str, Any]], settings: WorkerSettings, batch_size: int) -> None:
    """Tell the cluster's metrics what a block was."""
    frames = sum(row.get("frames") or 0 for row in rows)
    monitoring.record_block(
        Counter(row.get("error_code") or SCORED for row in rows),
        {name: sum(row[f"{name}_seconds"] for row in rows) for name in ("read", "decode", "preprocess", "predict")},
        bytes_read=sum(row["bytes_read"] for row in rows),
        frames=frames,
        batches=math.ceil(frames / batch_size),
        verb=settings.job,
    )


def _pack(outcome: Outcome) -> dict[str, Any]:
    names = ("image_id", "uri", "etag", "size")
    result = outcome.result
    failed = isinstance(result, Failure)
    return {
        **{name: outcome.entry[name] for name in names},
        "attempts": outcome.attempts,
        "effort": json.dumps(vars(outcome.effort)),
        "failure": json.dumps(vars(result)) if failed else None,
        "facts": None if isinstance(result, Failure) else json.dumps(result.facts()),
        "pixels": None if isinstance(result, Failure) else np.ascontiguousarray(result.pixels).tobytes(),
    }


def _unpack(chunk: pa.Table) -> Iterator[Outcome]:
    """Outcomes of a chunk; pixels are views of its memory."""
    small = chunk.drop_columns(["pixels"]).to_pylist()
    pixels = chunk["pixels"]
    for index, row in enumerate(small):
        if row["failure"] is not None:
            result: PreparedObject | Failure = Failure(**json.loads(row["failure"]))
        else:
            result = PreparedObject.from_facts(json.loads(row["facts"]), memoryview(pixels[index].as_buffer()))
        yield Outcome(row, result, Effort(**json.loads(row["effort"])), row["attempts"])
