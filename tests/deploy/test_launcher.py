"""cluster.yaml against Ray's own schema and our stricter rules; each rule is broken once to see that it can fail."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from medvision_ray import __version__, launcher
from medvision_ray.cli import main
from medvision_ray.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def config() -> dict[str, Any]:
    # Through JSON: YAML's anchors share one object, which a change would reach everywhere.
    return json.loads(json.dumps(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))))


def nodes(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config["available_node_types"][name]


def replace(key: str, old: str, new: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        before = json.dumps(config[key])
        assert old in before
        config[key] = json.loads(before.replace(old, new))

    return change


def test_the_shipped_file_holds(config: dict[str, Any]) -> None:
    launcher.validate_with_ray(config)
    assert launcher.findings(config) == []


def test_the_command_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "check", str(ROOT / "cluster.yaml")]) == 0
    assert capsys.readouterr().out == "All rules hold.\n"
    broken = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    broken["provider"]["use_internal_ips"] = False
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert main(["cluster", "check", str(tmp_path / "broken.yaml")]) == 1
    assert capsys.readouterr().out.startswith("FAILED provider.use_internal_ips")
    assert main(["cluster", "check", str(tmp_path / "absent.yaml")]) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: nodes(c, "cpu_worker").update(min_workers=17), "min_workers 17 is above max_workers 16"),
        (lambda c: [nodes(c, n).update(min_workers=10, max_workers=10) for n in ("cpu_worker", "gpu_worker")], "20"),
        (lambda c: c.update(max_workers=10), "some would never start"),
        (lambda c: c.update(idle_timeout_minutes=600), "idle_timeout_minutes"),
        (lambda c: nodes(c, "head")["resources"].update(CPU=4), "The head must have"),
        (lambda c: c["docker"].update(image="rayproject/ray:latest"), "a moving tag is no version"),
        (lambda c: c["docker"].update(image="rayproject/ray:2.40.0-py311-cpu"), "outside of"),
        (lambda c: c["docker"].update(image="rayproject/ray:2.61.0-py311-cpu"), "must be the same"),
        (lambda c: c["docker"].update(image="rayproject/ray:2.60.0-py39-cpu"), "expected a tag"),
        (lambda c: c["docker"].update(image="rayproject/ray:2.60.0-py314-cpu"), "Python 314 is outside"),
        (lambda c: c["docker"].update(image="rayproject/ray:2.60.0-py312-cpu"), "images differ"),
        (lambda c: c.pop("docker") and nodes(c, "gpu_worker").pop("docker"), "docker.image is missing"),
        (lambda c: c["provider"].update(use_internal_ips=False), "public addresses"),
        (lambda c: c["provider"].pop("cache_stopped_nodes"), "cache_stopped_nodes"),
        (
            lambda c: c["provider"].update(
                security_group={"IpPermissions": [{"FromPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
            ),
            "whole world in to port 8265",
        ),
        (
            lambda c: c["provider"].update(
                security_group={"IpPermissions": [{"FromPort": 22, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}]}
            ),
            "whole world in to port 22",
        ),
        (lambda c: nodes(c, "head")["node_config"].pop("SecurityGroupIds"), "port 22 open to 0.0.0.0/0"),
        (lambda c: nodes(c, "cpu_worker")["node_config"].pop("SubnetIds"), "any subnet"),
        (
            lambda c: nodes(c, "head")["node_config"].update(NetworkInterfaces=[{"AssociatePublicIpAddress": True}]),
            "public address",
        ),
        (lambda c: nodes(c, "head")["node_config"].pop("IamInstanceProfile"), "full access to EC2 and S3"),
        (lambda c: nodes(c, "head")["node_config"].pop("MetadataOptions"), "IMDSv2"),
        (lambda c: nodes(c, "cpu_worker")["node_config"].pop("BlockDeviceMappings"), "the disk's size"),
        (
            lambda c: nodes(c, "gpu_worker")["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(Encrypted=False),
            "must be Encrypted",
        ),
        (lambda c: nodes(c, "cpu_worker")["node_config"].update(InstanceType="z9.mega"), "no x86 family"),
        (lambda c: nodes(c, "cpu_worker")["node_config"].update(InstanceType="m6i.2xlarge"), "has 8 CPUs and 0 GPUs"),
        (lambda c: nodes(c, "gpu_worker")["node_config"].update(InstanceType="g6.12xlarge"), "48 CPUs and 4 GPUs"),
        (replace("head_start_ray_commands", "RAY_AUTH_MODE=token ", ""), "RAY_AUTH_MODE=token is missing"),
        (replace("worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""), "RAY_AUTH_MODE=token is missing"),
        (replace("worker_start_ray_commands", "RAY_AUTH_TOKEN_PATH=", "X="), "RAY_AUTH_TOKEN_PATH is missing"),
        (replace("head_start_ray_commands", "host=127.0.0.1", "host=0.0.0.0"), "--dashboard-host must be"),
        (replace("head_start_ray_commands", "--dashboard-host=127.0.0.1", ""), "--dashboard-host must be"),
        (replace("worker_start_ray_commands", "--metrics-export-port=8090", ""), "a port that moves"),
        (replace("head_start_ray_commands", "--disable-usage-stats", ""), "report its use"),
        (lambda c: c.update(worker_start_ray_commands=["ray stop"]), "expected one `ray start`"),
        (lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=0123abcd"), "a secret stands in a command"),
        (lambda c: c["file_mounts"].pop("/home/ray/.ray/auth_token"), "file_mounts must bring"),
    ],
)
def test_each_rule_can_fail(config: dict[str, Any], change: Change, said: str) -> None:
    change(config)
    found = launcher.findings(config)
    assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda c: c.update(max_wrokers=3), "the file"),
        (lambda c: nodes(c, "head").update(resources={"CPU": "four"}), "resources"),
        (lambda c: c.update(head_node_type="nobody"), "Ray refuses"),
    ],
)
def test_rays_own_schema_is_asked(config: dict[str, Any], change: Change, place: str) -> None:
    broken = copy.deepcopy(config)
    change(broken)
    with pytest.raises(UsageError, match=re.escape(place)):
        launcher.validate_with_ray(broken)


def test_an_own_image_names_its_ray_and_python(config: dict[str, Any]) -> None:
    config["docker"]["image"] = f"registry.example.org/medvision:{__version__}-ray{version('ray')}-py311"
    nodes(config, "gpu_worker")["docker"]["worker_image"] = config["docker"]["image"]
    assert launcher.findings(config) == []


def test_ray_and_python_agree_with_pyproject_and_constraints() -> None:
    """The installed package's metadata, which the check reads, could be of an older pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = Requirement(re.search(r'"(ray\[[^"]+)"', text)[1])  # type: ignore[index]
    python = SpecifierSet(re.search(r'requires-python = "([^"]+)"', text)[1])  # type: ignore[index]
    assert launcher.requirements() == (wanted.specifier, python)
    cluster = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    tags = set(re.findall(r"ray:(\d+\.\d+\.\d+)-py(\d+)", cluster))
    assert len(tags) == 1
    ray, tag = tags.pop()
    pinned = (ROOT / f"constraints/py{tag}.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={ray}" in pinned
    assert f"--constraint /home/ray/constraints/py{tag}.txt" in cluster
