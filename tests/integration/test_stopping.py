"""Real processes told to stop: whatever still has to be written is written, however long it takes, and the code is 143."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.demo.archive import PhantomArchive

pytestmark = pytest.mark.integration
# Longer than the 3 s after which Ray's core aborts a process that it has seen SIGTERM come to.
SLOW = """
import sys, time
from medvision_ray.cluster import ray_session
from medvision_ray.config import RayConfig
from medvision_ray.ending import leave, run_to_the_end
from medvision_ray.logs import Log

def job():
    with ray_session(RayConfig(num_cpus=1, object_store_bytes=100 << 20)):
        try:
            print("begun", flush=True)  # inside, since the signal may come before another line is run
            time.sleep(60)
        finally:
            time.sleep(5)
            print("written", flush=True)

leave(run_to_the_end(job, Log()).exit_code)
"""


def test_what_is_written_at_a_stop_may_take_longer_than_rays_alarm() -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "written\n"
        assert process.wait(60) == 143


@contextmanager
def server(bundle: Bundle, ingress: str, kept: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`medvision serve` as a process, ready, and its address; killed at the end where it still runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "http.port": port,
        "http.ingress": ingress,
        "scale.cpus": 0.5,
        "scale.decoders": 1,
        "record.output": kept,
        "record.every_seconds": 3600,
        "privacy.demo_key": "true",
        "ray.num_cpus": 2,
        "ray.object_store_bytes": 200 << 20,
    }
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "medvision_ray.cli", "serve", "--bundle", bundle.uri, *options]
    variables = {
        name: value for name, value in os.environ.items() if name not in ("MEDVISION_SERVE_TOKEN", "RAY_ADDRESS")
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None, 120)
            assert process.poll() is None
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.mark.parametrize("ingress", ["proxy", "haproxy"])
def test_a_server_that_is_told_to_stop_writes_its_rows(
    ingress: str, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    picture = next(
        data for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if len(data := path.read_bytes()) > 9999
    )
    with server(bundle, ingress, tmp_path / "kept") as (process, address):
        headers = {"Content-Type": "application/dicom"}
        sent = [httpx.post(f"{address}/v1/predict", content=picture, headers=headers, timeout=60) for _ in range(3)]
        assert [answer.status_code for answer in sent] == [200] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 143
        assert process.stderr is not None
        *_, last = process.stderr.read().splitlines()
    assert "Stopped by SIGTERM" in last
    rows = tables.read(str(tmp_path / "kept"), "predictions", ["uri"])
    assert rows is not None
    assert rows.num_rows == 3


def test_a_server_that_is_killed_leaves_its_port(bundle: Bundle, tmp_path: Path) -> None:
    with server(bundle, "haproxy", tmp_path / "kept") as (process, address):
        process.kill()
        process.wait(60)

        def gone() -> bool:
            with socket.socket() as asking:
                return asking.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0

        wait_until(gone, 60)
