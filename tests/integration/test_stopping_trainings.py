"""Trainings, cross-validations and searches told to stop as real processes: they end at once, not after the models under way."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from own_processes import processes

from medvision_ray.demo.archive import PhantomArchive

pytestmark = pytest.mark.integration
EPOCHS = 500  # far more than the test waits for
SECONDS = 40.0


def settings(kind: str, phantom: PhantomArchive, output: Path) -> dict[str, Any]:
    ray = {"num_cpus": 2, "object_store_bytes": 200 << 20}
    job: dict[str, Any] = {
        "output": str(output),
        "labels": {"table": str(phantom.labels)},
        "preprocess": {"size": [64, 64]},
        "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
        "epochs": EPOCHS,
        "batch_size": 8,
        "workers": 1,
        "privacy": {"demo_key": True},
        "ray": ray,
    }
    if kind == "tune":
        return {"train": job, "search": {"learning_rate": {"grid": [1e-4, 1e-3]}}, "name": "search"}
    return {**job, "name": "stopped", **({"folds": 2} if kind == "folds" else {})}


def said(process: subprocess.Popen[str], words: Callable[[str], bool], seconds: float) -> list[str]:
    """The lines up to one that is waited for; the process is killed where it does not come."""
    assert process.stderr is not None
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if words(line):
            break
    watchdog.cancel()
    return lines


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("train", signal.SIGTERM),
        ("train", signal.SIGINT),
        ("folds", signal.SIGTERM),
        ("folds", signal.SIGINT),
        ("tune", signal.SIGTERM),
        ("tune", signal.SIGINT),
    ],
)
def test_a_training_that_is_told_to_stop_ends_with_its_ray(
    kind: str, number: signal.Signals, phantom: PhantomArchive, tmp_path: Path
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(settings(kind, phantom, tmp_path / "output")))
    job = "tune" if kind == "tune" else "train"
    command = [sys.executable, "-m", "medvision_ray.cli", job, "--config", str(config)]
    before = set(processes("ray"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = said(process, lambda line: f"epoch 1/{EPOCHS}" in line, 180)
        assert f"epoch 1/{EPOCHS}" in lines[-1], "".join(lines)
        started = set(processes("ray")) - before
        assert len(started) > 3  # the program, and what it has started
        process.send_signal(number)
        rest = said(process, lambda _: False, SECONDS)
        assert process.wait(SECONDS) == 128 + number, "".join(rest)
    assert "the same command goes on" in rest[-1]
    until = time.monotonic() + 20
    while left := [title for one in started if "ray" in (title := _title(one))]:
        assert time.monotonic() < until, left
        time.sleep(0.5)


def _title(number: int) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
