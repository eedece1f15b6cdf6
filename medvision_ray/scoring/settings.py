"""What the driver tells its scoring actors; light, so that a driver with nothing to score stays so."""

from __future__ import annotations

import time
from dataclasses import dataclass

from medvision_ray.config import DecodeConfig, ScoringConfig
from medvision_ray.privacy import Pseudonymiser


@dataclass(frozen=True)
class WorkerSettings:
    """What an actor needs to know.

    Attributes:
        job: name of the job, for metrics.
        deadline: Unix time from which no further object is begun; None is no limit.
    """

    bundle_uri: str
    run_folder: str
    scoring: ScoringConfig
    decode: DecodeConfig
    pseudonymiser: Pseudonymiser
    job: str = "score"
    deadline: float | None = None

    @property
    def past_deadline(self) -> bool:
        """Whether the run's time is over."""
        return self.deadline is not None and time.time() >= self.deadline
