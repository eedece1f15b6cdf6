"""Runs over parts of an archive: each has a key of its own, and is finished as the part that it began as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.cli import main
from medvision_ray.config import ArchiveConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import MedVisionError
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.run import RunPlan, _base_key, _freeze

NAMES = Pseudonymiser(b"k" * 32)


def job(bundle: Bundle, phantom: PhantomArchive, output: Path, part: str | None) -> ScoreJob:
    archive = {"uri": phantom.night_1, "part": part}
    settings = {"archive": archive, "bundle": bundle.uri, "output": str(output), "privacy": {"demo_key": True}}
    return build_job(ScoreJob, settings, "a test")


def test_parts_have_keys_of_their_own_and_an_undivided_run_the_one_it_always_had(bundle: Bundle) -> None:
    def key(part: str | None) -> str:
        return _base_key(RunPlan("score", "s3://b/a", None, part=part), bundle)  # type: ignore[arg-type]

    assert len({key(None), key("1/2"), key("2/2"), key("1/1")}) == 4
    assert key(None) == _base_key(RunPlan("score", "s3://b/a", None), bundle)  # type: ignore[arg-type]


def test_a_run_is_finished_as_the_part_it_began_as(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    def begin(part: str | None) -> int:
        plan = RunPlan("score", phantom.night_1, job(bundle, phantom, tmp_path, part), part=part)
        listed = list_archive(ArchiveConfig(uri=phantom.night_1, part=part))
        return _freeze(plan, bundle, str(tmp_path / "a-run"), lambda _: listed, NAMES)[0].objects.num_rows

    assert begin("1/2") == begin("1/2") > 0
    for other in ("2/2", None):
        with pytest.raises(MedVisionError, match="Expected part 1/2, with which the run a-run was started"):
            begin(other)


def test_parts_together_are_the_archive(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "archive.uri": phantom.night_1,
        "bundle": bundle.uri,
        "output": str(tmp_path),
        "privacy.demo_key": "true",
    }
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    def to_score(*part: str) -> int:
        assert main(["score", "--dry-run", "--json", *options, *part]) == 0
        return int(json.loads(capsys.readouterr().out.splitlines()[-1])["to_score"])

    parts = [to_score("--part", f"{number}/3") for number in (1, 2, 3)]
    assert to_score() == sum(parts)
    assert all(parts)
