"""Whole scoring runs over an object store that misbehaves: exactly one row an object, and the right one.

Archive and output both lie behind the fault-injecting proxy, so that every request of a run is at risk: boto3's,
pyarrow's in Ray's tasks, and deltalake's.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
from moto.server import ThreadedMotoServer
from s3_proxy import Fault, S3Proxy

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import ArchiveConfig, RayConfig, ScoreJob, load_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.scoring.run import score
from medvision_ray.scoring.summary import RunSummary

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]

OBJECTS = 20


@pytest.fixture(scope="module")
def proxy() -> Iterator[S3Proxy]:
    """The endpoint of this process and of the Ray that is started in it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with S3Proxy(f"http://{host}:{port}") as proxy, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage._filesystem.cache_clear()
        storage._s3_client.cache_clear()
        with ray_session(RayConfig(num_cpus=2)):
            yield proxy
    server.stop()


@pytest.fixture
def place(proxy: S3Proxy, phantom: PhantomArchive, request: pytest.FixtureRequest) -> str:
    """A bucket that holds `archive/` with whole, small images."""
    bucket = f"run-{crc32(request.node.name.encode()):08x}"
    proxy.play()
    storage.s3_client().create_bucket(Bucket=bucket)
    images = sorted(path for path in Path(phantom.night_2).rglob("*") if path.is_file())
    for number, path in enumerate(sorted(images, key=lambda path: path.stat().st_size)[:OBJECTS]):
        storage.write_bytes(f"s3://{bucket}/archive/{number % 3}/{number:02d}{path.suffix}", path.read_bytes())
    return f"s3://{bucket}"


def _settings(place: str, bundle: Bundle) -> dict[str, object]:
    return {
        "archive.uri": f"{place}/archive",
        "bundle": bundle.uri,
        "output": f"{place}/out",
        "privacy.demo_key": "true",
        "scoring.block_rows": 4,
        "scoring.precision": "float32",
        "budget.max_failure_fraction": 1.0,
    }


def _run(place: str, bundle: Bundle) -> RunSummary:
    given = [f"{name}={value}" for name, value in _settings(place, bundle).items()]
    return score(load_job(ScoreJob, None, given), lambda text, **_fields: print(text))


def _ids(place: str, name: str) -> Counter[int]:
    rows = tables.read(f"{place}/out", name, ["image_id"])
    return Counter(rows["image_id"].to_pylist() if rows is not None else [])


def _failures(place: str) -> dict[str, str]:
    """Key -> error code."""
    rows = tables.read(f"{place}/out", "failures", ["uri", "error_code"])
    return {row["uri"].removeprefix("s3://"): row["error_code"] for row in (rows.to_pylist() if rows else [])}


def _listed(place: str) -> dict[str, int]:
    """Key -> image_id, asked for while nothing is wrong."""
    objects = list_archive(ArchiveConfig(uri=f"{place}/archive")).objects.to_pylist()
    return {item["uri"].removeprefix("s3://"): item["image_id"] for item in objects}


def _in_bodies(kind: str) -> list[Fault]:
    """deltalake repeats no request whose body broke, and a commit reads some fifteen of them."""
    tables_only, others = "/out/tables/", "^(?!.*/out/tables/)"
    return [Fault(kind, ("GET", "LIST"), tables_only, chance=0.03), Fault(kind, ("GET", "LIST"), others, chance=0.15)]


TRANSIENT = {
    "throttled now and then": [Fault("slow_down", chance=0.2, retry_after=1)],
    "throttled above a rate": [Fault("slow_down", rate=25)],
    "internal errors": [Fault("internal_error", chance=0.15)],
    "reads that time out": [Fault("request_timeout", ("GET",), keys="/archive/", chance=0.3)],
    "resets": [Fault("reset", chance=0.1)],
    "lost answers": [Fault("lost_answer", ("GET", "PUT", "HEAD", "LIST", "DELETE"), chance=0.1)],
    "resets in a body": _in_bodies("reset_half_way"),
    "short reads": _in_bodies("short_read"),
    "chunked bodies that end early": _in_bodies("short_chunked"),
    "wrong bytes": [Fault("wrong_bytes", ("GET",), keys="/archive/", chance=0.3)],
    "silence": [Fault("stall", ("GET", "PUT"), chance=0.1, total=3, seconds=60)],
    "silence in a body": [Fault("stall_half_way", ("GET",), chance=0.1, total=3, seconds=60)],
    "latency": [Fault("latency", seconds=0.05)],
    "a bit of everything": [
        Fault(kind, chance=0.03) for kind in ("slow_down", "internal_error", "reset", "short_read", "lost_answer")
    ],
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_passes_costs_no_row(name: str, proxy: S3Proxy, place: str, bundle: Bundle) -> None:
    listed = _listed(place)
    proxy.play(*TRANSIENT[name], seed=crc32(name.encode()))
    summary = _run(place, bundle)
    struck = sum(proxy.struck.values())
    print(f"{name}: {struck} of {sum(proxy.requests.values())} requests struck, {dict(proxy.requests)}")
    proxy.play()
    assert struck > 0
    assert (summary.scored, summary.failed) == (OBJECTS, 0)
    assert _ids(place, "predictions") == Counter(listed.values())
    assert _failures(place) == {}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("access_denied", "access_denied"),
        ("deleted", "not_found"),
        ("changed", "changed_while_reading"),
        ("changed_half_way", "changed_while_reading"),
        ("internal_error", "read_error"),
    ],
)
def test_what_stays_costs_its_own_row(kind: str, code: str, proxy: S3Proxy, place: str, bundle: Bundle) -> None:
    listed = _listed(place)
    fault = Fault(kind, ("GET",), keys="/archive/", share=0.2, first=1 if "changed" in kind else None)
    proxy.play(fault, seed=crc32(kind.encode()))
    expected = proxy.struck_keys(fault, list(listed))
    summary = _run(place, bundle)
    assert proxy.struck[kind] >= len(expected) > 0
    proxy.play()
    assert _failures(place) == dict.fromkeys(expected, code)
    assert (summary.scored, summary.failed) == (OBJECTS - len(expected), len(expected))
    both = _ids(place, "predictions") + _ids(place, "failures")
    assert both == Counter(listed.values())


@pytest.mark.parametrize("after", [0, 40, 120])
def test_credentials_that_expire_stop_the_run_and_the_same_command_goes_on(
    after: int, proxy: S3Proxy, place: str, bundle: Bundle
) -> None:
    listed = _listed(place)
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--set", "ray.num_cpus=2"]
    for name, value in _settings(place, bundle).items():
        command += ["--set", f"{name}={value}"]
    proxy.play(Fault("expired_token", after=after))
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert stopped.returncode == 1, stopped.stderr
    assert "redentials" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert proxy.struck["expired_token"] > 0
    proxy.play()
    assert _ids(place, "predictions") + _ids(place, "failures") == Counter()
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert _ids(place, "predictions") == Counter(listed.values())
    assert _failures(place) == {}


@pytest.mark.parametrize("keys", ["/archive/", ""], ids=["the archive's store", "the only store"])
def test_a_store_that_goes_away_stops_the_run_and_the_same_command_goes_on(
    keys: str, proxy: S3Proxy, place: str, bundle: Bundle
) -> None:
    for key in [*_listed(place)]:
        data = storage.read_bytes(f"s3://{key}")
        for copy in range(3):
            storage.write_bytes(f"s3://{key}".replace("/archive/", f"/archive/copy-{copy}/"), data)
    listed = _listed(place)
    assert len(listed) == 4 * OBJECTS
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--set", "ray.num_cpus=2"]
    for name, value in {**_settings(place, bundle), "scoring.block_rows": 40, "scoring.actors": 1}.items():
        command += ["--set", f"{name}={value}"]
    # Some 20 requests before the first object is read go to the output alone.
    proxy.play(Fault("reset", keys=keys, after=30 if keys else 50))
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=380)
    assert stopped.returncode == 1, stopped.stderr
    assert "the same command" in stopped.stderr.lower()
    assert "Traceback" not in stopped.stderr
    assert proxy.struck["reset"] > 0
    proxy.play()
    assert _ids(place, "predictions") + _ids(place, "failures") == Counter()
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert _ids(place, "predictions") == Counter(listed.values())
    assert _failures(place) == {}
