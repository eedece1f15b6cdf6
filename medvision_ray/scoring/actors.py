"""The classes that Ray Data makes actors of: light, so that a driver can name them without loading decoders or torch."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from medvision_ray.scoring.settings import WorkerSettings


class ScoringActor:
    """Does an object's whole way (the fused plan)."""

    def __init__(self, settings: WorkerSettings) -> None:
        from medvision_ray.scoring.worker import ScoringWorker

        self._worker = ScoringWorker(settings)

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of inventory rows in; its result rows are written, and their number comes out."""
        return self._worker(block)


class PrepareActor:
    """Goes as far as the model's input (the staged plan)."""

    def __init__(self, settings: WorkerSettings) -> None:
        from medvision_ray.scoring.worker import PrepareWorker

        self._worker = PrepareWorker(settings)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """A block of inventory rows in, chunks of prepared objects out."""
        yield from self._worker(block)


class PredictActor:
    """Scores prepared objects (the staged plan)."""

    def __init__(self, settings: WorkerSettings) -> None:
        from medvision_ray.scoring.worker import PredictWorker

        self._worker = PredictWorker(settings)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """A chunk of prepared objects in; its result rows are written, and their number comes out."""
        return self._worker(chunk)
