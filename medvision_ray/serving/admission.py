"""How much a replica takes on at once: what it can answer in time, as many requests and bytes; the rest is told to come again."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from medvision_ray.config.serving import RequestLimits
from medvision_ray.serving.problems import RequestError

_RETRY_SECONDS = 1.0
_PACED_BY = 16
_ALWAYS = 2  # one is decoded while one is predicted; and a pace must be measured to recover


@dataclass
class Admitted:
    """A request that was taken on."""

    admission: Admission
    body_bytes: int = 0

    def take(self, count: int) -> None:
        """Count bytes of its body.

        Raises:
            RequestError: 429, the bodies of all requests together are too many bytes.
        """
        self.admission.body_bytes += count
        self.body_bytes += count
        if self.admission.body_bytes > self.admission.limits.max_body_bytes_in_flight:
            raise _overloaded()


class Admission:
    """Counts what is in flight; for one event loop.

    Attributes:
        requests: taken on and not answered yet.
        body_bytes: of their bodies.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.requests = 0
        self.body_bytes = 0
        self._working = 0
        self._paces: deque[float] = deque(maxlen=_PACED_BY)

    @contextmanager
    def admit(self) -> Iterator[Admitted]:
        """Take a request on for the block.

        Raises:
            RequestError: 429, too many are in flight to answer this one in time.
        """
        if self.requests >= self.limits.max_in_flight or self._is_late():
            raise _overloaded()
        admitted = Admitted(self)
        self.requests += 1
        try:
            yield admitted
        finally:
            self.requests -= 1
            self.body_bytes -= admitted.body_bytes

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measure the pace by an answer that is made in the block, its body being there.

        A body that comes slowly is no sign of a server that is slow, or one client could make it refuse all others.
        """
        self._working += 1
        ahead, started = self._working, time.perf_counter()
        measured = False
        try:
            yield
            measured = True
        except (asyncio.TimeoutError, TimeoutError):
            measured = True
            raise
        finally:
            self._working -= 1
            if measured:
                self._paces.append((time.perf_counter() - started) / ahead)

    @property
    def seconds_per_request(self) -> float | None:
        """Of the last answers, the median of the time that each took, divided by how many were under way; None before any."""
        return statistics.median(self._paces) if self._paces else None

    def _is_late(self) -> bool:
        """Whether one more would be answered later than may be expected."""
        limit, pace = self.limits.expected_seconds, self.seconds_per_request
        if limit is None or pace is None or self.requests < _ALWAYS:
            return False
        return (self.requests + 1) * pace > limit


def _overloaded() -> RequestError:
    return RequestError(
        429,
        "overloaded",
        "The server works on as many requests as it takes; send this one again later.",
        retry_after_seconds=_RETRY_SECONDS,
    )
