"""What the rounds of a results file came to: printed, held against what they must reach, and recorded.

    python tests/faults/kills/summary.py RESULTS.jsonl [--rounds 100] [--record benchmarks/results/kills.json]

Exit status 1: a round is missing, had a problem, or the rounds together left something alive or some write unhit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

VICTIMS = ("driver", "actor", "Ray's own actor", "raylet")
PHASES = ("leases", "inventory", "inflight", "rows", "predictions", "failures", "tables/runs", "delete")
WHOLE = 100


def read_rounds(place: Path) -> list[dict[str, Any]]:
    """The last outcome of each seed, in order."""
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    return sorted({line["seed"]: line for line in lines}.values(), key=lambda line: line["seed"])


def shortcomings(rounds: list[dict[str, Any]], wanted: int) -> list[str]:
    """What the rounds lack, in words; a hundred of them must have reached everything."""
    hits = [hit for line in rounds for hit in line["hits"]]
    killed = {name for hit in hits for name in hit["killed"]}
    died_in = {hit["phase"] for hit in hits if "driver" in hit["killed"]}
    found = [f"seed {line['seed']} ({line['kind']}): {line['problems'][0]}" for line in rounds if line["problems"]]
    if missing := sorted(set(range(wanted)) - {line["seed"] for line in rounds}):
        found.append(f"seeds without an outcome: {missing}")
    if wanted >= WHOLE:
        found += [f"never killed: {name}" for name in sorted(set(VICTIMS) - killed)]
        found += [f"no driver died at a write of: {phase}" for phase in sorted(set(PHASES) - died_in)]
    return found


def summed_up(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all rounds, with the machine's facts."""
    hits = [hit for line in rounds for hit in line["hits"]]
    seconds = sorted(line["seconds"] for line in rounds)
    return {
        "command": "make test-faults",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip(),
        "rounds": len(rounds),
        "rounds_with_problems": sum(bool(line["problems"]) for line in rounds),
        "rounds_that_needed_the_command_again": sum(line["resumed"] for line in rounds),
        "kills": sum(len(hit["killed"]) for hit in hits),
        "rounds_by_what_was_killed": dict(Counter(line["kind"] for line in rounds)),
        "hits_by_what_was_being_written": dict(Counter(hit["phase"] for hit in hits)),
        "looks_at_the_tables_meanwhile": sum(line["looks"] for line in rounds),
        "seconds": {
            "median_round": seconds[len(seconds) // 2],
            "largest_round": seconds[-1],
            "summed": round(sum(seconds), 1),
        },
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Where and when it was."""
    return {"cores": os.cpu_count(), "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def main() -> int:
    """Print, check, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=WHOLE)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    rounds = read_rounds(options.results)
    found = shortcomings(rounds, options.rounds)
    text = json.dumps(summed_up(rounds), indent=1) + "\n"
    sys.stdout.write(text)
    if options.record and not found:
        options.record.write_text(text)
    for line in found:
        sys.stderr.write(line + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
