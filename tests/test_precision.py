"""Which arithmetic a forward pass uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvision_ray.precision import cpu_has_bf16, runs_in_bf16


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 fma", False),
        ("flags\t\t: avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: asimd bf16 i8mm", True),
        ("model name\t: bf16", False),
    ],
)
def test_cpu_has_bf16_by_its_flags(tmp_path: Path, line: str, expected: bool) -> None:
    place = tmp_path / "cpuinfo"
    place.write_text(f"processor\t: 0\n{line}\n")
    assert cpu_has_bf16(str(place)) is expected


def test_cpu_that_nothing_is_known_of_computes_in_float32(tmp_path: Path) -> None:
    assert not cpu_has_bf16(str(tmp_path / "absent"))


def test_what_is_asked_for_is_taken() -> None:
    assert runs_in_bf16("bf16", "cpu")
    assert not runs_in_bf16("float32", "cpu")
    assert runs_in_bf16("auto", "cpu") is cpu_has_bf16()
