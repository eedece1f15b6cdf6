"""The house plan, held: imports point one way, light modules stay light, modules stay short."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medvision_ray"

# Each line may import itself and the lines above it (DESIGN.md, section 2). The longest matching name counts.
FLOORS = (
    ("medvision_ray", "errors", "native", "precision"),
    ("launcher", "planning", "submission"),
    ("config",),
    ("storage", "listing", "s3", "s3_listing", "s3_files", "retry", "tables", "privacy", "cluster"),
    ("logs", "defects", "foreign", "ending"),
    ("imaging",),
    (
        "archive",
        "learning",
        "calibration",
        "operating_points",
        "bundle",
        "bundle_decisions",
        "bundle_fields",
        "bundle_files",
        "ensemble",
        "fingerprint",
        "model_card",
        "monitoring",
        "on_finish",
        "promotion",
        "verification",
    ),
    (
        "scoring",
        "learning.train",
        "learning.loop",
        "learning.ingest",
        "learning.validation",
        "learning.calibrate",
        "learning.class_offsets",
        "learning.mask_threshold",
        "learning.operating",
        "learning.decisions",
        "learning.publish",
        "learning.folds",
        "learning.out_of_fold",
        "learning.pooled",
        "learning.tune",
        "learning.alone",
        "learning.guards",
        "learning.reference",
        "learning.shortcuts",
        "evaluation",
    ),
    ("serving", "reporting", "demo"),
    (
        "cli",
        "cli_bundle",
        "cli_calibrate",
        "cli_cluster",
        "cli_explain",
        "cli_output",
        "cli_score",
        "cli_tables",
        "__main__",
        "jobs",
    ),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# No module of these, and nothing that they import, loads torch or ray when it is imported.
LIGHT = (
    "errors",
    "logs",
    "defects",
    "foreign",
    "ending",
    "on_finish",
    "config",
    "storage",
    "listing",
    "s3",
    "s3_listing",
    "s3_files",
    "retry",
    "privacy",
    "imaging",
    "reporting",
    "model_card",
    "fingerprint",
)
LIGHT_MODULES = tuple(
    f"evaluation.{name}" for name in ("classification", "segmentation", "intervals", "samples", "measure")
)


def name_of(path: Path) -> str:
    """`imaging.decode` for a file of the package; the package itself is `medvision_ray`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "medvision_ray"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
JOBS = {f"jobs.{path.stem}": path for path in sorted((ROOT / "jobs").glob("*.py"))}
SOURCES = {**MODULES, **JOBS}


def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, in full (`torch.nn`, `medvision_ray.imaging.image`)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; this test reads absolute imports"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner.removeprefix("medvision_ray.") in MODULES else base)
    return found


def imported_here(path: Path) -> set[str]:
    own = {name for name in imported_by(path) if name.split(".")[0] == "medvision_ray"}
    return {name.removeprefix("medvision_ray.") for name in own}


def floor(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        known = FLOOR_OF.get(".".join(parts[:length]))
        if known is not None:
            return known
    raise AssertionError(f"{name} is in no room of the plan: give it a place in FLOORS")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import torch.nn as n\nfrom medvision_ray import storage\n"
        "def f():\n    from medvision_ray.imaging.image import MedicalImage\n    import ray\n"
    )
    expected = {"torch.nn", "medvision_ray.storage", "medvision_ray.imaging.image", "ray"}
    assert imported_by(tmp_path / "x.py") == expected


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name: str) -> None:
    above = {other for other in imported_here(SOURCES[name]) if floor(other) > floor(name)}
    assert not above, f"{name} may not import {sorted(above)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported_here(path) - {name} for name, path in MODULES.items()}
    for name in graph:  # a package's own `__init__` gathers its modules, which is no circle
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        graph[name] -= parents
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in LIGHT or name in LIGHT_MODULES])
def test_light_modules_import_neither_torch_nor_ray(name: str) -> None:
    assert not {other.split(".")[0] for other in imported_by(MODULES[name])} & {"torch", "torchvision", "ray"}


def test_light_modules_load_neither_torch_nor_ray() -> None:
    names = [f"medvision_ray.{name}" for name in MODULES if name.split(".")[0] in LIGHT or name in LIGHT_MODULES]
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert set(names) <= loaded
    assert not {"torch", "ray"} & loaded


@pytest.mark.parametrize("name", ["medvision_ray", "medvision_ray.config"])
def test_the_front_door_loads_neither_torch_nor_ray(name: str) -> None:
    loaded = set(run_python(f"import sys, {name}; print(*sys.modules)").split())
    assert name in loaded
    assert not {"torch", "ray"} & loaded


def test_importing_the_package_takes_under_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        run_python("import medvision_ray")
        return time.perf_counter() - start

    assert statistics.median(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_has_at_most_400_lines_and_says_what_it_is_for(name: str) -> None:
    text = SOURCES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
