"""`medvision submit` against a head of `ray start` with token authentication, as a user would: codes, a stop, a lost head."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvision_ray import tables
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.demo.archive import PhantomArchive

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


class Head:
    """A Ray head in a process group of its own, on ports of its own; `ray stop` would end every Ray of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "ray_token"
        token.write_text(secrets.token_hex(32))
        self.ports = free_ports(6)
        self.url = f"http://127.0.0.1:{self.ports[1]}"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_JOB_STOP_WAIT_TIME_S": "60"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        names += ("metrics-export-port", "dashboard-agent-grpc-port")
        command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
        command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--temp-dir={self.folder / 'r'}"]
        command += [f"--{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        self.process = subprocess.Popen(
            command, env=self.env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 240
        while self.answers() != 401:  # the dashboard is up, and refuses who has no token
            assert self.process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(1)

    def answers(self) -> int | None:
        try:
            with urllib.request.urlopen(f"{self.url}/api/jobs/", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def kill(self) -> None:
        """SIGKILL to all that this head started, which are in its session and name its folder."""
        if self.process is None:
            return
        with_folder = subprocess.run(
            ["pgrep", "-f", re.escape(str(self.folder / "r"))], capture_output=True, text=True, check=False
        ).stdout.split()
        own_session = subprocess.run(
            ["pgrep", "-s", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        for pid in {*with_folder, *own_session, str(self.process.pid)}:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path("/tmp") / f"mv-{secrets.token_hex(3)}"  # short: Ray's sockets have 107 characters
    folder.mkdir(mode=0o700)
    found = Head(folder)
    try:
        found.start()
        yield found
    finally:
        found.kill()
        shutil.rmtree(folder, ignore_errors=True)


def begin(head: Head, verb: str, config: dict[str, Any], place: Path, *more: str) -> tuple[subprocess.Popen[str], Path]:
    file, out = place / "job.yaml", place / f"out-{secrets.token_hex(3)}"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "jobs/submit.py"), verb, "--config", str(file), "--address", head.url]
    command += ["--day", "one", *more, "--", "--log-format", "json"]
    with out.open("w") as stdout:
        child = subprocess.Popen(command, env=head.env, cwd=place, stdout=stdout, stderr=subprocess.STDOUT, text=True)
    return child, out


def run(head: Head, verb: str, config: dict[str, Any], place: Path, *more: str) -> tuple[int, str]:
    child, out = begin(head, verb, config, place, *more)
    return child.wait(600), out.read_text()


def wait_for_blocks(output: Path, child: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 400
    while not list(output.glob("runs/*/inflight/*")):
        assert child.poll() is None, out.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ids(output: Path) -> list[int]:
    found = [tables.read(str(output), name, ["image_id"]) for name in ("predictions", "failures")]
    return [number for table in found if table is not None for number in table["image_id"].to_pylist()]


def test_a_refused_configuration_ends_with_2_and_a_wrong_token_too(head: Head, tmp_path: Path) -> None:
    code, said = run(head, "score", {"ouput": "x"}, tmp_path)
    assert code == 2, said
    assert "Did you mean" in said or "output" in said
    assert '"exit_code": 2' in said  # the job's own last line
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    head.env["RAY_AUTH_TOKEN_PATH"], right = str(other), head.env["RAY_AUTH_TOKEN_PATH"]
    try:
        code, said = run(head, "score", {"ouput": "x"}, tmp_path)
    finally:
        head.env["RAY_AUTH_TOKEN_PATH"] = right
    assert (code, "wants its token" in said) == (2, True), said


def test_a_stop_then_a_lost_head_then_every_row_once(
    head: Head, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    archive, output = tmp_path / "archive", tmp_path / "output"
    for number in range(32):  # enough for the stop to come before the end, also where 120 images are scored a second
        shutil.copytree(phantom.folder / "archive", archive / f"copy {number}")
    objects = sum(path.is_file() for path in archive.rglob("*"))
    config = {
        **{"archive": {"uri": str(archive)}, "bundle": bundle.uri, "output": str(output)},
        **{"privacy": {"demo_key": True}, "scoring": {"block_rows": 4, "precision": "float32", "actors": 1}},
    }
    child, out = begin(head, "score", config, tmp_path)
    wait_for_blocks(output, child, out)
    child.send_signal(signal.SIGINT)
    assert child.wait(200) == 130, out.read_text()
    said = out.read_text()
    assert re.search(r"Stopping score-one-[0-9a-f]{10}-a1", said)
    assert ids(output) == []  # nothing of a stopped run is visible

    child, out = begin(head, "score", config, tmp_path, "--tries", "2")
    deadline = time.monotonic() + 400
    before = set(output.glob("runs/*/inflight/*"))
    while not set(output.glob("runs/*/inflight/*")) - before:
        assert child.poll() is None, out.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    head.kill()
    head.start()
    # The phantom's broken objects are over the budget: done and published, with code 3.
    assert child.wait(900) == 3, out.read_text()
    assert "ended with its cluster; trying again" in out.read_text()
    found = ids(output)
    assert len(found) == len(set(found)) == objects

    code, said = run(head, "score", config, tmp_path, "--tries", "2", "--json")
    assert (code, "is over with exit code 3" in said) == (3, True), said
    assert json.loads(said.splitlines()[-1])["job_exit_code"] == 3
    code, said = run(head, "score", config, tmp_path, "--again")
    assert code == 0, said  # nothing is new
    assert len(ids(output)) == objects


def test_a_training_and_its_evaluation_are_submitted_like_a_night(
    head: Head, phantom: PhantomArchive, tmp_path: Path
) -> None:
    output, labels = tmp_path / "output", {"table": str(phantom.labels)}
    training = {
        **{"output": str(output), "name": "tiny", "labels": labels, "preprocess": {"size": [64, 64]}, "epochs": 1},
        **{"model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]}, "batch_size": 8},
    }
    code, said = run(head, "train", training, tmp_path)
    assert code == 0, said
    bundle = str(output / "bundles/tiny")
    assert load_bundle(bundle).trained["epochs"] == 1
    evaluation = {"output": str(output), "bundle": bundle, "labels": labels, "privacy": {"demo_key": True}}
    code, said = run(head, "evaluate", evaluation, tmp_path)
    assert code == 0, said
    rows = tables.read(str(output), "metrics", ["metric", "model_id"])
    assert rows is not None
    assert set(rows["model_id"].to_pylist()) == {load_bundle(bundle).model_id}
    assert {"accuracy", "dice"} <= set(rows["metric"].to_pylist())
