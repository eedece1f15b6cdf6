"""The scoring actor: a block of inventory rows in, exactly as many result rows out.

Before it starts on a block it leaves a marker in the run's folder. An actor that finds the marker
of an earlier attempt knows that the block killed its worker, and prepares each of its objects in a
process of its own: the object at fault gets a failure row and the others their predictions.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import DecodeConfig, ScoringConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.preprocess import preprocess_id
from medvision_ray.native import reuse_freed_memory
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.isolated import IsolatedReader
from medvision_ray.scoring.objects import Failure, ObjectReader, PreparedObject
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.rows import FrameResult, failed_row, frame_result, scored_row, to_table

_READ_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True)
class WorkerSettings:
    """What an actor needs to know."""

    bundle_uri: str
    run_folder: str
    scoring: ScoringConfig
    decode: DecodeConfig
    pseudonymiser: Pseudonymiser


@dataclass
class _Open:
    """An object whose frames are on their way through the model."""

    place: int
    entry: dict[str, Any]
    ready: PreparedObject
    results: list[FrameResult] = field(default_factory=list)


class ScoringWorker:
    """Scores blocks; state is the loaded model and a thread pool for reading ahead."""

    def __init__(self, settings: WorkerSettings) -> None:
        import cv2
        import torch

        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        reuse_freed_memory()
        self._settings = settings
        self._bundle: Bundle = load_bundle(settings.bundle_uri)
        self._predictor = Predictor(self._bundle, settings.scoring.precision)
        self._reader = ObjectReader(settings.decode, self._bundle.preprocess, settings.pseudonymiser)
        self._preprocess_id = preprocess_id(self._bundle.preprocess)
        self._pool = ThreadPoolExecutor(settings.scoring.read_threads)
        self._watchdog = _Watchdog(settings.decode.max_seconds)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a block of inventory rows; the answer has one row for each."""
        entries = block.to_pylist()
        if not entries:
            return to_table([], self._bundle.classes)
        marker = storage.join(self._settings.run_folder, "inflight", str(entries[0]["image_id"]))
        earlier = _attempts(marker)
        storage.write_bytes(marker, json.dumps({"attempts": earlier + 1}).encode())
        if earlier >= self._settings.scoring.max_attempts:
            lost = Failure.of(DecodeError(ErrorCode.WORKER_CRASH, Stage.PREDICT, attempts=earlier))
            rows = [failed_row(entry, lost, earlier) for entry in entries]
        else:
            rows = self._score(entries, alone=earlier > 0, attempts=earlier + 1)
        storage.delete_object(marker)
        return to_table(rows, self._bundle.classes)

    def _score(self, entries: list[dict[str, Any]], alone: bool, attempts: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any] | None] = [None] * len(entries)
        waiting: list[tuple[_Open, int]] = []
        size = self._settings.scoring.batch_size
        prepared = self._prepare_alone(entries) if alone else self._prepare(entries)
        for place, outcome in enumerate(prepared):
            if isinstance(outcome, Failure):
                rows[place] = failed_row(entries[place], outcome, attempts)
                continue
            item = _Open(place, entries[place], outcome)
            for frame in range(len(outcome.pixels)):
                waiting.append((item, frame))
                if len(waiting) == size:
                    self._predict(waiting, rows)
                    waiting = []
        self._predict(waiting, rows)
        return [row for row in rows if row is not None]

    def _prepare(self, entries: list[dict[str, Any]]) -> Iterator[PreparedObject | Failure]:
        """Objects in order; bytes are read ahead by threads, bounded in number and in bytes."""
        ahead: deque[tuple[Future[bytes], int]] = deque()
        budget = _READ_AHEAD_BYTES
        following = 0
        for _ in entries:
            while following < len(entries) and len(ahead) <= 2 * self._settings.scoring.read_threads:
                entry = entries[following]
                if ahead and entry["size"] > budget:
                    break
                ahead.append((self._pool.submit(self._reader.read, entry["uri"], entry["etag"]), entry["size"]))
                budget -= entry["size"]
                following += 1
            future, size = ahead.popleft()
            with self._watchdog:
                try:
                    outcome: PreparedObject | Failure = self._reader.prepare(future.result())
                except DecodeError as error:
                    outcome = Failure.of(error)
            budget += size
            yield outcome

    def _prepare_alone(self, entries: list[dict[str, Any]]) -> Iterator[PreparedObject | Failure]:
        """Objects in order, each in a child process with limits."""
        child = IsolatedReader(self._reader)
        try:
            for entry in entries:
                yield _outcome(child, entry)
        finally:
            child.close()

    def _predict(self, waiting: list[tuple[_Open, int]], rows: list[dict[str, Any] | None]) -> None:
        if not waiting:
            return
        prediction = self._predictor.predict(np.stack([item.ready.pixels[frame] for item, frame in waiting]))
        for index, (item, _) in enumerate(waiting):
            probabilities = prediction.probabilities[index] if prediction.probabilities is not None else None
            mask = prediction.masks[index] if prediction.masks is not None else None
            item.results.append(frame_result(self._bundle, item.ready, probabilities, mask))
            if len(item.results) == len(item.ready.pixels):
                save = self._settings.scoring.save_masks
                rows[item.place] = scored_row(
                    self._bundle,
                    item.entry,
                    item.ready,
                    item.results,
                    preprocess_id=self._preprocess_id,
                    save_masks=save,
                )


def _outcome(child: IsolatedReader, entry: dict[str, Any]) -> PreparedObject | Failure:
    try:
        return child.prepare(entry["uri"], entry["etag"])
    except DecodeError as error:
        return Failure.of(error)


def _attempts(marker: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(marker))["attempts"])
    except StorageError:
        return 0


class _Watchdog:
    """Ends this process when one object takes too long: native code cannot be interrupted otherwise.

    The block is then tried again with each object in a process of its own.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._started: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._started = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 4))
            started = self._started
            if started is not None and time.monotonic() - started > self._limit:
                os._exit(1)
