"""The one place where a job ends: whatever comes out of it becomes an `Ending` with an exit code.

A job can return, refuse, fail, meet a defect, be interrupted (SIGINT) or stopped (SIGTERM, as `ray job
stop`, Kubernetes and systemd do). Only SIGKILL passes by; a scheduler sees it as code 137.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from medvision_ray.defects import describe
from medvision_ray.errors import ConfigError, MedVisionError, UsageError
from medvision_ray.logs import Log

DONE, FAILED, USAGE, OVER_BUDGET, INTERRUPTED, STOPPED = 0, 1, 2, 3, 130, 143
STATUS = {
    DONE: "done",
    FAILED: "failed",
    USAGE: "refused",
    OVER_BUDGET: "over_budget",
    INTERRUPTED: "interrupted",
    STOPPED: "stopped",
}


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        exit_code: 0 done, 1 failed, 2 wrong usage, 3 done but over the failure budget, 130 interrupted, 143 stopped.
        result: what the job returned; empty where it did not.
        error: our own sentence on why it did not; None where it did.
    """

    exit_code: int
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def status(self) -> str:
        """The exit code as a word; a job that `medvision submit` followed can have any code."""
        return STATUS.get(self.exit_code, STATUS[FAILED])


def run_to_the_end(run: Callable[[], tuple[int, dict[str, Any]]], log: Log) -> Ending:
    """Run a job; however it ends, say so and return."""
    told = threading.Event()
    try:
        with _sigterm_stops(told):
            code, result = run()
        return Ending(int(code), result)
    except ConfigError as error:
        problems = [{"key": key, "expected": expected} for key, expected in error.problems]
        return _told(log, USAGE, str(error), "refused", problems=problems)
    except UsageError as error:
        return _told(log, USAGE, str(error), "refused")
    except MedVisionError as error:
        return _told(log, FAILED, str(error), "error")
    except KeyboardInterrupt:
        return _told(log, INTERRUPTED, "Interrupted; the same command goes on where this one stopped.", "interrupted")
    except SystemExit as stop:
        # Ray's own handler gives the bare number, and out of `ray.get` comes 1 in place of what our handler raised.
        if not told.is_set() and stop.code not in (STOPPED, signal.SIGTERM):
            return _told(log, FAILED, "A library ended the program; its own logs say why.", "error")
        return _told(log, STOPPED, "Stopped by SIGTERM; the same command goes on where this one stopped.", "stopped")
    except Exception as error:  # a defect: told without its text, which can hold identifiers
        return _defect(log, error)


def _told(log: Log, code: int, sentence: str, event: str, **more: Any) -> Ending:
    log.error(sentence, event=event, **more)
    return Ending(code, error=log.cut(sentence))


def _defect(log: Log, error: Exception) -> Ending:
    found = describe(error)
    lines = [found.sentence(), *(f"  at {place}" for place in found.places)]
    if log.debug:
        lines += traceback.format_exception(error)
    log.error("\n".join(lines), event="defect", kind=found.kind, places=list(found.places))
    return Ending(FAILED, error=found.sentence())


@contextmanager
def _sigterm_stops(told: threading.Event) -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that sessions and leases are closed on the way out, and sets `told`.

    `ray.init` puts a handler of its own in this one's place, which raises SystemExit as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set in the main thread alone
        return

    def stop(number: int, frame: FrameType | None) -> None:
        told.set()
        raise SystemExit(STOPPED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def leave(exit_code: int) -> NoReturn:
    """End the program. After a job that was cut short at once, without Python's own way out.

    Ray Data's threads outlive such a job and abort the interpreter while it is torn down: code 134 in
    place of 143 in one of three tries (Ray 2.60). All that is ours is closed and said by then.
    """
    if exit_code in (INTERRUPTED, STOPPED):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, SIGTERM waits: `ray job stop` sends it to every process of a job, and who is told last must still be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
