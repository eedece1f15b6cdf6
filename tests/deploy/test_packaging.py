"""The wheel holds what it must and runs from elsewhere; what names a version names the same one; what travels is small."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from medvision_ray import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "medvision_ray"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with the build backend that is installed: no registry is asked."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(PACKAGE, source / "medvision_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(place), str(source)], check=True, capture_output=True, timeout=240)
    (found,) = place.glob("*.whl")
    return found


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert len(wanted) > 100
    assert wanted - names == set()
    others = {name for name in names if not name.startswith(("medvision_ray/", "medvision_ray-"))}
    assert others == set()  # no tests, no jobs, no data beside the package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_runs_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=240)
    data = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix == ".j2"]
    assert data
    code = (
        "import importlib.resources as r, json, medvision_ray as m; "
        f"print(json.dumps([m.__file__, [(r.files(m) / name).is_file() for name in {data!r}]]))"
    )
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, "timeout": 120}
    place, there = json.loads(subprocess.run([sys.executable, "-c", code], check=True, **run).stdout)  # type: ignore[call-overload]
    assert place.startswith(str(target))
    assert all(there)
    script = [str(target / "bin/medvision"), "config", "show", "score"]
    shown = subprocess.run([sys.executable, *script], check=True, **run)  # type: ignore[call-overload]
    assert "max_failure_fraction" in shown.stdout


def test_what_names_a_version_names_this_one() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert f"medvision:{__version__}-ray" in (ROOT / "deploy/Containerfile").read_text(encoding="utf-8")


def test_the_containerfile_is_pinned_and_not_root() -> None:
    lines = (ROOT / "deploy/Containerfile").read_text(encoding="utf-8").splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert set(bases) == {"docker.io/library/python:3.11-slim-bookworm"}
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert "COPY constraints/py311.txt /constraints.txt" in lines
    copied = {word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert {Path(name).parts[0] for name in copied} == kept


def test_what_ray_uploads_of_the_repository_is_small_and_complete(tmp_path: Path) -> None:
    """`ray job submit --working-dir .`: Ray's own packing, over a checkout with all that may lie in it."""
    from ray._private.runtime_env.packaging import create_package

    clutter = {".git/objects/x", "tests/x.dcm", "docs/x.md", "demo/x.bin", "benchmarks/x", ".venv/lib/x", "ray_token"}
    for name in clutter:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1000)
    shutil.copytree(PACKAGE, tmp_path / "medvision_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    target = tmp_path.parent / "travels.zip"
    create_package(str(tmp_path), target, include_gitignore=True)
    names = set(zipfile.ZipFile(target).namelist())
    assert not names & clutter
    assert {"jobs/score.py", "jobs/score.yaml", "medvision_ray/demo/run.py", "medvision_ray/cli.py"} <= names
    assert target.stat().st_size < 2_000_000


def test_pre_commit_refuses_secrets_and_images() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pattern = re.compile(next(hook["files"] for hook in hooks if hook["id"] == "no-secrets"))
    assert all(pattern.search(name) for name in ("ray_token", "a/b.dcm", "tls.key", "x.nii.gz", ".env"))
    assert not any(pattern.search(name) for name in ("medvision_ray/privacy.py", "tests/test_keys.py", "cluster.yaml"))


def test_every_example_in_the_schedulers_page_is_python() -> None:
    text = (ROOT / "deploy/schedulers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
