"""What a run did: its summary, for people, for JSON and as the run's row."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

import medvision_ray
from medvision_ray import tables
from medvision_ray.config import FailureBudget
from medvision_ray.fingerprint import Drift

COMPLETE, DEADLINE = "complete", "deadline"
_EXAMPLES = 3
_COUNTS = ("listed", "excluded", "already_done", "scored", "failed", "retried", "not_scored")
_STAGES = ("list", "read", "decode", "preprocess", "predict", "write")


@dataclass(frozen=True)
class RunIdentity:
    """What names a run in every row: kept from its first start, so that a resumed run is the same run."""

    run_key: str
    job: str
    model_id: str
    archive: str
    started_at: datetime


@dataclass(frozen=True)
class Reason:
    """Why objects failed.

    Attributes:
        examples: image_id of up to three of them; the failures table has their addresses.
    """

    error_code: str
    count: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        listed: already done, scored, failed and not scored; what `limit` left out is not counted.
        excluded: not listed: by pattern, or modified before `since`.
        already_done: left out because the model had committed them.
        retried: of the scored and failed, those whose earlier failure this run replaced.
        not_scored: left for a later run, because the time was over.
        state: `complete`, or `deadline` where the time was over first.
        reasons: failures by code, most frequent first.
        seconds: of this process: list, score, publish. A resumed run counts its last attempt.
        stage_seconds: read, decode, preprocess, predict: sums over objects, in the threads that did the work.
        images_per_second: of the scoring pass alone.
        peak_memory_bytes: of the largest actor.
        over_budget: codes, or `all`, whose share of failures is over the budget; `drift` where a PSI is.
        drift: the run's images against those of the training; None where nobody asked (evaluations).
    """

    run_key: str
    job: str
    model_id: str
    archive: str
    listed: int
    excluded: int
    already_done: int
    scored: int
    failed: int
    retried: int = 0
    not_scored: int = 0
    state: str = COMPLETE
    reasons: tuple[Reason, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    peak_memory_bytes: int = 0
    images_per_second: float | None = None
    over_budget: tuple[str, ...] = ()
    drift: Drift | None = None

    @property
    def failures_by_code(self) -> dict[str, int]:
        """Counts, most frequent first."""
        return {reason.error_code: reason.count for reason in self.reasons}

    def sentence(self) -> str:
        """One line for a person."""
        reasons = ", ".join(f"{count} {code}" for code, count in self.failures_by_code.items())
        rate = f", {self.images_per_second:.1f} images/s" if self.images_per_second else ""
        left = f", {self.not_scored} left for the next run" if self.not_scored else ""
        shifted = ", SHIFTED from the training images" if self.drift and self.drift.shifted else ""
        return (
            f"Run {self.run_key}: {self.listed} listed, {self.already_done} already done, {self.scored} scored, "
            f"{self.failed} failed{f' ({reasons})' if reasons else ''}{left}{rate}{shifted}."
        )

    def details(self) -> list[str]:
        """Lines on the most frequent failures, with examples to look up in the failures table, and on drift."""
        return [*self._failure_lines(), *([self.drift.line()] if self.drift else [])]

    def _failure_lines(self) -> list[str]:
        return [
            f"{reason.count} {reason.error_code}, such as image_id {', '.join(map(str, reason.examples))}"
            for reason in self.reasons[:5]
        ]


def over_budget(budget: FailureBudget, summary: RunSummary) -> tuple[str, ...]:
    """Which budgets a run is over: `all`, error codes, `drift`."""
    total = summary.scored + summary.failed
    over = ["all"] if summary.failed > budget.max_failure_fraction * total else []
    counts = summary.failures_by_code
    drifted = ["drift"] if summary.drift and summary.drift.over_budget else []
    codes = [code for code, share in budget.by_code.items() if counts.get(code, 0) > share * total]
    return tuple([*over, *codes, *drifted])


def reasons_of(codes: pa.ChunkedArray, ids: pa.ChunkedArray) -> tuple[Reason, ...]:
    """Failures by code, most frequent first, each with its smallest image_ids."""
    counts = sorted(((str(i["values"]), int(i["counts"].as_py())) for i in codes.value_counts()), key=_by_count)
    found = []
    for code, count in counts:
        of_code = ids.filter(pc.equal(codes, code))
        smallest = of_code.take(pc.bottom_k_unstable(of_code, _EXAMPLES)).to_pylist()
        found.append(Reason(code, count, tuple(smallest)))
    return tuple(found)


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def publish_run(output: str, identity: RunIdentity, summary: RunSummary, config: dict[str, Any]) -> None:
    """Commit the run's own row, last: what it names is published."""
    stages = {
        **summary.stage_seconds,
        "list": summary.seconds.get("list"),
        "write": summary.seconds.get("publish"),
    }
    row = {
        **{name: getattr(summary, name) for name in ("run_key", "job", "model_id", "archive", *_COUNTS)},
        "config": json.dumps(config, sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
        "seconds": sum(summary.seconds.values()),
        "images_per_second": summary.images_per_second,
        "started_at": identity.started_at,
        "finished_at": datetime.now(timezone.utc),
        "state": summary.state,
        **{f"{stage}_seconds": stages.get(stage) for stage in _STAGES},
        "bytes_read": summary.bytes_read,
        "peak_memory_bytes": summary.peak_memory_bytes,
    }
    table = pa.Table.from_pylist([row], schema=tables.RUNS)
    tables.commit(output, "runs", tables.RUNS, table.to_batches(), summary.run_key)


def published_run(output: str, run_key: str) -> RunSummary | None:
    """The summary of a run that is published, read back from the tables; None where it is not."""
    rows = tables.read(output, "runs", None, pads.field("run_key") == run_key)
    if rows is None or rows.num_rows == 0:
        return None
    row = rows.to_pylist()[0]
    failures = tables.read(output, "failures", ["error_code", "image_id"], pads.field("run_key") == run_key)
    facts: dict[str, Any] = {name: row[name] for name in ("run_key", "job", "model_id", "archive")}
    facts.update({name: row.get(name) or 0 for name in _COUNTS})
    return RunSummary(
        **facts,
        state=row.get("state") or COMPLETE,
        reasons=reasons_of(failures["error_code"], failures["image_id"]) if failures is not None else (),
        seconds={"total": row["seconds"]},
        stage_seconds={stage: row.get(f"{stage}_seconds") or 0.0 for stage in _STAGES},
        bytes_read=row.get("bytes_read") or 0,
        peak_memory_bytes=row.get("peak_memory_bytes") or 0,
        images_per_second=row["images_per_second"],
    )


def versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    from importlib.metadata import version

    names = ("ray", "torch", "pydicom", "imagecodecs", "opencv-python-headless", "deltalake")
    return {
        "medvision_ray": medvision_ray.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
