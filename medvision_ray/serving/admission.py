"""How much a replica takes on at once: what it can answer in time, as many requests and bytes; the rest is told to come again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from medvision_ray.config.serving import RequestLimits
from medvision_ray.serving.problems import RequestError

_RETRY_SECONDS = 1.0
_PACED_BY = 64  # answers: four batches of 16, which end at once
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
        self._busy_seconds = 0.0
        self._busy_since = 0.0
        # Of the last answers, the busy seconds until then and their frames; it begins with none at the beginning.
        self._answers: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_PACED_BY + 1)

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
        """Count the block's time as busy: an answer is made, its body being there.

        A body that comes slowly is no sign of a server that is slow, or one client could make it refuse all others.
        """
        if not self._working:
            self._busy_since = time.perf_counter()
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
            if not self._working:
                self._busy_seconds += time.perf_counter() - self._busy_since

    def answered(self, frames: int) -> None:
        """Count an answer; within `working`."""
        self._answers.append((self._busy(), frames))

    @property
    def seconds_per_frame(self) -> float:
        """Busy seconds since the 64th last answer, a frame of those answered since; 0 before any.

        Also of those under way, so that a standstill shows before it ends. By frames, or one volume of hundreds would
        make a server look slow.
        """
        frames = sum(count for _, count in islice(self._answers, 1, None))
        return (self._busy() - self._answers[0][0]) / frames if frames else 0.0

    @property
    def load(self) -> float:
        """Requests in flight, as a share of those that would be taken on."""
        most, limit, pace = self.limits.max_in_flight, self.limits.expected_seconds, self.seconds_per_frame
        if limit is not None and pace:
            most = min(most, max(_ALWAYS, int(limit / pace)))
        return self.requests / most

    def _busy(self) -> float:
        return self._busy_seconds + (time.perf_counter() - self._busy_since if self._working else 0.0)

    def _is_late(self) -> bool:
        """Whether one more would be answered later than may be expected."""
        limit = self.limits.expected_seconds
        if limit is None or self.requests < _ALWAYS:
            return False
        return (self.requests + 1) * self.seconds_per_frame > limit


def _overloaded() -> RequestError:
    return RequestError(
        429,
        "overloaded",
        "The server works on as many requests as it takes; send this one again later.",
        retry_after_seconds=_RETRY_SECONDS,
    )
