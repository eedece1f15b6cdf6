"""Prepared objects through the model in batches of frames, and out as rows in the objects' order."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle
from medvision_ray.imaging.preprocess import preprocess_id
from medvision_ray.scoring.objects import Failure, PreparedObject
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.scoring.rows import FrameResult, effort_columns, failed_row, frame_result, scored_row

if TYPE_CHECKING:
    from medvision_ray.scoring.predictor import Prediction, Predictor


@dataclass
class _Open:
    """An object whose frames are on their way through the model."""

    place: int
    outcome: Outcome
    ready: PreparedObject
    results: list[FrameResult] = field(default_factory=list)


Batch = list[tuple[_Open, int]]


class RowMaker:
    """Turns outcomes into rows with a loaded model."""

    def __init__(
        self, bundle: Bundle, predictor: Predictor, batch_size: int, save_masks: bool, *, reduced: bool = False
    ) -> None:
        self._bundle = bundle
        self._predictor = predictor
        self.batch_size = batch_size
        self._save_masks = save_masks
        self._preprocess_id = preprocess_id(bundle.preprocess, reduced=reduced)

    def rows(self, outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
        """One working row an outcome, in order."""
        rows: list[dict[str, Any]] = []
        under_way: deque[Batch] = deque()
        predictions = self._predictor.stream(self._stacked(self._batches(outcomes, rows), under_way))
        for prediction, seconds in predictions:
            self._take(under_way.popleft(), prediction, seconds, rows)
        peak = peak_memory_bytes()
        for row in rows:
            row["peak_memory_bytes"] = peak
        return rows

    def _batches(self, outcomes: Iterable[Outcome], rows: list[dict[str, Any]]) -> Iterator[Batch]:
        """Frames of successive objects in full batches; failures become rows on the way."""
        waiting: Batch = []
        for outcome in outcomes:
            if isinstance(outcome.result, Failure):
                rows.append(
                    {**failed_row(outcome.entry, outcome.result, outcome.attempts), **effort_columns(outcome.effort)}
                )
                continue
            item = _Open(len(rows), outcome, outcome.result)
            rows.append({})
            for frame in range(len(item.ready.pixels)):
                waiting.append((item, frame))
                if len(waiting) == self.batch_size:
                    yield waiting
                    waiting = []
        if waiting:
            yield waiting

    def _stacked(self, batches: Iterable[Batch], under_way: deque[Batch]) -> Iterator[NDArray[np.uint8]]:
        for batch in batches:
            under_way.append(batch)
            yield np.stack([item.ready.pixels[frame] for item, frame in batch])

    def _take(self, batch: Batch, prediction: Prediction, seconds: float, rows: list[dict[str, Any]]) -> None:
        share = seconds / len(batch)
        for index, (item, _) in enumerate(batch):
            probabilities = prediction.probabilities[index] if prediction.probabilities is not None else None
            mask = prediction.masks[index] if prediction.masks is not None else None
            started = time.perf_counter()
            item.results.append(frame_result(self._bundle, item.ready, probabilities, mask))
            item.outcome.effort.predict_seconds += share + time.perf_counter() - started
            if len(item.results) == len(item.ready.pixels):
                row = scored_row(
                    self._bundle,
                    item.outcome.entry,
                    item.ready,
                    item.results,
                    preprocess_id=self._preprocess_id,
                    save_masks=self._save_masks,
                )
                rows[item.place] = {**row, **effort_columns(item.outcome.effort)}


def peak_memory_bytes() -> int:
    """Largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
