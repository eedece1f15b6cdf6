"""Whole scoring runs on a local Ray: exactly one row an object, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import ArchiveConfig, DecodeConfig, RayConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import StorageError, UsageError
from medvision_ray.fingerprint import Fingerprint, reference_of_numbers
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.imaging.volume import decode_series
from medvision_ray.listing import list_objects
from medvision_ray.logs import silent
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.run import preview, score
from medvision_ray.scoring.summary import RunSummary
from medvision_ray.verification import verify

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> object:
    with ray_session(RayConfig(num_cpus=2)):
        yield


def _job(archive: str | dict[str, object], bundle: Bundle, output: str, **more: object) -> ScoreJob:
    settings = {
        "archive": archive if isinstance(archive, dict) else {"uri": archive},
        "bundle": bundle.uri,
        "output": output,
        "privacy": {"demo_key": True},
        "scoring": {"block_rows": 8, "precision": "float32", "actors": 1},
        "budget": {"max_failure_fraction": 1.0},
        **more,
    }
    return build_job(ScoreJob, settings, "a test")


def _run(job: ScoreJob) -> RunSummary:
    return score(job, silent)


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
        if b"ScoringActor" in title:
            found.append(int(place.parent.name))
    return found


def _wait_for_marker(output: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/inflight/*")):
        assert time.monotonic() < deadline, "no actor has begun on a block"
        time.sleep(0.01)


def _expected(*archives: str) -> Counter[int]:
    return Counter(i for uri in archives for i in list_archive(ArchiveConfig(uri=uri)).objects["image_id"].to_pylist())


@pytest.mark.core
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
def test_a_shifted_night_is_flagged_and_ends_over_its_budget(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    reference = reference_of_numbers([1.0, 2.0] * 100, [str(i) for i in range(200)], "train")
    assert reference is not None
    features = {"input_mean": reference}
    marked = save_bundle(
        str(tmp_path / "marked"),
        **{name: getattr(bundle, name) for name in ("name", "architecture", "preprocess", "classes", "multi_label")},
        **{name: getattr(bundle, name) for name in ("thresholds", "mask_threshold", "trained", "metrics")},
        train_digest=(),
        model=bundle.build_model(),
        fingerprint=Fingerprint(features),
    )
    drift = {"min_images": 5, "max_psi": 1.0}
    job = _job(phantom.night_2, marked, str(tmp_path / "output"), run_key="night", drift=drift)
    first, again = _run(job), _run(job)
    for summary in (first, again):
        assert summary.drift is not None
        assert summary.drift.shifted == ("input_mean",)
        assert summary.over_budget == ("drift",)
        assert "SHIFTED" in summary.sentence()
        assert any("input_mean (PSI" in line for line in summary.details())
    rows = tables.read(str(tmp_path / "output"), "metrics")
    assert rows is not None
    assert sorted(rows["metric"].to_pylist()) == ["drift_ks", "drift_psi", "drift_shifted"]


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
    assert (summary.listed, summary.scored, summary.failed, summary.over_budget) == (0, 0, 0, ())


@pytest.mark.usefixtures("cluster")
def test_failures_over_the_budget_are_told(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    job = _job(str(Path(phantom.night_1) / "incoming"), bundle, str(tmp_path), budget={"max_failure_fraction": 0.5})
    assert _run(job).over_budget


@pytest.mark.core
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


@pytest.mark.usefixtures("cluster")
def test_run_over_its_time_publishes_what_is_done_and_the_next_goes_on(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    first = _run(_job(phantom.night_2, bundle, str(tmp_path), max_hours=1e-9))
    assert (first.state, first.scored, first.failed, first.not_scored) == (
        "deadline",
        0,
        0,
        phantom.night_2_objects,
    )
    second = _run(_job(phantom.night_2, bundle, str(tmp_path), max_hours=9))
    assert (second.state, second.not_scored, second.already_done) == ("complete", 0, 0)
    assert _ids(str(tmp_path)) == _expected(phantom.night_2)
    assert first.run_key != second.run_key


@pytest.mark.usefixtures("cluster")
def test_retried_failures_are_replaced(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    first = _run(_job(phantom.night_1, bundle, str(tmp_path), decode={"max_bytes": 20_000}))
    assert first.failures_by_code["too_large"] > 0
    second = _run(_job(phantom.night_1, bundle, str(tmp_path), retry_failed=("too_large",)))
    assert second.retried == second.scored + second.failed == first.failures_by_code["too_large"]
    assert _ids(str(tmp_path)) == _expected(phantom.night_1)
    failures = tables.read(str(tmp_path), "failures")
    assert failures is not None
    assert failures.num_rows == first.failed - second.retried + second.failed
    assert "too_large" not in failures["error_code"].to_pylist()


@pytest.mark.usefixtures("cluster")
def test_budget_of_one_code_and_examples_of_reasons(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    budget = {"max_failure_fraction": 1.0, "by_code": {"truncated": 0.0, "no_pixels": 1.0}}
    summary = _run(_job(str(Path(phantom.night_1) / "incoming"), bundle, str(tmp_path), budget=budget))
    assert summary.over_budget == ("truncated",)
    failures = tables.read(str(tmp_path), "failures", ["image_id", "error_code"])
    assert failures is not None
    codes = dict(zip(failures["image_id"].to_pylist(), failures["error_code"].to_pylist(), strict=True))
    assert summary.reasons[0].error_code == "unsupported_format"
    for reason in summary.reasons:
        assert 1 <= len(reason.examples) <= 3
        assert {codes[image_id] for image_id in reason.examples} == {reason.error_code}


@pytest.mark.usefixtures("cluster")
def test_runs_row_tells_what_the_run_cost(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    _run(_job(phantom.night_2, bundle, str(tmp_path)))
    runs = tables.read(str(tmp_path), "runs")
    assert runs is not None
    row = runs.to_pylist()[0]
    size = sum(list_archive(ArchiveConfig(uri=phantom.night_2)).objects["size"].to_pylist())
    assert row["bytes_read"] == size
    assert row["peak_memory_bytes"] > 50 << 20
    for stage in ("list", "read", "decode", "preprocess", "predict", "write"):
        assert row[f"{stage}_seconds"] > 0, stage


def test_dry_run_counts_and_writes_nothing(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    counts = preview(_job(phantom.night_2, bundle, str(tmp_path / "output")))
    assert (counts["to_score"], counts["already_done"]) == (phantom.night_2_objects, 0)
    assert not (tmp_path / "output").exists()


def test_unknown_error_code_is_refused(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="truncated"):
        preview(_job(phantom.night_2, bundle, str(tmp_path), retry_failed=("truncted",)))


def _has_committed_a_file(output: str) -> bool:
    try:
        return any("/rows/" in item.path for item in list_objects(f"{output}/runs"))
    except StorageError:
        return False


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
        "scoring.block_rows=4",
        "budget.max_failure_fraction=1.0",
        "ray.num_cpus=2",
    ):
        command += ["--set", item]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not _has_committed_a_file(output):
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no rows were written"
        time.sleep(0.1)
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


@pytest.mark.usefixtures("cluster")
def test_a_series_is_one_row_and_one_with_a_gap_a_failure(
    bundle: Bundle, phantom_series: Callable[..., list[bytes]], tmp_path: Path
) -> None:
    archive, output = tmp_path / "archive", str(tmp_path / "output")
    whole, other, broken = (phantom_series(count, series=k) for k, count in enumerate((6, 4, 6)))
    del broken[3]
    files = {f"whole/{9 - k}": part for k, part in enumerate(whole)}  # names against the order of places
    files |= {f"other/{k}": part for k, part in enumerate(other)} | {f"gap/{k}": part for k, part in enumerate(broken)}
    files["alone.dcm"] = phantom_series(1, series=7)[0]
    for name, data in files.items():
        storage.write_bytes(str(archive / name), data)
    job = _job({"uri": str(archive), "volumes": True}, bundle, output)
    assert {key: preview(job)[key] for key in ("to_score", "volumes")} == {"to_score": 4, "volumes": 3}

    summary = _run(job)
    assert (summary.scored, summary.failed) == (3, 1)
    rows = tables.read(output, "predictions")
    failures = tables.read(output, "failures")
    assert rows is not None
    assert failures is not None
    by_uri = {row["uri"].removeprefix(f"{archive}/"): row for row in rows.to_pylist()}
    assert {name: row["frames"] for name, row in by_uri.items()} == {
        "whole/4#series": 6,
        "other/0#series": 4,
        "alone.dcm": 1,
    }
    [failure] = failures.to_pylist()
    assert (failure["uri"], failure["error_code"]) == (f"{archive}/gap/0#series", "slice_gap")

    row = by_uri["whole/4#series"]
    assert [frame["frame"] for frame in row["frame_results"]] == list(range(6))
    image = decode_series(whole, DecodeConfig())
    expected = Predictor(bundle, "float32").predict(prepare(image, bundle.preprocess).pixels).probabilities
    found = np.array([frame["probabilities"] for frame in row["frame_results"]])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # slice by slice, in the order of places
    np.testing.assert_allclose(
        [row[f"p_{name}"] for name in bundle.classes], np.asarray(expected).mean(axis=0), atol=1e-4
    )
    assert (row["spacing_mm"], row["spacing_source"], row["modality"]) == ([0.7, 0.9], "pixel_spacing", "CT")
    assert row["study_key"] == by_uri["other/0#series"]["study_key"]
    assert row["series_key"] != by_uri["other/0#series"]["series_key"]
    assert "PID-1" not in json.dumps([*rows.to_pylist(), *failures.to_pylist()], default=str)

    again = _run(job)
    assert (again.scored, again.failed, again.already_done) == (0, 0, 4)
    assert not verify(output).findings
    assert preview(job)["to_score"] == 0
