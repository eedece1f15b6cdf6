"""A block of objects, read ahead, decoded and preprocessed one after another; suspects apart.

Before work on a block begins, a marker is left in the run's folder. Whoever finds the marker of an
earlier attempt knows that the block killed its worker, and prepares each of its objects in a
process of its own: the object at fault gets a failure row and the others their predictions.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from medvision_ray import storage
from medvision_ray.config import PreprocessConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.native import memory_bytes
from medvision_ray.scoring.isolated import IsolatedReader
from medvision_ray.scoring.objects import Effort, Failure, ObjectReader, PreparedObject
from medvision_ray.scoring.settings import WorkerSettings

_Content = bytes | list[bytes]  # of an object, or of the members of a series
_READ_AHEAD_BYTES = 256 << 20
_MOST_HELD = 20
"""So many objects that could not be read are held back at most before the archive is asked whether it is there."""
_MEMORY_SHARE = 0.5  # of the node's memory that one object may take, whatever the configuration says


@dataclass(frozen=True)
class Outcome:
    """What became of one object on its way to the model."""

    entry: dict[str, Any]
    result: PreparedObject | Failure
    effort: Effort
    attempts: int


class Preparer:
    """Prepares blocks; state is a thread pool that reads ahead and a watchdog."""

    def __init__(self, settings: WorkerSettings, preprocess: PreprocessConfig) -> None:
        self._settings = settings
        limit = min(settings.decode.max_memory_bytes, int(_MEMORY_SHARE * memory_bytes()))
        decode = settings.decode.model_copy(update={"max_memory_bytes": limit})
        self._reader = ObjectReader(decode, preprocess, settings.pseudonymiser)
        self._pool = ThreadPoolExecutor(settings.scoring.read_threads, thread_name_prefix="read")
        self._watchdog = Watchdog(decode.max_seconds, decode.max_memory_bytes)
        self._reads: _ReadAhead | None = None

    def read_ahead(self, entries: list[dict[str, Any]]) -> None:
        """Begin to read the block that `prepare` gets next, while the caller still leaves its marker."""
        if self._settings.decode.isolation == "process":
            return  # the child reads
        self._reads = _ReadAhead(self._pool, self._reader, entries, 2 * self._settings.scoring.read_threads + 1)

    def prepare(self, entries: list[dict[str, Any]], earlier: int) -> Iterator[Outcome]:
        """Outcomes in the order of the inventory rows; they end early at the deadline.

        Args:
            earlier: attempts at this block that killed their worker.

        Raises:
            StorageError: the archive's store answers nothing: no object of the run can be read now.
        """
        attempts = earlier + 1
        if earlier >= self._settings.scoring.max_attempts:
            lost = Failure.of(DecodeError(ErrorCode.WORKER_CRASH, Stage.DECODE, attempts=earlier))
            yield from (Outcome(self._as_told(entry), lost, Effort(), earlier) for entry in entries)
            return
        apart = earlier or self._settings.decode.isolation == "process"
        each = self._each_alone(entries) if apart else self._each(entries)
        held: list[tuple[dict[str, Any], Outcome]] = []
        for entry, (result, effort) in zip(entries, each, strict=False):
            outcome = Outcome(self._as_told(entry), result, effort, attempts)
            if isinstance(result, Failure) and result.error_code == ErrorCode.READ_ERROR.value:
                held.append((entry, outcome))
                if len(held) == _MOST_HELD:
                    yield from _confirmed(held)
            else:
                yield from _confirmed(held)
                yield outcome
            if self._settings.past_deadline:
                break
        yield from _confirmed(held)

    def _as_told(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An inventory row with its address as the tables have it; nothing after reading needs the other one."""
        return {**entry, "uri": self._settings.pseudonymiser.address(entry["uri"])}

    def _each(self, entries: list[dict[str, Any]]) -> Iterator[tuple[PreparedObject | Failure, Effort]]:
        if self._reads is None or self._reads.entries is not entries:
            self.read_ahead(entries)
        reads, self._reads = self._reads, None
        for future, effort in reads or ():
            wait([future])  # reading has bounds of its own: a slow store is no object that hangs
            with self._watchdog:
                result = _caught(lambda future=future, effort=effort: self._reader.prepare(future.result(), effort))
            yield result, effort

    def _each_alone(self, entries: list[dict[str, Any]]) -> Iterator[tuple[PreparedObject | Failure, Effort]]:
        """Each in a child process with limits."""
        child = IsolatedReader(self._reader)
        try:
            for entry in entries:
                effort = Effort()
                yield (
                    _caught(lambda entry=entry, effort=effort: child.prepare_entry(entry, effort)),
                    effort,
                )
        finally:
            child.close()


def _confirmed(held: list[tuple[dict[str, Any], Outcome]]) -> Iterator[Outcome]:
    """Give out what could not be read once the archive answers: an outage must not make failure rows of a night.

    Raises:
        StorageError: it does not answer.
    """
    if held:
        entry = held[-1][0]
        members = entry.get("members")
        storage.exists(members[0]["uri"] if members else entry["uri"])
    for _, outcome in held:
        yield outcome
    held.clear()


class _ReadAhead:
    """Reads objects in order by the threads of a pool, bounded in number and in bytes; iterate once.

    Attributes:
        entries: the objects.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, reader: ObjectReader, entries: list[dict[str, Any]], most: int
    ) -> None:
        self.entries = entries
        self._pool, self._reader, self._most = pool, reader, most
        self._ahead: deque[tuple[Future[_Content], Effort, int]] = deque()
        self._budget = _READ_AHEAD_BYTES
        self._following = 0
        self._fill()

    def __iter__(self) -> Iterator[tuple[Future[_Content], Effort]]:
        while self._ahead:
            future, effort, size = self._ahead.popleft()
            yield future, effort
            self._budget += size
            self._fill()

    def _fill(self) -> None:
        while self._following < len(self.entries) and len(self._ahead) < self._most:
            entry = self.entries[self._following]
            if self._ahead and entry["size"] > self._budget:
                break
            effort = Effort()
            reading = self._pool.submit(self._reader.read_entry, entry, effort)
            self._ahead.append((reading, effort, entry["size"]))
            self._budget -= entry["size"]
            self._following += 1


def _caught(prepare: Any) -> PreparedObject | Failure:
    """The prepared object or the reason why not; a defect of a decoder costs its own object only."""
    try:
        ready: PreparedObject = prepare()
    except DecodeError as error:
        return Failure.of(error)
    except StorageError:
        raise  # the credentials of the whole run
    except (Exception, SystemExit) as error:
        return Failure.of(DecodeError(ErrorCode.INTERNAL_ERROR, exception=type(error).__name__[:64]))
    return ready


class Watchdog:
    """Ends this process when one object takes too long or too much memory: native code cannot be interrupted otherwise.

    The block is then tried again with each object in a process of its own. Memory is resident memory
    above that before the object; without this the node's out-of-memory killer decides. A thread
    looks four times a second, so that an object costs nothing; a call that never lets go of the
    interpreter's lock starves that thread, which sets off faulthandler's timer, which needs no lock.
    """

    def __init__(self, limit_seconds: float, limit_bytes: int) -> None:
        self._limit_seconds = limit_seconds
        self._limit_bytes = limit_bytes
        self._object: tuple[float] | None = None
        self._tick = min(0.25, limit_seconds / 4)
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        self._resident = resident_bytes()  # here and not in the thread, which may start after the first object
        self._keep_alive()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def __enter__(self) -> None:
        self._object = (time.monotonic(),)

    def __exit__(self, *_: object) -> None:
        self._object = None

    def _keep_alive(self) -> None:
        faulthandler.dump_traceback_later(self._limit_seconds + 4 * self._tick, exit=True, file=self._nowhere)

    def _watch(self) -> None:
        pause = threading.Event()
        seen: tuple[float] | None = None
        before = latest = self._resident
        while not pause.wait(self._tick):
            self._keep_alive()
            earlier, latest = latest, resident_bytes()
            current = self._object
            if current is None:
                continue
            if current is not seen:
                seen, before = current, earlier
            if time.monotonic() - current[0] > self._limit_seconds or latest - before > self._limit_bytes:
                os._exit(1)


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: no memory limit, the time limit stays
        return 0
