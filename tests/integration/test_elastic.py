"""Elastic training on two nodes of one CPU: one is lost and training goes on, one comes and training grows again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from medvision_ray.bundle import load_bundle
from medvision_ray.config import TrainJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.learning.history import read_history

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS = 60
_STORE_BYTES = 200_000_000
_ENVIRONMENT = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}
# As long as the module says is too long for a test.
_DRIVER = """
import sys
from medvision_ray.config import TrainJob
from medvision_ray.learning import train
train.RESIZE_SECONDS = 5.0
train.train(TrainJob.model_validate_json(sys.argv[1]))
"""


def test_a_lost_node_shrinks_the_group_and_a_new_one_lets_it_grow(
    phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    node = {"num_cpus": 1, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(**node)
        job = build_job(TrainJob, settings(phantom, tmp_path, cluster.address), "the test")
        log = (tmp_path / "driver.log").open("w")
        command = [sys.executable, "-c", _DRIVER, job.model_dump_json()]
        with log, subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log) as driver:
            try:
                wait_for(lambda: workers(tmp_path)[-2:] == [2, 2], driver)
                cluster.remove_node(second, allow_graceful=False)
                wait_for(lambda: workers(tmp_path)[-2:] == [1, 1], driver)
                cluster.add_node(**node)
                wait_for(lambda: workers(tmp_path)[-2:] == [2, 2], driver)
                assert driver.wait(400) == 0
            finally:
                driver.kill()
    finally:
        cluster.shutdown()
    lines = read_history(str(tmp_path / "training/elastic/metrics.jsonl"))
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    sizes = workers(tmp_path)
    changes = [sizes[0], *(two for one, two in pairwise(sizes) if one != two)]
    assert changes[:3] == [2, 1, 2]
    bundle = load_bundle(str(tmp_path / "bundles/elastic"))
    assert bundle.trained["epochs"] == EPOCHS


def settings(phantom: PhantomArchive, output: Path, address: str) -> dict[str, object]:
    return {
        "output": str(output),
        "name": "elastic",
        "labels": {"table": str(phantom.labels)},
        "preprocess": {"size": [64, 64]},
        "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
        "epochs": EPOCHS,
        "batch_size": 8,
        "workers": [1, 2],
        "ray": {"address": address},
    }


def workers(output: Path) -> list[int]:
    """How many workers each epoch had."""
    return [int(line["workers"]) for line in read_history(str(output / "training/elastic/metrics.jsonl"))]


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, "the training ended before what was waited for"
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.1)
