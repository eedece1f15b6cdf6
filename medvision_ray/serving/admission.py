"""How much a replica takes on at once: requests and bytes are counted, the rest is told to come again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from medvision_ray.config.serving import RequestLimits
from medvision_ray.serving.problems import RequestError

_RETRY_SECONDS = 1.0


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

    @contextmanager
    def admit(self) -> Iterator[Admitted]:
        """Take a request on for the block.

        Raises:
            RequestError: 429, too many are in flight.
        """
        if self.requests >= self.limits.max_in_flight:
            raise _overloaded()
        admitted = Admitted(self)
        self.requests += 1
        try:
            yield admitted
        finally:
            self.requests -= 1
            self.body_bytes -= admitted.body_bytes


def _overloaded() -> RequestError:
    return RequestError(
        429,
        "overloaded",
        "The server works on as many requests as it takes; send this one again later.",
        retry_after_seconds=_RETRY_SECONDS,
    )
