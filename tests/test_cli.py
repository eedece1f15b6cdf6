"""Verbs, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.calibration import TemperatureScaling
from medvision_ray.cli import main
from medvision_ray.config import JOBS, TuneJob, load_job
from medvision_ray.operating_points import ClassThreshold, OperatingPoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "score"])
def test_job_files_are_valid(name: str) -> None:
    assert load_job(JOBS[name], str(ROOT / "jobs" / f"{name}.yaml")).output.startswith("s3://")


def test_the_job_file_of_a_search_is_valid() -> None:
    job = load_job(TuneJob, str(ROOT / "jobs" / "tune.yaml"))
    assert job.train.output.startswith("s3://")
    assert set(job.search) == {"learning_rate", "layer_decay", "model.pooling"}


def test_serve_file_is_valid() -> None:
    assert load_job(JOBS["serve"], str(ROOT / "jobs" / "serve.yaml")).http.on_loopback


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "score"])
def test_job_scripts_refuse_a_wrong_option_with_code_2(name: str) -> None:
    command = [sys.executable, f"jobs/{name}.py", "--config", f"jobs/{name}.yaml", "--set", "ouput=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean `output`" in done.stderr


def test_help_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys\nfrom medvision_ray.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('ray', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_that_goes_away_costs_nothing(tmp_path: Path, option: list[str]) -> None:
    (tmp_path / "a.dcm").write_bytes(b"DICM")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "medvision_ray.cli", "inventory", "--set", f"archive.uri={tmp_path}", *option]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_show_prints_every_option_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["config", "show", "score", "--set", "scoring.batch_size=7", "--config", str(ROOT / "jobs/score.yaml")])
        == 0
    )
    printed = capsys.readouterr().out
    assert "batch_size: 7" in printed
    assert "max_failure_fraction: 0.05" in printed


def test_inventory_counts_and_ends_with_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    (tmp_path / ".hidden").write_bytes(b"1")
    assert main(["inventory", "--set", f"archive.uri={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["objects"], found["excluded"], found["bytes"]) == (1, 1, 5)


def test_missing_archive_is_code_1_and_missing_key_is_code_2(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDVISION_PSEUDONYM_KEY", raising=False)
    given = ["--set", f"bundle={bundle.uri}", "--set", f"output={tmp_path / 'out'}", "--json"]
    assert main(["score", "--set", f"archive.uri={tmp_path}", *given]) == 2
    assert "openssl rand" in json.loads(capsys.readouterr().out)["error"]
    assert main(["inventory", "--set", f"archive.uri={tmp_path / 'nowhere'}", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exit_code"] == 1


def test_bundle_show_names_the_model(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "show", bundle.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == bundle.model_id


def test_bundle_show_prints_calibration_and_operating_points(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ClassThreshold(0.25, 0.9, 0.8, 9, 2, 1, 8, 20)
    fields = ("name", "architecture", "preprocess", "classes", "multi_label", "thresholds", "mask_threshold")
    given = {name: getattr(bundle, name) for name in fields} | {"trained": {}, "metrics": {}, "train_digest": ()}
    points = [OperatingPoint("f1", "largest F1", (None, one, None))]
    made = {"model": bundle.build_model(), "calibration": TemperatureScaling(1.5), "operating_points": points}
    save_bundle(str(tmp_path / "b"), **given, **made)
    assert main(["bundle", "show", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    for words in ('"temperature": 1.5', '"f1": {', '"rule": "largest F1"', '"consolidation": {', '"threshold": 0.25'):
        assert words in text
    assert main(["bundle", "show", bundle.uri, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["calibration"], plain["operating_points"]) == (None, {})


def test_demo_does_not_replace_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--folder", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists()
