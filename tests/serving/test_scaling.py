"""Replicas are added where those that are there are full, and only there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from own_processes import processes

from medvision_ray.bundle import Bundle
from medvision_ray.config import RayConfig
from medvision_ray.config.serving import HttpConfig, RequestLimits, ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.serving.scaling import LOAD, ByLoad
from medvision_ray.serving.serve import serving

HEADERS = {"Content-Type": "application/dicom"}


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [([0.0], 0.0), ([0.3], 0.5), ([0.6], 1.0), ([1.0], 1 / 0.6), ([0.5, 0.7], 2.0), ([1.0, 1.0], 2 / 0.6)],
)
def test_the_load_is_spread_until_each_replica_has_the_target(loads: list[float], wanted: float) -> None:
    context = SimpleNamespace(aggregated_metrics={LOAD: dict(enumerate(loads))}, target_num_replicas=7)
    assert ByLoad(0.6)(context) == (pytest.approx(wanted), {})


def test_nothing_changes_before_a_replica_has_said_anything() -> None:
    assert ByLoad(0.6)(SimpleNamespace(aggregated_metrics={}, target_num_replicas=3)) == (3, {})


@pytest.fixture
def address(bundle: Bundle) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = ServeJob(
        bundles=(bundle.uri,),
        http=HttpConfig(port=port),
        limits=RequestLimits(max_in_flight=4),
        scale=ScaleConfig(cpus=0.5, decoders=1, max_replicas=2),
        ray=RayConfig(num_cpus=2, object_store_bytes=200 << 20),
    )
    with serving(job) as place:
        yield place


def replicas() -> int:
    return len(processes("ServeReplica:medvision"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_that_refuses_gets_another_replica(address: str, phantom: PhantomArchive) -> None:
    picture = next(
        data for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if len(data := path.read_bytes()) > 9999
    )
    stop = threading.Event()

    def client(_: int) -> set[int]:
        seen = set()
        with httpx.Client(base_url=address, timeout=60) as http:
            while not stop.is_set():
                status = http.post("/v1/predict", content=picture, headers=HEADERS).status_code
                seen.add(status)
                time.sleep(0.05 if status == 429 else 0)
        return seen

    assert replicas() == 1
    with ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(client, number) for number in range(12)]
        until = time.monotonic() + 180
        while replicas() < 2 and time.monotonic() < until:
            time.sleep(1)
        grown = replicas()
        time.sleep(5)
        stop.set()
        statuses = set().union(*(one.result() for one in clients))
    assert grown == 2
    assert statuses == {200, 429}
