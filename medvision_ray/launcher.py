"""What a Ray cluster launcher file (AWS) must hold beyond Ray's own schema, which lets all of this pass."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from medvision_ray.errors import UsageError

_IMAGE = re.compile(r"(?::|:.*-ray)(?P<ray>\d+\.\d+\.\d+)-py(?P<python>3\d\d)(?:-[a-z0-9]+)?$")
"""The tags of Ray's own images, and `:VERSION-rayX.Y.Z-pyXYZ` as deploy/Containerfile says."""
_INSTANCE = re.compile(r"(?P<family>[a-z0-9]+)\.(?P<size>large|xlarge|(?P<times>\d+)xlarge)$")
_CPU_FAMILIES = {
    letter + generation
    for letter in "mcr"
    for generation in ("5", "5a", "5n", "5d", "6i", "6a", "6id", "6in", "7i", "7a", "8i")
}
_GPU_FAMILIES = {"g4dn": 1, "g5": 1, "g6": 1, "g6e": 1, "p4d": 8, "p4de": 8, "p5": 8, "p5e": 8, "p5en": 8}
"""x86 families with NVIDIA GPUs, and the GPUs of their small sizes."""
_MANY_GPUS = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SECRET_ENV = re.compile(r"\b(?:RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|MEDVISION_PSEUDONYM_KEY|\w*TOKEN)=(?!/)\S")


def validate_with_ray(config: dict[str, Any]) -> None:
    """Hold a launcher file against Ray's own schema, after Ray has filled its defaults in.

    Raises:
        UsageError: Ray refuses it; the message names the place.
    """
    import copy
    import io
    from contextlib import redirect_stdout

    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with redirect_stdout(io.StringIO()):  # Ray advises on standard output, which is for results
            validate_config(prepare_config(copy.deepcopy(config)))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "the file"
        raise UsageError(f"Ray's schema refuses {place}: {error.message.splitlines()[0]}.") from None
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UsageError(f"Ray refuses the file: {str(error).splitlines()[0]}") from None


def findings(config: dict[str, Any]) -> list[str]:
    """What is wrong, as sentences that name the key and the fix; empty where nothing is."""
    return [
        *_workers(config),
        *_images(config),
        *_network(config),
        *_instances(config),
        *_start_commands(config),
        *_secrets(config),
    ]


def requirements() -> tuple[SpecifierSet, SpecifierSet]:
    """The Ray versions and the Python versions that this installation of the package declares."""
    from importlib.metadata import metadata

    try:
        wanted = [Requirement(line) for line in requires("medvision-ray") or []]
        python = metadata("medvision-ray")["Requires-Python"]
    except PackageNotFoundError:
        raise UsageError("Expected medvision-ray to be installed (pip install), since its metadata is read.") from None
    ray = next(item.specifier for item in wanted if item.name == "ray")
    return ray, SpecifierSet(python)


def _workers(config: dict[str, Any]) -> Iterator[str]:
    total, head = config.get("max_workers", 0), config.get("head_node_type")
    nodes = {name: node for name, node in config.get("available_node_types", {}).items() if name != head}
    for name, node in nodes.items():
        low, high = node.get("min_workers", 0), node.get("max_workers", total)
        if low > high:
            yield f"available_node_types.{name}: min_workers {low} is above max_workers {high}."
    low = sum(node.get("min_workers", 0) for node in nodes.values())
    if low > total:
        yield f"max_workers {total} is below the min_workers of all types together, {low}."
    high = sum(node.get("max_workers", total) for node in nodes.values())
    if high > total:
        yield f"max_workers {total} is below what the types may have together, {high}: some would never start."
    if not 1 <= config.get("idle_timeout_minutes", 0) <= 60:
        yield "idle_timeout_minutes must be 1 to 60, or idle nodes cost money for nothing."
    resources = config.get("available_node_types", {}).get(head, {}).get("resources", {})
    if resources.get("CPU") != 0 or resources.get("GPU", 0):
        yield "The head must have resources {CPU: 0}: tasks there take the memory of the driver and of Ray itself."


def _images(config: dict[str, Any]) -> Iterator[str]:
    ray, python = requirements()
    docker = config.get("docker", {})
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if key in docker}
    for name, node in config.get("available_node_types", {}).items():
        if "worker_image" in node.get("docker", {}):
            images[f"available_node_types.{name}.docker.worker_image"] = node["docker"]["worker_image"]
    if not images:
        yield "docker.image is missing: nodes would take whatever Ray and Python their machine image has."
    seen = set()
    for key, image in images.items():
        tag = _IMAGE.search(image)
        if tag is None:
            yield f"{key}: expected a tag RAY-pyXYZ, such as :{version('ray')}-py311-cpu; a moving tag is no version."
            continue
        seen.add(tag.groups())
        if tag["ray"] not in ray:
            yield f"{key}: Ray {tag['ray']} is outside of {ray}, which medvision-ray needs."
        if tag["ray"] != version("ray"):
            yield f"{key}: Ray {tag['ray']} is not {version('ray')}, which is installed here; they must be the same."
        if f"{tag['python'][0]}.{tag['python'][1:]}" not in python:
            yield f"{key}: Python {tag['python']} is outside of {python}."
    if len(seen) > 1:
        yield "The images differ in Ray or Python; all nodes must have the same."


def _network(config: dict[str, Any]) -> Iterator[str]:
    provider = config.get("provider", {})
    if provider.get("use_internal_ips") is not True:
        yield "provider.use_internal_ips must be true: without it nodes get public addresses."
    if provider.get("cache_stopped_nodes", True) is not False:
        yield "provider.cache_stopped_nodes must be false: a stopped node keeps its disk, and you pay for it."
    rules = provider.get("security_group", {}).get("IpPermissions", [])
    for rule in rules:
        ranges = [item.get("CidrIp") for item in rule.get("IpRanges", [])]
        ranges += [item.get("CidrIpv6") for item in rule.get("Ipv6Ranges", [])]
        if "0.0.0.0/0" in ranges or "::/0" in ranges:
            yield f"provider.security_group lets the whole world in to port {rule.get('FromPort')}."
    for name, node in config.get("available_node_types", {}).items():
        place, given = f"available_node_types.{name}.node_config", node.get("node_config", {})
        if not given.get("SecurityGroupIds"):
            yield f"{place}.SecurityGroupIds is missing: Ray would make a group with port 22 open to 0.0.0.0/0."
        if not given.get("SubnetIds"):
            yield f"{place}.SubnetIds is missing: Ray would take any subnet, a public one too."
        for interface in given.get("NetworkInterfaces", []):
            if interface.get("AssociatePublicIpAddress"):
                yield f"{place}.NetworkInterfaces asks for a public address."


def _instances(config: dict[str, Any]) -> Iterator[str]:
    for name, node in config.get("available_node_types", {}).items():
        place, given = f"available_node_types.{name}.node_config", node.get("node_config", {})
        profile = given.get("IamInstanceProfile")
        if not profile:
            yield f"{place}.IamInstanceProfile is missing: Ray gives the head full access to EC2 and S3 without it."
        if given.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{place}.MetadataOptions must have HttpTokens: required (IMDSv2)."
        disks = given.get("BlockDeviceMappings", [])
        if not disks:
            yield f"{place}.BlockDeviceMappings is missing: the disk's size and encryption would be the image's."
        for disk in disks:
            if disk.get("Ebs", {}).get("Encrypted") is not True:
                yield f"{place}.BlockDeviceMappings: {disk.get('DeviceName')} must be Encrypted: true."
        yield from _capacity(place, str(given.get("InstanceType")), node, head=name == config.get("head_node_type"))


def _capacity(place: str, kind: str, node: dict[str, Any], *, head: bool) -> Iterator[str]:
    """Whether the instance type is a known one, and has the CPUs and GPUs that are declared for it."""
    found = _INSTANCE.match(kind)
    if found is None or found["family"] not in {*_CPU_FAMILIES, *_GPU_FAMILIES}:
        yield f"{place}.InstanceType: {kind} is no x86 family that is known here (m, c, r, g4dn, g5, g6, p4, p5)."
        return
    cpus = 2 if found["size"] == "large" else 4 * int(found["times"] or 1)
    gpus = _GPU_FAMILIES.get(found["family"], 0)
    if gpus == 1:
        gpus = 8 if kind == "g5.48xlarge" else _MANY_GPUS.get(found["size"], 1)
    if head:
        return
    declared = node.get("resources", {})
    if declared.get("CPU") != cpus or declared.get("GPU", 0) != gpus:
        yield f"{place}: {kind} has {cpus} CPUs and {gpus} GPUs, but resources say {declared}."


def _start_commands(config: dict[str, Any]) -> Iterator[str]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key, []) if "ray start" in command]
        if len(starts) != 1:
            yield f"{key}: expected one `ray start`, found {len(starts)}."
        for command in starts:
            words = shlex.split(command)
            if "RAY_AUTH_MODE=token" not in words:
                yield f"{key}: RAY_AUTH_MODE=token is missing: without it whoever reaches the port runs code."
            if not any(word.startswith("RAY_AUTH_TOKEN_PATH=/") for word in words):
                yield f"{key}: RAY_AUTH_TOKEN_PATH is missing: the node would make a token of its own or refuse to start."
            host = next((word.partition("=")[2] for word in words if word.startswith("--dashboard-host")), None)
            if key.startswith("head") and host not in _LOOPBACK:
                yield f"{key}: --dashboard-host must be 127.0.0.1, reached through `ray dashboard`."
            if not any(word.startswith("--metrics-export-port=") for word in words):
                yield f"{key}: --metrics-export-port is missing: Prometheus would look for a port that moves."
            if "--disable-usage-stats" not in words:
                yield f"{key}: --disable-usage-stats is missing: the cluster would report its use to Ray's makers."


def _secrets(config: dict[str, Any]) -> Iterator[str]:
    keys = [key for key in config if key.endswith("commands")]
    for place, commands in [(key, config[key]) for key in keys]:
        if any(_SECRET_ENV.search(command) for command in commands):
            yield f"{place}: a secret stands in a command, where `ps` and the cluster's state show it; mount a file."
    if "/home/ray/.ray/auth_token" not in config.get("file_mounts", {}):
        yield "file_mounts must bring /home/ray/.ray/auth_token to every node."
