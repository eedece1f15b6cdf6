"""Whatever is killed, and whenever: the same command once more, and every object has exactly one row.

MEDVISION_KILL_ROUNDS says how many rounds; each is a seed of its own and can be run alone by its id.
MEDVISION_KILL_RESULTS names a JSON-lines file of what came of each round: rounds that are in it already
without a problem are not run again, and `summary.py` sums it up. With `pytest -n 2` two clusters share the rounds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kills.rounds import Plan, Theatre
from kills.stage import stage
from medvision_ray.bundle import Bundle

ROUNDS = int(os.environ.get("MEDVISION_KILL_ROUNDS", "100"))
RESULTS = os.environ.get("MEDVISION_KILL_RESULTS") or os.path.join(tempfile.gettempdir(), f"kills-{os.getpid()}.jsonl")


@pytest.fixture(scope="module")
def theatre(bundle: Bundle) -> Iterator[Theatre]:
    with stage() as on:
        yield Theatre(bundle.uri, on.store, on.cluster, on.forge)


def _lines() -> list[dict[str, Any]]:
    if not Path(RESULTS).exists():
        return []
    return [json.loads(line) for line in Path(RESULTS).read_text().splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_every_object_has_one_row_after(seed: int, theatre: Theatre) -> None:
    if any(line["seed"] == seed and not line["problems"] for line in _lines()):
        pytest.skip("done before, by the results file")
    outcome = theatre.play(Plan.of(seed))
    Path(RESULTS).parent.mkdir(parents=True, exist_ok=True)
    with Path(RESULTS).open("a") as stream:
        stream.write(json.dumps(outcome.line()) + "\n")
    assert not outcome.problems, json.dumps(outcome.line(), indent=1)


@pytest.mark.timeout(900)
def test_second_run_says_who_holds_the_archive_and_ends(theatre: Theatre) -> None:
    output = "s3://hospital/two-at-once"
    first = theatre.hold_at_first_marker(lambda: theatre.start(output, None))
    second = theatre.start(output, None)
    assert theatre.wait(second) == 1
    assert f"process {first.pid} " in second.log.read_text()
    theatre.release()
    assert theatre.wait(first) == 0, first.log.read_text()
    assert theatre.problems(output) == []
