"""Prometheus metrics of the process that answers; every label has a closed set of values."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from medvision_ray.serving.answers import Answer

__all__ = ["CONTENT_TYPE_LATEST", "ServingMetrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_OBJECTS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServingMetrics:
    """Counts of one process, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "medvision_serve_answers",
            "Answers to POST /v1/predict by HTTP status and problem code (`none` for 200).",
            ("status", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "medvision_serve_answer_seconds",
            "Seconds from a request's first line to its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Counter(
            "medvision_serve_stage_seconds", "Seconds of scored objects by stage.", ("stage",), registry=self._registry
        )
        self.batch_objects = Histogram(
            "medvision_serve_batch_objects",
            "Objects that were scored together.",
            buckets=_OBJECTS,
            registry=self._registry,
        )
        self._frames = Counter("medvision_serve_frames", "Frames that were scored.", registry=self._registry)
        self.in_flight = Gauge(
            "medvision_serve_in_flight", "Requests that were taken on and not answered yet.", registry=self._registry
        )

        self.rows_waiting = Gauge(
            "medvision_serve_record_waiting",
            "Rows of answers that are not in the tables yet (`record`).",
            registry=self._registry,
        )
        self.rows_written = Counter(
            "medvision_serve_record_rows", "Rows of answers that were committed to the tables.", registry=self._registry
        )
        self.record_errors = Counter(
            "medvision_serve_record_errors",
            "Commits that the tables' store refused; they are tried again.",
            registry=self._registry,
        )

    def answered(self, status: int, code: str, seconds: float) -> None:
        """Count an answer of POST /v1/predict."""
        self._answers.labels(str(int(status)), code).inc()
        self._seconds.observe(seconds)

    def scored(self, answer: Answer) -> None:
        """Count what a prediction cost."""
        timing = answer.timing
        for stage, value in (
            ("decode", timing.decode_ms),
            ("preprocess", timing.preprocess_ms),
            ("predict", timing.predict_ms),
        ):
            self._stages.labels(stage).inc(value / 1000)
        self._frames.inc(answer.image.frames)

    def text(self) -> bytes:
        """The exposition format."""
        return bytes(generate_latest(self._registry))
