"""However a job ends, it ends with an exit code and a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from medvision_ray.ending import Ending, run_to_the_end, undisturbed
from medvision_ray.errors import ConfigError, LabelError, MedVisionError, StorageError
from medvision_ray.logs import Log


def raising(error: BaseException) -> Callable[[], tuple[int, dict[str, Any]]]:
    def run() -> tuple[int, dict[str, Any]]:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (MedVisionError("no"), 1, "failed"),
        (StorageError("no"), 1, "failed"),
        (ConfigError("no"), 2, "refused"),
        (LabelError("no"), 2, "refused"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "stopped"),
        (SystemExit(signal.SIGTERM), 143, "stopped"),  # as Ray's own handler raises it
        (SystemExit(7), 1, "failed"),
        (RuntimeError("DOE"), 1, "failed"),
        (MemoryError("DOE"), 1, "failed"),
    ],
)
def test_an_exception_becomes_an_ending(error: BaseException, code: int, status: str) -> None:
    found = run_to_the_end(raising(error), Log("json"))
    assert (found.exit_code, found.status) == (code, status)
    assert found.error
    assert "DOE" not in found.error


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (3, "over_budget")])
def test_what_a_job_returns_is_kept(code: int, status: str) -> None:
    found = run_to_the_end(lambda: (code, {"scored": 3}), Log())
    assert found == Ending(code, {"scored": 3})
    assert found.status == status


def test_sigterm_unwinds_the_job_and_the_earlier_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    closed = []

    def run() -> tuple[int, dict[str, Any]]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            closed.append(True)
        return 0, {}

    found = run_to_the_end(run, Log())
    assert (found.exit_code, closed) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_is_told_whatever_code_a_library_makes_of_it() -> None:
    def run() -> tuple[int, dict[str, Any]]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except SystemExit:
            raise SystemExit(1) from None  # as `ray.get` does
        return 0, {}

    assert run_to_the_end(run, Log()).exit_code == 143


def test_sigterm_waits_while_the_end_is_told() -> None:
    with undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        told = True
    assert told


def test_a_stopped_program_ends_with_143_and_a_last_line() -> None:
    code = (
        "import os, signal, sys\nfrom medvision_ray import cli, verification\n"
        "def stopped(*_):\n    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()\n"
        "verification.verify = stopped\n"
        "sys.exit(cli.main(['tables', 'verify', '--output', '/nowhere', '--log-format', 'json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 143
    told, end = (json.loads(line) for line in done.stderr.splitlines())
    assert told["event"] == "stopped"
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "stopped", 143)


def test_a_job_that_was_cut_short_leaves_at_once_whatever_threads_remain() -> None:
    code = (
        "import threading, time\nfrom medvision_ray.ending import leave\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nprint('said')\nleave(143)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (143, "said\n")
