"""What the Kubernetes manifests must hold: fields that KubeRay 1.6 and Kubernetes know, and our own rules.

The fields are written down here by hand for what we use, so a misspelt one is found without a cluster. The last word is the
API server's: `kubectl apply --dry-run=server -k deploy/kuberay/overlays/production`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from jsonschema import Draft7Validator

Document = dict[str, Any]


def record(required: str = "", **fields: Any) -> dict[str, Any]:
    """An object of exactly these fields."""
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": required.split()}


def listing(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
WORDS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|Mi|Gi)?$"},
}
RESOURCES = record("requests limits", requests=QUANTITIES, limits=QUANTITIES)
SECURITY = record(
    allowPrivilegeEscalation=FLAG,
    readOnlyRootFilesystem=FLAG,
    capabilities=record(drop=listing(TEXT)),
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=record("type", type=TEXT),
)
PROBE = record(
    "httpGet",
    httpGet=record("port", path=TEXT, port=COUNT),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
ENVIRONMENT = record(
    "name",
    name=TEXT,
    value=TEXT,
    valueFrom=record(secretKeyRef=record("name key", name=TEXT, key=TEXT)),
)
CONTAINER = record(
    "name image resources",
    name=TEXT,
    image=TEXT,
    command=listing(TEXT),
    env=listing(ENVIRONMENT),
    ports=listing(record("containerPort", name=TEXT, containerPort=COUNT)),
    resources=RESOURCES,
    securityContext=SECURITY,
    startupProbe=PROBE,
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    volumeMounts=listing(record("name mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    "name",
    name=TEXT,
    emptyDir=record(medium={"enum": ["Memory"]}, sizeLimit=TEXT),
    configMap=record("name", name=TEXT),
)
POD = record(
    "spec",
    metadata=record(labels=WORDS, annotations=WORDS),
    spec=record(
        "containers",
        serviceAccountName=TEXT,
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
        terminationGracePeriodSeconds=COUNT,
        securityContext=SECURITY,
        nodeSelector=WORDS,
        tolerations=listing(record(key=TEXT, operator=TEXT, effect=TEXT)),
        containers=listing(CONTAINER),
        volumes=listing(VOLUME),
    ),
)
RAY_CLUSTER = record(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=record("mode", mode={"enum": ["token", "disabled"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, resources=RESOURCES, securityContext=SECURITY
    ),
    headGroupSpec=record(
        "template rayStartParams", serviceType={"const": "ClusterIP"}, rayStartParams=WORDS, template=POD
    ),
    workerGroupSpecs=listing(
        record(
            "groupName replicas minReplicas maxReplicas template rayStartParams",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            labels=WORDS,
            rayStartParams=WORDS,
            template=POD,
        )
    ),
)
SPECS = {
    "RayJob": record(
        "entrypoint rayClusterSpec suspend",
        suspend=FLAG,
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode"]},
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=POD,
        rayClusterSpec=RAY_CLUSTER,
    ),
    "RayService": record("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER),
    "CronJob": record(
        "schedule jobTemplate",
        schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
        timeZone=TEXT,
        suspend=FLAG,
        concurrencyPolicy={"const": "Forbid"},
        startingDeadlineSeconds=COUNT,
        successfulJobsHistoryLimit=COUNT,
        failedJobsHistoryLimit=COUNT,
        jobTemplate=record(
            spec=record(
                "template", backoffLimit=COUNT, activeDeadlineSeconds=COUNT, ttlSecondsAfterFinished=COUNT, template=POD
            )
        ),
    ),
    "PodDisruptionBudget": record("selector", maxUnavailable=COUNT, selector=record(matchLabels=WORDS)),
}


def findings(documents: list[Document], ray_version: str) -> list[str]:
    """What is wrong with a rendered set of manifests."""
    found = [line for document in documents for line in _fields(document)]
    if found:  # what follows relies on the fields
        return found
    rules = (_clusters, _pods, _budgets, _open)
    return [line for rule in rules for line in rule(documents, ray_version)]


def _name(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def _fields(document: Document) -> Iterator[str]:
    schema = SPECS.get(document["kind"])
    if schema is None:
        return
    for error in Draft7Validator(schema).iter_errors(document["spec"]):
        yield f"{_name(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def ray_clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
        if key:
            yield _name(document), document["spec"][key]


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template with the labels that KubeRay adds."""
    for name, cluster in ray_clusters(documents):
        for kind, group in [("head", cluster["headGroupSpec"]), *[("worker", g) for g in cluster["workerGroupSpecs"]]]:
            template = group["template"]
            labels = {**template["metadata"]["labels"], "ray.io/node-type": kind}
            yield f"{name}, {kind}", {**template, "metadata": {"labels": labels}}
    for document in documents:
        if document["kind"] == "CronJob":
            yield _name(document), document["spec"]["jobTemplate"]["spec"]["template"]
        if document["kind"] == "RayJob":
            yield f"{_name(document)}, submitter", document["spec"]["submitterPodTemplate"]


def _clusters(documents: list[Document], ray_version: str) -> Iterator[str]:
    for name, cluster in ray_clusters(documents):
        if cluster["rayVersion"] != ray_version:
            yield f"{name}: Ray {cluster['rayVersion']} is not the pinned {ray_version}."
        if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
            yield f"{name}: token authentication with a Secret is missing."
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{name}: the head must have num-cpus 0."
        for group in cluster["workerGroupSpecs"]:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{name}: replicas of {group['groupName']} are not in order."
    for document in documents:
        if document["kind"] == "RayJob" and not document["spec"]["shutdownAfterJobFinishes"]:
            yield f"{_name(document)}: the cluster would stay after the job."
        if document["kind"] == "RayJob" and document["spec"]["suspend"] is not True:
            yield f"{_name(document)}: a template must be suspended."


def _pods(documents: list[Document], ray_version: str) -> Iterator[str]:
    maps = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
    accounts = {document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"}
    for name, pod in pods(documents):
        spec = pod["spec"]
        if spec.get("serviceAccountName", next(iter(accounts))) not in accounts:
            yield f"{name}: no such service account."
        if spec["securityContext"].get("runAsNonRoot") is not True:
            yield f"{name}: must not run as root."
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in maps:
                yield f"{name}: no ConfigMap {volume['configMap']['name']}."
        for container in spec["containers"]:
            yield from _container(f"{name}, {container['name']}", container, set(volumes), ray_version)


def _container(place: str, container: Document, volumes: set[str], ray_version: str) -> Iterator[str]:
    if not {"cpu", "memory"} <= set(container["resources"]["requests"]):
        yield f"{place}: requests for cpu and memory are missing."
    if "memory" not in container["resources"]["limits"]:
        yield f"{place}: a memory limit is missing."
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{place}: must drop all capabilities and not gain privileges."
    tag = container["image"].rpartition(":")[2]
    if tag in ("", "latest") or ":" not in container["image"]:
        yield f"{place}: the image needs a tag."
    if "medvision" in container["image"] and f"-ray{ray_version}-" not in container["image"]:
        yield f"{place}: the image's tag does not name Ray {ray_version}."
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"{place}: no volume {mount['name']}."
    for item in container.get("env", []):
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD", item["name"]) and "value" in item:
            yield f"{place}: {item['name']} must come from a Secret."
    if container["name"].startswith("ray-"):
        missing = {"startupProbe", "livenessProbe", "readinessProbe"} - set(container)
        if missing:
            yield f"{place}: {', '.join(sorted(missing))} missing."


def _budgets(documents: list[Document], ray_version: str) -> Iterator[str]:
    labels = [pod["metadata"].get("labels", {}) for name, pod in pods(documents) if "metadata" in pod]
    budgets = [document for document in documents if document["kind"] == "PodDisruptionBudget"]
    for document in budgets:
        wanted = document["spec"]["selector"]["matchLabels"].items()
        if not any(wanted <= found.items() for found in labels):
            yield f"{_name(document)} covers no pod."
    for found in labels:
        if found.get("ray.io/node-type") == "head" and not any(
            document["spec"]["selector"]["matchLabels"].items() <= found.items()
            and document["spec"].get("maxUnavailable") == 0
            for document in budgets
        ):
            yield f"A head of {found.get('app.kubernetes.io/component')} may be drained."


def _open(documents: list[Document], ray_version: str) -> Iterator[str]:
    kinds = [document["kind"] for document in documents]
    if "NetworkPolicy" not in kinds:
        yield "No NetworkPolicy: every pod of the cluster reaches the job API."
    for document in documents:
        if document["kind"] in ("Ingress", "Secret"):
            yield f"{_name(document)} does not belong here."
        if document["kind"] == "Service" and document["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"{_name(document)} is open to the outside."
        if document["kind"] == "NetworkPolicy":
            for rule in document["spec"]["ingress"]:
                if not rule.get("from"):
                    yield f"{_name(document)} lets everybody in."


def parse(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]
