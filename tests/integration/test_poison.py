"""Objects that kill whoever decodes them: each costs its own row, and no other object loses its prediction.

The product has no hook for this. A `sitecustomize` on PYTHONPATH wraps the decoder in every Python that
starts after it: Ray's workers, and the process in which suspects are decoded alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config import RayConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.logs import silent
from medvision_ray.scoring.run import score

pytestmark = pytest.mark.integration

_SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, sys

def poisoned(decode):
    def wrapped(data, *arguments, **options):
        if data.startswith(b"POISON:"):
            line, _, data = data.partition(b"\\n")
            suffer(line.decode().split(":")[1:])
        return decode(data, *arguments, **options)
    return wrapped

def suffer(words):
    import ctypes, os, signal, time
    kind, *numbers = words
    if kind == "segv":
        ctypes.string_at(0)
    elif kind == "exit":
        os._exit(0)
    elif kind == "hang":
        while True:
            pass
    elif kind == "sleep":
        time.sleep(float(numbers[0]))
    elif kind == "grow":
        held = []
        for _ in range(int(numbers[0]) // 64):
            held.append(bytearray(b"x") * (64 << 20))
            time.sleep(0.02)
    elif kind == "print":
        os.write(1, b"a codec's warning\\n" * 100)
    elif kind == "recurse":
        suffer(words)
    else:
        raise {"error": ValueError, "systemexit": SystemExit}[kind]("PHANTOM^ALICE")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "medvision_ray.scoring.objects":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.decode = poisoned(module.decode)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
_BLOCK = 4
# Blocks of four, in order of their names. What ends the worker is a crash in the first, the limit on memory in
# the second and the limit on time in the third; the fourth does not end it.
_BLOCKS: tuple[tuple[str, ...], ...] = (
    ("good", "segv", "hang", "good"),
    ("grow:3072", "segv", "exit", "hang"),
    ("sleep:6", "good", "grow:1280", "good"),
    ("error", "systemexit", "recurse", "print"),
)
_CODES: dict[str, str | None] = {
    "good": None,
    "segv": "worker_crash",
    "exit": "worker_crash",
    "grow:3072": "out_of_memory",
    "grow:1280": "out_of_memory",
    "hang": "timeout",
    "sleep:6": "timeout",
    "error": "internal_error",
    "systemexit": "internal_error",
    "recurse": "internal_error",
    "print": None,
}
_IN_THE_WORKER = ("error", "systemexit", "recurse")
_LIMITS = {"max_seconds": 4.0, "max_memory_bytes": 768 << 20}
_HIGHER_LIMITS = {"max_seconds": 60.0, "max_memory_bytes": 4 << 30}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("poison")
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        with ray_session(RayConfig(num_cpus=2)):
            yield


@pytest.fixture(scope="module")
def images(phantom: PhantomArchive) -> list[bytes]:
    """Distinct small images, one for each place of `_BLOCKS`."""
    found = sorted(Path(phantom.night_1).glob("case-*/*"), key=lambda path: (path.stat().st_size, path))
    return [path.read_bytes() for path in found[: len(_BLOCKS) * _BLOCK]]


def _names() -> list[tuple[str, str]]:
    """File name and poison of each place."""
    kinds = [kind for block in _BLOCKS for kind in block]
    return [(f"{place:02d}-{kind.replace(':', '-')}.img", kind) for place, kind in enumerate(kinds)]


def _score(archive: Path, bundle: Bundle, output: Path, limits: dict[str, object]) -> dict[str, dict[str, Any]]:
    """Score a folder; rows of both tables by file name."""
    settings = {
        "archive": {"uri": str(archive)},
        "bundle": bundle.uri,
        "output": str(output),
        "privacy": {"demo_key": True},
        "decode": limits,
        "scoring": {"block_rows": _BLOCK, "precision": "float32", "actors": 1},
        "budget": {"max_failure_fraction": 1.0},
    }
    score(build_job(ScoreJob, settings, "a test"), silent)
    rows = []
    for name in ("predictions", "failures"):
        table = tables.read(str(output), name)
        rows += table.to_pylist() if table is not None else []
    assert len({row["uri"] for row in rows}) == len(rows)
    return {Path(row["uri"]).name: row for row in rows}


@pytest.fixture(scope="module")
def poisoned(
    cluster: None, images: list[bytes], bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Rows of a run over every poison."""
    folder = tmp_path_factory.mktemp("poisoned")
    for (name, kind), image in zip(_names(), images, strict=True):
        poison = b"" if kind == "good" else f"POISON:{kind}\n".encode()
        (folder / "archive").mkdir(exist_ok=True)
        (folder / "archive" / name).write_bytes(poison + image)
    return _score(folder / "archive", bundle, folder / "output", _LIMITS)


@pytest.fixture(scope="module")
def clean(
    cluster: None, images: list[bytes], bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Rows of a run over the same images without a poison, but for two that higher limits let through."""
    folder = tmp_path_factory.mktemp("clean")
    for (name, kind), image in zip(_names(), images, strict=True):
        poison = f"POISON:{kind}\n".encode() if kind in ("sleep:6", "grow:1280") else b""
        (folder / "archive").mkdir(exist_ok=True)
        (folder / "archive" / name).write_bytes(poison + image)
    return _score(folder / "archive", bundle, folder / "output", _HIGHER_LIMITS)


@pytest.mark.parametrize(("name", "kind"), _names())
def test_poison_costs_its_own_row_with_its_own_code(name: str, kind: str, poisoned: dict[str, dict[str, Any]]) -> None:
    assert poisoned[name].get("error_code") == _CODES[kind]


def test_nobody_else_loses_a_prediction(poisoned: dict[str, dict[str, Any]], clean: dict[str, dict[str, Any]]) -> None:
    scored = [name for name, kind in _names() if _CODES[kind] is None]
    for name in scored:
        assert math.isclose(poisoned[name]["predicted_probability"], clean[name]["predicted_probability"], rel_tol=1e-6)
        for column in ("predicted_label", "height", "width", "frames", "mask_box", "patient_key"):
            assert poisoned[name][column] == clean[name][column]


def test_attempts_say_whether_the_block_was_tried_again(poisoned: dict[str, dict[str, Any]]) -> None:
    failed = {name: kind for name, kind in _names() if _CODES[kind] is not None}
    assert {name: poisoned[name]["attempts"] for name in failed} == {
        name: 1 if kind in _IN_THE_WORKER else 2 for name, kind in failed.items()
    }


def test_higher_limits_let_slow_and_large_objects_through(clean: dict[str, dict[str, Any]]) -> None:
    assert all("error_code" not in row for row in clean.values())
    assert len(clean) == len(_names())


def test_no_text_of_an_exception_reaches_a_row(poisoned: dict[str, dict[str, Any]]) -> None:
    errors = [row["error"] for row in poisoned.values() if row.get("error")]
    assert errors
    assert not any("PHANTOM" in text for text in errors)
