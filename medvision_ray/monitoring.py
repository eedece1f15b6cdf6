"""Prometheus metrics through Ray's own agent: what the workers do, how far a run is, how the last one ended.

Every label has a closed set of values: no address, no key, no model. Where Ray is not connected nothing
happens and Ray is not imported. Why the kinds are what they are (measured on Ray 2.60):

- Ray puts the id of its worker process on every series, and keeps a dead worker's counters for as long as
  the node runs. So there are few counters, and no histogram: Ray also guesses a histogram's sum from the
  middles of its buckets. Mean batch size is frames / batches.
- A counter's first value makes no `increase()`, so what must be exact (a run's counts) is a gauge.
- A gauge is exported for 20 s after its process last reported it: scrape at least every 15 s.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from medvision_ray.config import RayConfig

# Label values beyond these are told as `other`.
VERBS = ("score", "evaluate", "compare", "calibrate", "train", "tune")
STAGES = ("list", "read", "decode", "preprocess", "predict", "write", "score", "publish")
PROGRESS_STATES = ("total", "done", "failed")
RUN_STATES = ("listed", "already_done", "scored", "failed", "not_scored")
STATUSES = ("done", "failed", "refused", "over_budget", "interrupted", "stopped")
OTHER, NONE = "other", "none"
SCORED = "scored"
SCORE = "score"
"""Of the label `feature`: the model's probabilities, whose classes no label names."""
_CONNECT_SECONDS = 60.0


@dataclass(frozen=True)
class Metric:
    """A metric of this package: Prometheus sees `ray_NAME`, and `ray_NAME_total` for a counter."""

    name: str
    kind: str
    description: str
    labels: tuple[str, ...]

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


OBJECTS = Metric("medvision_objects", "counter", "Objects that workers finished.", ("verb", "status", "error_code"))
STAGE_SECONDS = Metric(
    "medvision_stage_seconds", "counter", "Seconds that workers spent in a stage, over all threads.", ("verb", "stage")
)
READ_BYTES = Metric("medvision_read_bytes", "counter", "Bytes of objects that workers read.", ("verb",))
FRAMES = Metric("medvision_frames", "counter", "Frames and slices that went through the model.", ("verb",))
BATCHES = Metric("medvision_batches", "counter", "Forward passes; frames / batches is the mean batch size.", ("verb",))
PEAK_MEMORY = Metric(
    "medvision_peak_memory_bytes", "gauge", "Largest resident memory of a worker process so far.", ("verb",)
)
RUN_PROGRESS = Metric(
    "medvision_run_progress_objects", "gauge", "Objects of the run under way: total, done, failed.", ("verb", "state")
)
LAST_END = Metric(
    "medvision_last_end_timestamp_seconds", "gauge", "Unix time at which the last job ended so.", ("verb", "status")
)
LAST_OBJECTS = Metric("medvision_last_run_objects", "gauge", "Objects of the run that ended last.", ("verb", "state"))
LAST_SECONDS = Metric("medvision_last_run_seconds", "gauge", "Seconds by stage of that run.", ("verb", "stage"))
LAST_DRIFT = Metric(
    "medvision_last_run_drift_psi",
    "gauge",
    "Population stability index of a feature of that run against the training's images; `score` is the largest of any class.",
    ("verb", "feature"),
)
LAST_SHIFTED = Metric(
    "medvision_last_run_shifted_features",
    "gauge",
    "Features of that run that lie elsewhere than at training.",
    ("verb",),
)
METRICS = (
    *(OBJECTS, STAGE_SECONDS, READ_BYTES, FRAMES, BATCHES, PEAK_MEMORY),
    *(RUN_PROGRESS, LAST_END, LAST_OBJECTS, LAST_SECONDS, LAST_DRIFT, LAST_SHIFTED),
)


def record_block(
    counts: Mapping[str, int],
    stage_seconds: Mapping[str, float],
    *,
    bytes_read: int = 0,
    frames: int = 0,
    batches: int = 0,
    verb: str = "score",
) -> None:
    """Record what a worker did with one block; some tens of microseconds.

    Args:
        counts: objects by outcome: `scored`, or the error code of the failure.
        stage_seconds: seconds by stage of the block alone.
        bytes_read: of objects.
        frames: that went through the model.
        batches: forward passes.
    """
    if not connected():
        return
    verb = _one_of(VERBS, verb)
    for outcome, number in counts.items():
        status, code = (SCORED, NONE) if outcome == SCORED else ("failed", _one_of(_codes(), outcome))
        _add(OBJECTS, number, verb=verb, status=status, error_code=code)
    for stage, seconds in stage_seconds.items():
        _add(STAGE_SECONDS, seconds, verb=verb, stage=_one_of(STAGES, stage))
    _add(READ_BYTES, bytes_read, verb=verb)
    _add(FRAMES, frames, verb=verb)
    _add(BATCHES, batches, verb=verb)
    _set(PEAK_MEMORY, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, verb=verb)


def record_progress(total: int, done: int, failed: int, *, verb: str = "score") -> None:
    """Record how far the run under way is; for the driver, as often as it says so."""
    if not connected():
        return
    for state, number in zip(PROGRESS_STATES, (total, done, failed), strict=True):
        _set(RUN_PROGRESS, number, verb=_one_of(VERBS, verb), state=state)


def record_run(verb: str, status: str, result: Mapping[str, Any]) -> None:
    """Record how a job ended and what it counted.

    Args:
        status: a word of `ending.STATUS`.
        result: `listed`, `scored`, ... and `seconds`, `stage_seconds`, `drift`, where there are.
    """
    if not connected():
        return
    verb = _one_of(VERBS, verb)
    _set(LAST_END, time.time(), verb=verb, status=_one_of(STATUSES, status))
    for state in RUN_STATES:
        if isinstance(result.get(state), int):
            _set(LAST_OBJECTS, result[state], verb=verb, state=state)
    for stage, seconds in {**(result.get("stage_seconds") or {}), **(result.get("seconds") or {})}.items():
        if stage in STAGES:
            _set(LAST_SECONDS, seconds, verb=verb, stage=stage)
    _record_drift(verb, result.get("drift") or {})


def _record_drift(verb: str, drift: Mapping[str, Any]) -> None:
    """Of a run that was judged: PSI by feature, and how many are shifted."""
    if not drift.get("judged"):
        return
    psi: dict[str, float] = {}
    for item in drift["features"]:
        feature = SCORE if item["feature"].startswith("p_") else _one_of(_features(), item["feature"])
        psi[feature] = max(psi.get(feature, 0.0), item["psi"])
    for feature, value in psi.items():
        _set(LAST_DRIFT, value, verb=verb, feature=feature)
    _set(LAST_SHIFTED, len(drift["shifted"]), verb=verb)


def record_end(ray: RayConfig, verb: str, status: str, result: Mapping[str, Any]) -> bool:
    """Record a job's end on the cluster that it was configured for, in a process of its own with a time limit.

    By now the job's own connection is closed, and a night with nothing new made none. A cluster that is
    gone would keep `ray.init` waiting for minutes, which no job may end with.

    Returns:
        False where there is a cluster and it could not be told. A Ray that the job started for itself is
        gone, and nobody scrapes it: that counts as told.
    """
    address = ray.address or os.environ.get("RAY_ADDRESS")
    if not address:
        return True
    kept = {name: result[name] for name in (*RUN_STATES, "seconds", "stage_seconds", "drift") if name in result}
    message = json.dumps({"address": address, "verb": verb, "status": status, "result": kept})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "medvision_ray.monitoring"],
            input=message.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # Ray writes what it likes there
            timeout=_CONNECT_SECONDS,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0


def connected() -> bool:
    """Whether this process is connected to a Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", bool)())


def _add(metric: Metric, value: float, **labels: str) -> None:
    if value > 0:  # Ray refuses to add nothing
        _made(metric).inc(float(value), labels)


def _set(metric: Metric, value: float, **labels: str) -> None:
    _made(metric).set(float(value), labels)


@lru_cache
def _made(metric: Metric) -> Any:
    """The metric of this process, made when it is first recorded."""
    from ray.util.metrics import Counter, Gauge

    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, description=metric.description, tag_keys=metric.labels)


@lru_cache
def _codes() -> tuple[str, ...]:
    from medvision_ray.imaging.errors import ErrorCode

    return tuple(code.value for code in ErrorCode)


@lru_cache
def _features() -> tuple[str, ...]:
    from medvision_ray.fingerprint import CATEGORIES, MASK_FRACTION, NUMBERS

    return (*NUMBERS, *CATEGORIES, MASK_FRACTION, SCORE)


def _one_of(known: Iterable[str], value: str) -> str:
    return value if value in known else OTHER


def _main() -> int:
    """Record one end: the child process of `record_end`."""
    told = json.loads(sys.stdin.buffer.read())
    import ray

    ray.init(address=told["address"], log_to_driver=False)
    record_run(told["verb"], told["status"], told["result"])
    ray.shutdown()  # hands the last values to the node's agent
    return 0


if __name__ == "__main__":
    sys.exit(_main())
