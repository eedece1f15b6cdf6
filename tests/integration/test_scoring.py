"""Whole scoring runs on a local Ray: exactly one row an object, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import ArchiveConfig, RayConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.scoring.run import RunSummary, score

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> object:
    with ray_session(RayConfig(num_cpus=2)):
        yield


def _job(archive: str, bundle: Bundle, output: str, **more: object) -> ScoreJob:
    settings = {
        "archive": {"uri": archive},
        "bundle": bundle.uri,
        "output": output,
        "privacy": {"demo_key": True},
        "scoring": {"block_rows": 4, "precision": "float32"},
        "budget": {"max_failure_fraction": 1.0},
        **more,
    }
    return build_job(ScoreJob, settings, "a test")


def _run(job: ScoreJob) -> RunSummary:
    return score(job, lambda _text: None)


def _ids(output: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for name in ("predictions", "failures"):
        rows = tables.read(output, name, ["image_id"])
        found.update(rows["image_id"].to_pylist() if rows is not None else [])
    return found


def _scoring_workers() -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = place.read_bytes()
        except OSError:
            continue
        if b"ScoringWorker" in title:
            found.append(int(place.parent.name))
    return found


def _wait_for_marker(output: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/inflight/*")):
        assert time.monotonic() < deadline, "no actor has begun on a block"
        time.sleep(0.01)


def _expected(*archives: str) -> Counter[int]:
    return Counter(i for uri in archives for i in list_archive(ArchiveConfig(uri=uri)).objects["image_id"].to_pylist())


@pytest.mark.usefixtures("cluster")
def test_two_nights_give_one_row_an_object(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    whole = str(Path(phantom.night_1).parent)
    archive, output = tmp_path / "archive", str(tmp_path / "output")
    shutil.copytree(Path(whole) / "night-1", archive / "night-1")
    one = _run(_job(str(archive), bundle, output))
    assert (one.already_done, one.failed) == (0, 6)
    shutil.copytree(Path(whole) / "night-2", archive / "night-2")
    two = _run(_job(str(archive), bundle, output))
    assert (two.already_done, two.scored + two.failed) == (one.listed, phantom.night_2_objects)
    assert one.run_key != two.run_key
    assert _ids(output) == _expected(str(archive))
    nothing = _run(_job(str(archive), bundle, output))
    assert (nothing.scored, nothing.failed, nothing.already_done) == (0, 0, two.listed)
    runs = tables.read(output, "runs")
    assert runs is not None
    assert runs.num_rows == 3
    assert not storage.exists(storage.join(output, "runs", one.run_key))


@pytest.mark.usefixtures("cluster")
def test_named_run_is_published_once(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    job = _job(phantom.night_2, bundle, str(tmp_path), run_key="night-2")
    first = _run(job)
    again = _run(job)
    assert (first.scored, again.scored) == (again.scored, phantom.night_2_objects)
    assert _ids(str(tmp_path)) == _expected(phantom.night_2)


@pytest.mark.usefixtures("cluster")
def test_changed_object_is_scored_again(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    shutil.copytree(phantom.night_2, archive)
    first = _run(_job(str(archive), bundle, str(tmp_path / "output")))
    os.utime(next(archive.rglob("*.dcm")))
    second = _run(_job(str(archive), bundle, str(tmp_path / "output")))
    assert (second.scored, second.already_done) == (1, first.listed - 1)


@pytest.mark.usefixtures("cluster")
def test_empty_archive_is_a_run_of_nothing(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    summary = _run(_job(str(tmp_path / "archive"), bundle, str(tmp_path / "output")))
    assert (summary.listed, summary.scored, summary.failed, summary.over_budget) == (0, 0, 0, False)


@pytest.mark.usefixtures("cluster")
def test_failures_over_the_budget_are_told(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    job = _job(str(Path(phantom.night_1) / "incoming"), bundle, str(tmp_path), budget={"max_failure_fraction": 0.5})
    assert _run(job).over_budget


@pytest.mark.usefixtures("cluster")
def test_killed_actor_loses_and_doubles_nothing(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_an_actor() -> None:
        """As soon as a block is in the hands of an actor; many more blocks follow it."""
        _wait_for_marker(tmp_path)
        killed.extend(_scoring_workers()[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    job = _job(phantom.night_1, bundle, str(tmp_path), scoring={"block_rows": 2, "precision": "float32"})
    killer = threading.Thread(target=kill_an_actor)
    killer.start()
    summary = _run(job)
    killer.join()
    assert len(killed) == 1
    assert summary.failures_by_code.get("worker_crash", 0) == 0
    assert _ids(str(tmp_path)) == _expected(phantom.night_1)


def test_killed_driver_is_finished_by_the_same_command(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, s3: str
) -> None:
    output = f"{s3}/out"
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--json"]
    for item in (
        f"archive.uri={phantom.night_1}",
        f"bundle={bundle.uri}",
        f"output={output}",
        "privacy.demo_key=true",
        "scoring.block_rows=1",
        "budget.max_failure_fraction=1.0",
        "ray.num_cpus=2",
    ):
        command += ["--set", item]
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stderr is not None
    for line in driver.stderr:
        if "a second" in line:
            break
    else:
        pytest.fail("the run ended before it could be killed")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert _ids(output) == Counter()
    time.sleep(2)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert _ids(output) == _expected(phantom.night_1)
    runs = tables.read(output, "runs")
    assert runs is not None
    assert runs.num_rows == 1
