"""Keeps answers as rows of the tables, behind the requests' backs: none waits for the store, and no row is lost on the way out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import ServeJob
from medvision_ray.defects import describe
from medvision_ray.errors import MedVisionError
from medvision_ray.serving.metrics import ServingMetrics
from medvision_ray.serving.online_runs import Batch, new_batch, publish_batch, settle
from medvision_ray.serving.problems import RequestError

_ROW_BYTES = 2_000  # without masks, about
_COMMITS_A_TIDYING = 16
_LONGEST_PAUSE_SECONDS = 60.0
_CLOSING_PAUSE_SECONDS = 0.5
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class _Waiting:
    """A row that is not committed yet."""

    model_id: str
    classes: tuple[str, ...]
    row: dict[str, Any]
    size: int


class Recorder:
    """Takes rows from any thread and commits them in one of its own.

    State is the rows that wait, and the batch that is being committed: one whose commit failed is tried again
    as the same run until it is in, so nothing is lost or written twice while the store is away.

    Args:
        settings: `record` says where and how often.
        metrics: is told how many rows wait, are written, and how often the store failed.
    """

    def __init__(self, settings: ServeJob, metrics: ServingMetrics) -> None:
        if settings.record.output is None:
            raise ValueError("Expected `record.output`.")
        self._output: str = settings.record.output
        self._settings = settings.record
        self._config = settings.model_dump(mode="json")
        self._metrics = metrics
        self._lock = threading.Condition()
        self._rows: deque[_Waiting] = deque()
        self._unwritten = 0
        self._unwritten_bytes = 0
        self._closing = False
        self._given_up = False
        self._commits = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="record")

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def check_room(self) -> None:
        """Before a request is worked on.

        Raises:
            RequestError: 503, as many rows wait as may.
        """
        limits = self._settings
        if self._unwritten >= limits.max_waiting_rows or self._unwritten_bytes >= limits.max_waiting_bytes:
            sentence = "Answers are kept, and the tables that keep them cannot be written now; send this again later."
            raise RequestError(503, "record_full", sentence, retry_after_seconds=limits.every_seconds)

    def add(self, bundle: Bundle, row: dict[str, Any]) -> None:
        """Take a working row; it is committed soon."""
        if not self._settings.masks:
            row = _without_masks(row)
        item = _Waiting(bundle.model_id, bundle.classes, row, _size(row))
        with self._lock:
            self._rows.append(item)
            self._unwritten += 1
            self._unwritten_bytes += item.size
            self._metrics.rows_waiting.set(self._unwritten)

    def close(self, seconds: float) -> int:
        """Write what waits, for so long at most; answers how many rows are lost."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._given_up = True
        if self._unwritten:
            _log.error("medvision: %d rows of answers were not written: the store did not take them", self._unwritten)
        return self._unwritten

    def _work(self) -> None:
        self._try(self._settle)
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing, self._settings.every_seconds)
                items, closing = list(self._rows), self._closing
                self._rows.clear()
            for batch, size in _batches(items):
                self._publish(batch, size)
            if closing and not self._rows:
                return

    def _settle(self) -> None:
        settle(self._output, self._config)

    def _publish(self, batch: Batch, size: int) -> None:
        """Until it is in; a process that ends with its store away gives up with `close`."""
        pause = 1.0
        while not self._try(lambda: publish_batch(self._output, batch, self._config)):
            self._metrics.record_errors.inc()
            if self._given_up:
                return
            if self._closing:
                time.sleep(_CLOSING_PAUSE_SECONDS)
            else:
                with self._lock:
                    self._lock.wait_for(lambda: self._closing, pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        with self._lock:
            self._unwritten -= len(batch.rows)
            self._unwritten_bytes -= size
            self._metrics.rows_waiting.set(self._unwritten)
        self._metrics.rows_written.inc(len(batch.rows))
        self._commits += 1
        if self._commits % _COMMITS_A_TIDYING == 0 and not self._closing:
            self._try(lambda: tables.tidy(self._output))

    def _try(self, step: Any) -> bool:
        """Whether it went well; a failure is told without its text, which can hold an address."""
        try:
            step()
        except MedVisionError as error:
            _log.error("medvision: the tables of `record.output` refused: %s", type(error).__name__)
            return False
        except Exception as error:
            found = describe(error)
            _log.error("medvision: record: %s at %s", found.kind, "; ".join(found.places))
            return False
        return True


def _batches(items: list[_Waiting]) -> list[tuple[Batch, int]]:
    """One batch a model, with its size in bytes."""
    groups: dict[str, list[_Waiting]] = {}
    for item in items:
        groups.setdefault(item.model_id, []).append(item)
    return [
        (new_batch(model_id, group[0].classes, [item.row for item in group]), sum(item.size for item in group))
        for model_id, group in groups.items()
    ]


def _without_masks(row: dict[str, Any]) -> dict[str, Any]:
    frames = [{**frame, "mask": None} for frame in row.get("frame_results") or ()]
    return {**row, "mask": None, "frame_results": frames} if "mask" in row else row


def _size(row: dict[str, Any]) -> int:
    """Bytes that a row holds in memory, about."""
    parts = [row, *(row.get("frame_results") or ())]
    return sum(_ROW_BYTES + len(part.get("mask") or b"") for part in parts)
