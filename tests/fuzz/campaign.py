"""Thousands of damaged files through the real row function in worker processes; `make test-fuzz`.

    python tests/fuzz/campaign.py [--cases 20000] [--workers 2] [--seconds 0] [--results FILE] [--summary FILE]

Each case becomes a row or this ends with 1: a failure of a code from the closed list, or a prediction's
row. A worker that dies is recorded, and its block is taken up again as the product does it: each object
in a process of its own. Results are JSON lines, a line a case; the same command goes on where it was
stopped. A case's number names it: `--only 4711` runs one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent))

BLOCK = 25
LIMITS = {"max_seconds": 20.0, "max_memory_bytes": 1 << 30, "max_decoded_bytes": 256 << 20}
_ALLOWED_LATE_SECONDS = 10.0  # of a loaded machine
_RESTING_BYTES = 512 << 20
_KINDS = ("lost", "late", "bad_row", "over_memory")


@dataclass
class Worker:
    """A worker process and what it is doing."""

    process: subprocess.Popen[bytes]
    numbers: list[int] = field(default_factory=list)
    earlier: int = 0

    @property
    def answers(self) -> IO[bytes]:
        """Its results."""
        assert self.process.stdout is not None
        return self.process.stdout

    def begin(self, numbers: list[int], earlier: int = 0) -> None:
        """Hand it a block."""
        assert self.process.stdin is not None
        self.numbers, self.earlier = numbers, earlier
        self.process.stdin.write(json.dumps({"numbers": numbers, "earlier": earlier}).encode() + b"\n")
        self.process.stdin.flush()

    @staticmethod
    def start(corpora: str) -> Worker:
        """A new one."""
        command = [sys.executable, __file__, "--worker", "--corpora", corpora]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return Worker(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]


def run(numbers: list[int], corpora: str, workers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Results of cases as they come; what a dying worker had in hand is taken up again, each object alone.

    Args:
        seconds: begin no block after this time; 0 is no limit.
    """
    started = time.monotonic()
    blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
    todo = [(block, 0) for block in reversed(blocks)]
    busy: list[Worker] = []
    idle = [Worker.start(corpora) for _ in range(min(workers, len(todo)))]
    with selectors.DefaultSelector() as selector:
        while todo or busy:
            over = seconds and time.monotonic() - started > seconds
            while idle and todo and not over:
                worker = idle.pop()
                worker.begin(*todo.pop())
                busy.append(worker)
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            if not busy:
                break
            for key, _ in selector.select():
                worker = key.data
                selector.unregister(worker.answers)
                busy.remove(worker)
                line = worker.answers.readline()
                if line.endswith(b"\n"):
                    yield from json.loads(line)
                    idle.append(worker)
                    continue
                status = worker.process.wait()
                yield {"lost": True, "status": status, "numbers": worker.numbers, "earlier": worker.earlier}
                if worker.earlier < 2:
                    todo.append((worker.numbers, worker.earlier + 1))
                idle.append(Worker.start(corpora))
    for worker in idle:
        worker.process.kill()
        worker.process.wait()


def serve(corpora: str) -> None:
    """A worker: blocks of case numbers in, their rows' facts out."""
    out = os.fdopen(os.dup(1), "wb")  # out of the way of native code that prints
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    import cv2
    from mutate import make_case
    from seed_files import strata_of

    from medvision_ray.config import DecodeConfig, PreprocessConfig, PrivacyConfig, ScoringConfig
    from medvision_ray.privacy import Pseudonymiser
    from medvision_ray.scoring.preparing import Preparer
    from medvision_ray.scoring.settings import WorkerSettings

    cv2.setNumThreads(1)
    strata = strata_of(Path(corpora) if corpora else None)
    keys = Pseudonymiser(b"a key of the fuzz campaign, 32 bytes", PrivacyConfig(uri="hash", study_date="shift"))
    decode = DecodeConfig.model_validate({**LIMITS, "volume_index": 0})
    settings = WorkerSettings("none", "none", ScoringConfig(), decode, keys)
    preparer = Preparer(settings, PreprocessConfig(size=(64, 64)))
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            cases = [make_case(number, strata) for number in request["numbers"]]
            entries = []
            for case in cases:
                place = Path(folder) / str(case.number)
                place.write_bytes(case.data)
                entries.append({"image_id": case.number, "uri": str(place), "etag": "", "size": len(case.data)})
            found = []
            before = time.monotonic()
            for case, outcome in zip(cases, preparer.prepare(entries, request["earlier"]), strict=True):
                now = time.monotonic()
                found.append({**_checked(outcome), **_named(case), "seconds": round(now - before, 3)})
                before = now
            for entry in entries:
                Path(entry["uri"]).unlink()
            out.write(json.dumps(found).encode() + b"\n")
            out.flush()


def _named(case: Any) -> dict[str, Any]:
    return {"case": case.number, "stratum": case.stratum, "file": case.name, "kinds": case.kinds}


def _checked(outcome: Any) -> dict[str, Any]:
    """What became of a case; `bad_row` says what is wrong with its row."""
    from medvision_ray.imaging.errors import SENTENCES, ErrorCode
    from medvision_ray.scoring.objects import Failure
    from medvision_ray.scoring.rows import FrameResult, failed_row, scored_row, to_table

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts: dict[str, Any] = {"peak_memory_bytes": peak, "attempts": outcome.attempts, "bad_row": None}
    try:
        if isinstance(outcome.result, Failure):
            row = failed_row(outcome.entry, outcome.result, outcome.attempts)
            code = ErrorCode(outcome.result.error_code)
            if not outcome.result.error.startswith(SENTENCES[code]):
                facts["bad_row"] = "a sentence of its own"
            if "DOE" in outcome.result.error or "JANE" in outcome.result.error:
                facts["bad_row"] = "an identifier"
            facts.update(code=code.value, error=outcome.result.error)
        else:
            ready = outcome.result
            bundle: Any = SimpleNamespace(classes=(), multi_label=False, calibration=None)
            frames = [FrameResult(None, None)] * len(ready.pixels)
            row = scored_row(bundle, outcome.entry, ready, frames, preprocess_id="fuzz", save_masks=False)
            if ready.pixels.shape[1:] != (1, 64, 64) or ready.pixels.dtype.name != "uint8" or not frames:
                facts["bad_row"] = "pixels of another shape or type"
            facts.update(code=None)
        table = to_table([row], ())
        if table.num_rows != 1 or not row["uri"].startswith("hashed:"):
            facts["bad_row"] = "no row, or an address in it"
    except Exception as error:  # whatever a row cannot be made of is what this looks for
        facts.update(code="none", bad_row=f"{type(error).__name__}: {error}"[:300])
    return facts


def violations(results: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What must not be, by kind, with the numbers of cases."""
    found: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    for result in results:
        if result.get("lost"):
            # A worker may die of one object; it is then found and recorded. One that dies with each object apart is lost.
            if result["earlier"]:
                found["lost"].append(result["numbers"])
            continue
        if result["bad_row"] or result["code"] == "internal_error":
            found["bad_row"].append(result["case"])
        if result["peak_memory_bytes"] > LIMITS["max_memory_bytes"] + _RESTING_BYTES:
            found["over_memory"].append(result["case"])
        if result["seconds"] > LIMITS["max_seconds"] + _ALLOWED_LATE_SECONDS:
            found["late"].append(result["case"])
    return {kind: cases for kind, cases in found.items() if cases}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all cases of a campaign."""
    cases = [result for result in results if not result.get("lost")]
    return {
        "cases": len(cases),
        "rows": len({result["case"] for result in cases}),
        "scored": sum(result["code"] is None for result in cases),
        "codes": dict(Counter(result["code"] for result in cases if result["code"]).most_common()),
        "by_stratum": dict(sorted(Counter(result["stratum"] for result in cases).items())),
        "by_kind": dict(sorted(Counter(kind for result in cases for kind in result["kinds"]).items())),
        "workers_lost_and_recorded": sum(bool(result.get("lost")) for result in results),
        "slowest_seconds": max((result["seconds"] for result in cases), default=0),
        "peak_memory_mib": max((result["peak_memory_bytes"] for result in cases), default=0) >> 20,
        "violations": violations(results),
        "limits": LIMITS,
    }


def _read(place: Path) -> list[dict[str, Any]]:
    lines = place.read_text().splitlines(keepends=True) if place.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]  # the last of a killed campaign may be cut off


def main() -> int:
    """Run what is not done yet, then say what all of it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=0, help="begin no block after this time")
    parser.add_argument("--results", type=Path, default=Path("tests/fuzz/.made/results.jsonl"))
    parser.add_argument("--summary", type=Path, help="write the summary as JSON")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases; nothing is recorded")
    parser.add_argument("--corpora", default=os.environ.get("MEDVISION_CORPORA", "../shared/corpora"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    corpora = options.corpora if Path(options.corpora or ".").is_dir() else ""
    if options.worker:
        serve(corpora)
        return 0
    if options.only:
        results = list(run(options.only, corpora, 1, 0))
        sys.stdout.write("".join(json.dumps(result) + "\n" for result in results))
        return 1 if violations(results) else 0
    results = _read(options.results)
    done = {result["case"] for result in results if not result.get("lost")}
    todo = [number for number in range(options.cases) if number not in done]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as stream:
        for result in run(todo, corpora, options.workers, options.seconds):
            stream.write(json.dumps(result) + "\n")
            stream.flush()
            results.append(result)
    found = {**summary(results), "corpora": bool(corpora)}
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text)
    if options.summary:
        options.summary.write_text(text)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
