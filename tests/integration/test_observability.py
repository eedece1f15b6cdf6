"""Whole runs from outside: what is logged and told of them, how they are stopped, what Prometheus sees."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from medvision_ray import monitoring, tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import RayConfig
from medvision_ray.demo.archive import PhantomArchive

# Two whole runs and their starts of Ray in one fixture: long where the machine is loaded.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NAME = "ZYBROW JANE 1970"  # a family name in no English word


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
    return found


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str
    told: dict[str, Any]


@dataclass
class Night:
    """A run that was stopped by SIGTERM, and the same command again."""

    stopped: Ended
    finished: Ended
    objects: int
    output: str


@pytest.fixture(scope="module")
def night(bundle: Bundle, phantom: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """An archive whose folders are named after a patient."""
    place = tmp_path_factory.mktemp("night")
    archive, output, told = place / "archive", place / "output", place / "told.json"
    for number in range(3):
        shutil.copytree(phantom.folder / "archive", archive / f"{NAME} {number}")
    (place / "tell.py").write_text(f"import sys; open({str(told)!r}, 'w').write(sys.stdin.read())")
    settings = {
        **{"archive.uri": archive, "bundle": bundle.uri, "output": output, "privacy.demo_key": "true"},
        **{"ray.num_cpus": 2, "scoring.block_rows": 4, "scoring.precision": "float32", "scoring.actors": 1},
        **{"on_finish.command": json.dumps([sys.executable, str(place / "tell.py")])},
    }
    command = [sys.executable, "-m", "medvision_ray.cli", "score"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    def run(form: str, *, stop: bool) -> Ended:
        out, err = place / f"{form}.out", place / f"{form}.err"
        with out.open("w") as stdout, err.open("w") as stderr:
            child = subprocess.Popen([*command, "--log-format", form], stdout=stdout, stderr=stderr)
            try:
                if stop:
                    wait_for(lambda: child.poll() is not None or list(output.glob("runs/*/inflight/*")), 400)
                    child.send_signal(signal.SIGTERM)
                child.wait(400)
            finally:
                child.kill()
        return Ended(child.returncode, out.read_text(), err.read_text(), json.loads(told.read_text()))

    stopped, finished = run("json", stop=True), run("text", stop=False)
    return Night(stopped, finished, sum(path.is_file() for path in archive.rglob("*")), str(output))


def test_sigterm_ends_a_run_with_143_and_its_end_is_told(night: Night) -> None:
    assert night.stopped.code == 143
    told = night.stopped.told
    assert (told["status"], told["exit_code"], told["job"]) == ("stopped", 143, "score")
    assert told["run_key"].startswith("score-")
    assert told["counts"]["total"] == night.objects


def test_the_same_command_finishes_a_stopped_run(night: Night) -> None:
    assert night.finished.code == 3  # the phantom's broken objects are over the budget
    told = night.finished.told
    assert told["run_key"] == night.stopped.told["run_key"]
    assert told["counts"]["scored"] + told["counts"]["failed"] == night.objects
    found = [tables.read(night.output, name, ["image_id"]) for name in ("predictions", "failures")]
    ids = [number for table in found if table is not None for number in table["image_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == night.objects


def test_each_line_of_a_run_is_json_and_the_last_says_how_it_ended(night: Night) -> None:
    lines = [json.loads(line) for line in night.stopped.err.splitlines()]
    assert all({"time", "level", "event", "message", "job"} <= set(line) for line in lines)
    assert (lines[-1]["event"], lines[-1]["exit_code"]) == ("end", 143)
    assert lines[-1]["run_key"] == night.stopped.told["run_key"]
    assert [line for line in lines if line["event"] == "stopped"]


def test_nothing_that_a_run_says_or_tells_holds_an_identifier(night: Night, phantom: PhantomArchive) -> None:
    for ended in (night.stopped, night.finished):
        said = ended.out + ended.err + json.dumps(ended.told)
        for identifier in (
            NAME,
            NAME.split(maxsplit=1)[0],
            *phantom.identifiers,
            *(Path(name).name for name in phantom.broken),
        ):
            assert identifier.lower() not in said.lower()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local Ray that hands its metrics on every second; its address."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def exported() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Our metrics as the node's endpoint shows them: name and our labels, without those that Ray adds."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        text = answer.read().decode()
    ours = {label for metric in monitoring.METRICS for label in metric.labels}
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for name, labels, value in re.findall(r"^(ray_medvision_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        pairs = re.findall(r'(\w+)="([^"]*)"', labels)
        found[name, frozenset(pair for pair in pairs if pair[0] in ours)] = float(value)
    return found


def test_what_workers_and_driver_record_is_on_rays_metrics_endpoint(cluster: str) -> None:
    import ray

    @ray.remote(num_cpus=0.5)
    class Worker:
        def work(self) -> None:
            for _ in range(2):
                monitoring.record_block(
                    {"scored": 5, "corrupt": 2}, {"decode": 0.5}, bytes_read=99, frames=12, batches=3
                )

    worker = Worker.remote()
    ray.get(worker.work.remote())
    monitoring.record_progress(100, 14, 4)
    # The end is told by a process of its own, as after a night with nothing new.
    counts = {"listed": 100, "already_done": 0, "scored": 96, "failed": 4, "not_scored": 0}
    drift = {"judged": True, "shifted": ["kvp"], "features": [{"feature": "kvp", "psi": 0.5}]}
    result = {**counts, "seconds": {"list": 1.5}, "drift": drift}
    assert monitoring.record_end(RayConfig(address=cluster), "score", "done", result)
    names = {metric.exported for metric in monitoring.METRICS}
    found: dict[Any, float] = {}

    def complete() -> bool:
        found.update(exported())  # a gauge of the process that has ended goes after a while
        return {name for name, _ in found} == names

    wait_for(complete, 60)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("ray_medvision_objects_total", verb="score", status="scored", error_code="none") == 10
    assert value("ray_medvision_objects_total", verb="score", status="failed", error_code="corrupt") == 4
    assert value("ray_medvision_stage_seconds_total", verb="score", stage="decode") == 1.0
    assert value("ray_medvision_read_bytes_total", verb="score") == 198
    assert value("ray_medvision_frames_total", verb="score") == 24
    assert value("ray_medvision_run_progress_objects", verb="score", state="done") == 14
    assert value("ray_medvision_last_run_objects", verb="score", state="scored") == 96
    assert value("ray_medvision_last_run_seconds", verb="score", stage="list") == 1.5
    assert value("ray_medvision_last_run_drift_psi", verb="score", feature="kvp") == 0.5
    assert value("ray_medvision_last_run_shifted_features", verb="score") == 1
    assert abs(time.time() - value("ray_medvision_last_end_timestamp_seconds", verb="score", status="done")) < 300
