"""The Kubernetes manifests: rendered by kustomize, each rule broken once; the nightly starter against a stand-in API server."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_rules import Document, findings, parse, ray_clusters

from medvision_ray import __version__
from medvision_ray.config import ScoreJob, TrainJob, load_job
from medvision_ray.serving.ingress import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy/kuberay/base"
OVERLAYS = ("development", "production")
RAY = next(
    line.removeprefix("ray==").strip()
    for line in (ROOT / "constraints/py311.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("ray==")
)


@lru_cache
def _rendered(overlay: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, whose kustomize renders the overlays, is not installed")
    folder = ROOT / "deploy/kuberay/overlays" / overlay
    return subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.fixture
def documents() -> list[Document]:
    """The base, put together as kustomize does, so that the rules are tested where there is no kubectl."""
    settings = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    image = settings["images"][0]
    found = []
    for name in settings["resources"]:
        text = (BASE / name).read_text(encoding="utf-8")
        found += parse(re.sub(r"image: medvision$", f"image: {image['newName']}:{image['newTag']}", text, flags=re.M))
    for item in settings["configMapGenerator"]:
        assert all((BASE / file).is_file() for file in item["files"])
        found.append({"kind": "ConfigMap", "metadata": {"name": item["name"]}})
    return copy.deepcopy(json.loads(json.dumps(found)))


def one(documents: list[Document], kind: str, name: str) -> Any:
    return next(each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name)


def test_the_base_holds(documents: list[Document]) -> None:
    assert findings(documents, RAY) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_renders_and_holds(overlay: str) -> None:
    rendered = parse(_rendered(overlay))
    assert findings(rendered, RAY) == []
    assert {document["metadata"].get("namespace") for document in rendered if document["kind"] != "Namespace"} == {
        "medvision"
    }
    assert len(list(ray_clusters(rendered))) == 3
    assert all("image: medvision\n" not in line for line in _rendered(overlay).splitlines(keepends=True))


def test_overlays_change_what_they_say() -> None:
    development, production = (parse(_rendered(overlay)) for overlay in OVERLAYS)
    groups = one(development, "RayJob", "score")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(group["groupName"], group["maxReplicas"]) for group in groups] == [("cpu", 1)]
    assert one(development, "CronJob", "score-nightly")["spec"]["suspend"] is True
    groups = one(production, "RayJob", "score")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["maxReplicas"] for group in groups] == [32, 2]


Change = Callable[[list[Document]], object]


def score(documents: list[Document]) -> Any:
    return one(documents, "RayJob", "score")["spec"]


def head(documents: list[Document]) -> Any:
    return score(documents)["rayClusterSpec"]["headGroupSpec"]


def ray_container(documents: list[Document]) -> Any:
    return head(documents)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: score(d).update(shutdownAfterJobFinish=True), "shutdownAfterJobFinish"),
        (lambda d: ray_container(d).update(resource={}), "resource"),
        (lambda d: ray_container(d)["resources"]["requests"].update(memory="16 GB"), "16 GB"),
        (lambda d: head(d).update(serviceType="LoadBalancer"), "serviceType"),
        (lambda d: one(d, "CronJob", "score-nightly")["spec"].update(schedule="1 15 * *"), "schedule"),
        (lambda d: one(d, "CronJob", "score-nightly")["spec"].update(concurrencyPolicy="Allow"), "concurrencyPolicy"),
        (lambda d: score(d)["rayClusterSpec"].update(rayVersion="2.59.0"), "is not the pinned"),
        (lambda d: score(d)["rayClusterSpec"].pop("authOptions"), "token authentication"),
        (lambda d: score(d)["rayClusterSpec"]["authOptions"].update(mode="disabled"), "token authentication"),
        (lambda d: head(d)["rayStartParams"].pop("num-cpus"), "num-cpus 0"),
        (lambda d: score(d)["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=99), "not in order"),
        (lambda d: score(d).update(shutdownAfterJobFinishes=False), "would stay"),
        (lambda d: score(d).update(suspend=False), "must be suspended"),
        (lambda d: head(d)["template"]["spec"].update(serviceAccountName="admin"), "no such service account"),
        (lambda d: head(d)["template"]["spec"]["securityContext"].update(runAsNonRoot=False), "not run as root"),
        (lambda d: d.remove(one(d, "ConfigMap", "medvision-jobs")), "no ConfigMap medvision-jobs"),
        (lambda d: ray_container(d)["resources"]["requests"].pop("cpu"), "requests for cpu"),
        (lambda d: ray_container(d)["resources"]["limits"].pop("memory"), "memory limit"),
        (lambda d: ray_container(d).pop("securityContext"), "drop all capabilities"),
        (lambda d: ray_container(d).update(image="x/medvision:latest"), "needs a tag"),
        (lambda d: ray_container(d).update(image="x/medvision:1-ray2.59.0-py311"), "does not name Ray"),
        (lambda d: ray_container(d)["volumeMounts"].append({"name": "n", "mountPath": "/n"}), "no volume n"),
        (lambda d: ray_container(d)["env"].append({"name": "A_TOKEN", "value": "0"}), "must come from a Secret"),
        (lambda d: ray_container(d).pop("livenessProbe"), "livenessProbe missing"),
        (
            lambda d: one(d, "PodDisruptionBudget", "medvision-servers")["spec"]["selector"]["matchLabels"].update(
                x="y"
            ),
            "covers no pod",
        ),
        (lambda d: one(d, "PodDisruptionBudget", "medvision-heads")["spec"].update(maxUnavailable=1), "may be drained"),
        (lambda d: d.remove(one(d, "NetworkPolicy", "medvision")), "No NetworkPolicy"),
        (lambda d: one(d, "NetworkPolicy", "medvision")["spec"]["ingress"].append({}), "lets everybody in"),
        (lambda d: d.append({"kind": "Secret", "metadata": {"name": "s"}}), "does not belong here"),
        (
            lambda d: d.append({"kind": "Service", "metadata": {"name": "s"}, "spec": {"type": "NodePort"}}),
            "open to the outside",
        ),
    ],
)
def test_each_rule_can_fail(documents: list[Document], change: Change, said: str) -> None:
    change(documents)
    found = findings(documents, RAY)
    assert any(said in line for line in found), found


def test_the_image_tag_is_this_version() -> None:
    settings = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    assert settings["images"][0]["newTag"] == f"{__version__}-ray{RAY}-py311"


@pytest.mark.parametrize(("name", "model"), [("score", ScoreJob), ("train", TrainJob)])
def test_the_jobs_configurations_are_valid_and_where_the_entrypoint_looks(
    documents: list[Document], name: str, model: Any
) -> None:
    load_job(model, str(BASE / f"jobs/{name}.yaml"))
    job = one(documents, "RayJob", name)["spec"]
    assert (
        job["entrypoint"].split() == f"python -m medvision_ray.cli {name} --config /etc/medvision/{name}.yaml".split()
    )
    container = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "jobs", "mountPath": "/etc/medvision", "readOnly": True} in container["volumeMounts"]


def test_serving_is_configured_as_ray_serve_reads_it(documents: list[Document]) -> None:
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(one(documents, "RayService", "serve")["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(given)
    assert set(given) <= set(ServeDeploySchema.model_fields)  # the schema ignores what it does not know
    assert parsed.http_options.port == 8000
    assert [app.import_path for app in parsed.applications] == ["medvision_ray.serving.deployment:build"]
    beside = ROOT / "deploy/serve.yaml"
    if beside.exists():
        import_path = yaml.safe_load(beside.read_text(encoding="utf-8"))["applications"][0]["import_path"]
        assert parsed.applications[0].import_path == import_path


def test_servers_are_started_with_the_environment_that_medvision_serve_gives(documents: list[Document]) -> None:
    cluster = one(documents, "RayService", "serve")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        given = {item["name"]: item.get("value") for item in group["template"]["spec"]["containers"][0]["env"]}
        assert ENVIRONMENT.items() <= given.items()


class Api(BaseHTTPRequestHandler):
    """As much of the Kubernetes API as the starter speaks to."""

    objects: dict[str, Any]
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        found = self.objects.get(self.path.rpartition("/")[2])
        self.answer(200 if found else 404, found or {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if name in self.objects:
            self.answer(409, {})
            return
        self.objects[name] = body
        self.answer(201, body)

    def answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def api(documents: list[Document]) -> Iterator[Any]:
    template = one(documents, "RayJob", "score")
    template["metadata"]["uid"] = "1-2-3"
    handler = type("Handler", (Api,), {"objects": {"score": template}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_starter_copies_the_template_once_a_day(api: Any, tmp_path: Path) -> None:
    handler, address = api
    (tmp_path / "namespace").write_text("medvision")
    (tmp_path / "token").write_text("a-token")

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"MEDVISION_ACCOUNT_FOLDER": str(tmp_path), "MEDVISION_KUBERNETES": address}
        command = [sys.executable, str(BASE / "start_job.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    first = start("score", "20260101")
    assert (first.returncode, first.stdout) == (0, "Started score-20260101.\n"), first.stderr
    made = handler.objects["score-20260101"]
    assert made["spec"]["suspend"] is False
    assert {**made["spec"], "suspend": True} == handler.objects["score"]["spec"]
    assert made["metadata"]["ownerReferences"][0]["uid"] == "1-2-3"
    assert handler.seen[0] == ("/apis/ray.io/v1/namespaces/medvision/rayjobs/score", "Bearer a-token")
    again = start("score", "20260101")
    assert (again.returncode, again.stdout) == (0, "score-20260101 is there already.\n")
    assert set(handler.objects) == {"score", "score-20260101"}
    assert start("nobody", "20260101").returncode == 1
    assert start("score").returncode == 0
    assert re.fullmatch(r"score-\d{8}", max(set(handler.objects) - {"score-20260101"}, key=len))
