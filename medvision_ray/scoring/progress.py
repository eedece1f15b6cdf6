"""The progress line of a scoring pass: counts, rate, time left and failures so far."""

from __future__ import annotations

import contextlib
import threading
import time

import pyarrow.compute as pc
import pyarrow.parquet as pq

from medvision_ray import storage
from medvision_ray.errors import StorageError
from medvision_ray.logs import Reporter
from medvision_ray.monitoring import record_progress
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.rows import FAILED

_EVERY_SECONDS = 2.0


class ProgressLine:
    """Says every two seconds, while new rows come in, how far a run is.

    Attributes:
        busy_seconds: from the first actor's start of work to the last committed row; the time that
            images per second are counted over.
    """

    def __init__(self, run_folder: str, total: int, say: Reporter, job: str) -> None:
        self._folder = run_folder
        self._total = total
        self._say = say
        self._job = job
        self._seen: set[str] = set()
        self._done = self._failed = 0
        self._look()
        self._before = self._done
        self._first: float | None = None
        self._last = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> ProgressLine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._last = time.monotonic()

    @property
    def busy_seconds(self) -> float:
        """Seconds of work, without the start of Ray and of the actors."""
        return max(0.0, self._last - self._first) if self._first is not None else 0.0

    def _watch(self) -> None:
        inflight = storage.join(self._folder, "inflight")
        told = self._done
        while not self._stop.wait(0.1 if self._first is None else _EVERY_SECONDS):
            with contextlib.suppress(StorageError):  # the run itself meets the same store and says what is wrong
                if self._first is None:
                    if storage.exists(inflight):
                        self._first = time.monotonic()
                    continue
                self._look()
                if self._done > told:
                    told = self._done
                    self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - (self._first or now), 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        record_progress(self._total, self._done, self._failed, verb=self._job)
        self._say(
            f"{self._done}/{self._total} objects ({self._done / self._total:.0%}), {rate:.1f} a second, "
            f"{self._failed} failed so far, {left:.0f} s left",
            event="progress",
            total=self._total,
            done=self._done,
            failed=self._failed,
            rate=rate,
            seconds_left=left,
        )

    def _look(self) -> None:
        rows = CommittedRows(self._folder)
        filesystem, _ = storage.filesystem(self._folder)
        for path in rows.files:
            if path not in self._seen:
                status = pq.read_table(path, columns=["status"], filesystem=filesystem)["status"]
                self._seen.add(path)
                self._done += len(status)
                self._failed += pc.sum(pc.equal(status, FAILED)).as_py() or 0
