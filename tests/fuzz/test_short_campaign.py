"""A short campaign of damaged files in every run of the tests; `make test-fuzz` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaign import summary, violations
from mutate import make_case
from seed_files import strata_of

from medvision_ray.imaging.errors import ErrorCode

CAMPAIGN = Path(__file__).parent / "campaign.py"
CASES = 250


def campaign(folder: Path, *options: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(CAMPAIGN), "--workers", "1", "--results", str(folder / "results.jsonl"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("campaign")
    return folder, campaign(folder, "--cases", str(CASES))


def test_every_damaged_file_gives_one_row_with_a_code_of_the_list(short: tuple[Path, dict[str, Any]]) -> None:
    _, found = short
    assert found["violations"] == {}
    assert found["cases"] == found["rows"] == CASES
    assert set(found["codes"]) <= {code.value for code in ErrorCode} - {"internal_error"}
    assert found["scored"] + sum(found["codes"].values()) == CASES
    assert len(found["codes"]) >= 6
    assert found["scored"] > 0


def test_a_campaign_goes_on_where_it_stopped(short: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = short
    with (folder / "results.jsonl").open("a") as stream:
        stream.write('{"case": 4711, "cut')  # as a kill leaves it
    found = campaign(folder, "--cases", str(CASES))
    assert found["cases"] == CASES


def test_a_number_names_a_case() -> None:
    strata = strata_of(None)
    assert {"png", "jpeg", "tiff", "bmp", "nifti"} <= set(strata)
    one, again = ([make_case(number, strata) for number in range(300)] for _ in range(2))
    assert one == again
    assert len({case.data for case in one}) > 290
    assert {kind for case in one for kind in case.kinds} >= {
        "truncate",
        "field",
        "length",
        "nest",
        "codestream",
        "nifti",
    }


def test_the_campaign_sees_what_must_not_be() -> None:
    good = {"case": 1, "stratum": "png", "kinds": ["flip"], "code": "corrupt", "bad_row": None, "seconds": 0.1}
    good["peak_memory_bytes"] = 1
    lost = {"lost": True, "status": -11, "numbers": [9], "earlier": 0}
    assert violations([good, lost]) == {}
    assert summary([good, lost])["workers_lost_and_recorded"] == 1
    assert violations([{**good, "code": "internal_error"}]) == {"bad_row": [1]}
    assert violations([{**good, "bad_row": "ValueError: x"}]) == {"bad_row": [1]}
    assert violations([{**good, "seconds": 99.0}]) == {"late": [1]}
    assert violations([{**good, "peak_memory_bytes": 1 << 40}]) == {"over_memory": [1]}
    assert violations([{**lost, "earlier": 1}]) == {"lost": [[9]]}
