"""A real server: concurrent requests, a new version and killed processes under load, and what its logs hold."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx2 as httpx
import numpy as np
import pytest
import ray
import torch
from own_processes import processes

from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.config import RayConfig
from medvision_ray.config.serving import HttpConfig, RequestLimits, ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.learning.model import build_model
from medvision_ray.serving.serve import serving

pytestmark = pytest.mark.integration
TOKEN = "token-of-the-integration-test-01"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/octet-stream"}


def other_version(bundle: Bundle, place: Path) -> Bundle:
    torch.manual_seed(1)
    model = build_model(bundle.architecture, bundle.preprocess, len(bundle.classes))
    return save_bundle(
        str(place),
        name=bundle.name,
        architecture=bundle.architecture,
        preprocess=bundle.preprocess,
        classes=bundle.classes,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=model,
    )


@pytest.fixture(scope="module", params=["proxy", "haproxy"])
def ingress(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def served(bundle: Bundle, ingress: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "bundle"
    shutil.copytree(bundle.uri, place)
    return place


@pytest.fixture(scope="module")
def address(served: Path, ingress: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(TOKEN)
    job = ServeJob(
        bundles=(str(served),),
        reload_seconds=0.3,
        http=HttpConfig(port=port, token_file=str(token), ingress=ingress),
        limits=RequestLimits(max_in_flight=12),
        scale=ScaleConfig(cpus=0.5, decoders=2),
        ray=RayConfig(num_cpus=2, object_store_bytes=200 << 20),
    )
    with serving(job) as place:
        yield place
    assert not processes("haproxy -db")


@pytest.fixture(scope="module")
def picture(phantom: PhantomArchive) -> bytes:
    return next(data for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if len(data := path.read_bytes()) > 9999)


def patient(http: httpx.Client, body: bytes) -> httpx.Response:
    """A client that sends again what was refused for now or lost on the way, for a minute."""
    until = time.monotonic() + 60
    while True:
        try:
            response = http.post("/v1/predict", content=body, headers=HEADERS)
            if response.status_code < 429 or time.monotonic() > until:
                return response
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
        time.sleep(0.2)


def under_load(address: str, body: bytes, meanwhile: Callable[[], Any], seconds: float) -> list[httpx.Response]:
    """Answers that four patient clients got, before, while and after something happens."""
    stop = threading.Event()

    def client(_: int) -> list[httpx.Response]:
        found = []
        with httpx.Client(base_url=address, timeout=60) as http:
            while not stop.is_set():
                found.append(patient(http, body))
        return found

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client, number) for number in range(4)]
        time.sleep(1)
        meanwhile()
        time.sleep(seconds)
        stop.set()
        return [response for future in futures for response in future.result()]


def test_requests_come_the_way_that_was_asked_for(address: str, ingress: str) -> None:
    assert bool(processes("haproxy -db")) == (ingress == "haproxy")
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    places = [place[1].split(":") for place in listening if place[3] == "0A"]
    # The doors that replicas have for HAProxy, one a replica, are this machine's own.
    doors = [host for host, port in places if 30000 <= int(port, 16) <= 31000]
    assert doors == (["0100007F"] if ingress == "haproxy" else [])


def test_without_the_token_nobody_is_answered(address: str, picture: bytes) -> None:
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.post(f"{address}/v1/predict", content=picture).status_code == 401


def test_an_answer_may_be_larger_than_a_message_of_grpc_usually_is(address: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2200, 2200), np.uint8)
    body = cv2.imencode(".png", noise)[1].tobytes()
    headers = {**HEADERS, "Accept": "image/png"}
    answer = httpx.post(f"{address}/v1/predict", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert len(answer.content) > 4 << 20
    assert cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR).shape[:2] == noise.shape


def test_the_client_in_the_readme_gets_a_prediction_or_a_problem(address: str, picture: bytes, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def predict" in code), names)
    (tmp_path / "slice").write_bytes(picture)
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    found = [names["predict"](tmp_path / name, f"{address}/v1/predict", TOKEN) for name in ("slice", "rubbish")]
    assert sum(item["probability"] for item in found[0]["classes"]) == pytest.approx(1, abs=1e-5)
    assert (found[1]["status"], found[1]["code"]) == (415, "unsupported_format")


def wave(address: str, picture: bytes) -> list[httpx.Response]:
    """The answers to 120 requests, 60 at a time."""
    with httpx.Client(base_url=address, timeout=60) as http, ThreadPoolExecutor(60) as pool:
        return list(pool.map(lambda _: http.post("/v1/predict", content=picture, headers=HEADERS), range(120)))


def test_more_requests_than_are_taken_on_are_told_to_come_again(address: str, picture: bytes) -> None:
    answers = wave(address, picture)
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    values = {answer.json()["predicted_probability"] for answer in answers if answer.status_code == 200}
    assert max(values) - min(values) < 2e-7


def test_those_that_come_at_once_are_scored_together(address: str, picture: bytes) -> None:
    for _ in range(10):  # how many come at once is the machine's affair
        wave(address, picture)
        lines = httpx.get(f"{address}/metrics", headers=HEADERS).text.splitlines()
        batches, objects = (
            next(float(line.split()[1]) for line in lines if line.startswith(f"medvision_serve_batch_objects_{name} "))
            for name in ("count", "sum")
        )
        if objects > batches:
            break
    assert objects > batches


def test_a_new_version_is_taken_over_without_a_request_lost(
    address: str, picture: bytes, served: Path, bundle: Bundle, tmp_path: Path
) -> None:
    new = other_version(bundle, tmp_path / "new")

    def replace() -> None:
        (served / "bundle.yaml").unlink()
        for part in sorted(Path(new.uri).iterdir(), key=lambda part: part.name == "bundle.yaml"):
            shutil.copy(part, served / part.name)

    answers = under_load(address, picture, replace, 8)
    assert {answer.status_code for answer in answers} == {200}
    ids = [answer.json()["model_id"] for answer in answers]
    assert set(ids) == {bundle.model_id, new.model_id}
    assert load_bundle(str(served)).model_id == new.model_id


def test_a_decoding_process_that_is_killed_costs_the_objects_it_held(address: str, picture: bytes) -> None:
    before = processes("medvision_ray.serving.tasks")
    assert len(before) == 2

    def kill() -> None:
        for process in before:
            os.kill(process, signal.SIGKILL)

    answers = under_load(address, picture, kill, 5)
    lost = [answer for answer in answers if answer.status_code != 200]
    assert len(lost) <= 2
    assert all((answer.status_code, answer.json()["code"]) == (422, "worker_crash") for answer in lost)
    assert answers[-1].status_code == 200
    assert len(processes("medvision_ray.serving.tasks")) == 2


def test_a_replica_that_is_killed_costs_a_client_that_retries_nothing(address: str, picture: bytes) -> None:
    replicas = processes("ServeReplica:medvision")
    assert len(replicas) == 1
    answers = under_load(address, picture, lambda: os.kill(replicas[0], signal.SIGKILL), 20)
    assert {answer.status_code for answer in answers} == {200}
    again = processes("ServeReplica:medvision")
    assert again != replicas


def test_logs_hold_no_identifier(address: str, phantom: PhantomArchive) -> None:
    name = "DOE^JANE^4711"
    with httpx.Client(base_url=address, timeout=60) as http:
        for path in sorted(Path(phantom.night_1).rglob("*"))[::4]:
            if path.is_file():
                form = {"file": (f"{name}.dcm", path.read_bytes(), "application/dicom")}
                headers = {"Authorization": HEADERS["Authorization"], "X-Request-ID": name, "User-Agent": name}
                http.post(f"/v1/predict?patient={name}", files=form, headers=headers)
        http.get(f"/v1/models/{name}/card", headers=HEADERS)
        http.get(f"/{name}", headers=HEADERS)
    time.sleep(1)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any("serve" in path.name or "serve" in str(path.parent) for path in texts)
    planted = [name, TOKEN, *phantom.identifiers]
    found = {(path.name, word) for path, text in texts.items() for word in planted if word.encode() in text}
    assert found == set()
