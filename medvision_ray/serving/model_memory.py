"""The models in memory: loaded on demand, the least recently used let go; batches scored and explained with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import ServeJob
from medvision_ray.errors import BundleError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.native import reuse_freed_memory
from medvision_ray.scoring.objects import PreparedObject
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.preparing import Outcome

if TYPE_CHECKING:
    from medvision_ray.scoring.predictor import Predictor

Scored = dict[str, Any] | Exception
Pair = tuple[Bundle, Outcome]


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    predictor: Predictor
    rows: RowMaker


class StaleModelError(BundleError):
    """A version is no longer in memory and its files are another version's by now."""


class ModelMemory:
    """State is which models are in memory. Every method may be called from any thread."""

    def __init__(self, settings: ServeJob) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

    def loaded(self) -> set[str]:
        """Ids of the models in memory."""
        return set(self._loaded)

    def load(self, bundle: Bundle) -> None:
        """Have a model in memory; may take seconds.

        Raises:
            StaleModelError: see there.
        """
        self._get(bundle)

    def score(self, items: Sequence[Pair]) -> list[Scored]:
        """Rows of a batch, or for an item its error: one that fails costs the others nothing."""
        found: list[Scored] = [BundleError("not scored")] * len(items)
        groups: dict[str, list[int]] = {}
        for place, (bundle, _) in enumerate(items):
            groups.setdefault(bundle.model_id, []).append(place)
        for places in groups.values():
            for place, result in zip(places, self._score([items[place] for place in places]), strict=True):
                found[place] = result
        return found

    def explain(self, bundle: Bundle, ready: PreparedObject, frame: int, class_index: int) -> NDArray[np.uint8]:
        """Grad-CAM of a class in a frame on the source's grid: shape `(rows, columns)`, 255 the most evidence."""
        from medvision_ray.scoring.explain import to_source

        found = self._get(bundle).predictor.explain(np.array(ready.pixels[frame : frame + 1]), class_index)[0]
        return np.rint(to_source(found, ready.transform) * 255).astype(np.uint8)

    def close(self) -> None:
        """Let every model go."""
        self._loaded.clear()

    def _get(self, bundle: Bundle) -> Loaded:
        with self._lock:
            key = bundle.model_id
            loaded = self._loaded.get(key)
            if loaded is None:
                loaded = self._make(bundle)
                while len(self._loaded) >= self._settings.scale.models_in_memory:
                    self._loaded.popitem(last=False)
                self._loaded[key] = loaded
            self._loaded.move_to_end(key)
            return loaded

    def _score(self, items: list[Pair]) -> list[Scored]:
        try:
            rows = self._get(items[0][0]).rows.rows(outcome for _, outcome in items)
            return list(rows)
        except StaleModelError as error:
            return [error] * len(items)
        except Exception as error:  # a model that fails on one object must not fail its company
            if len(items) > 1:
                return [result for item in items for result in self._score([item])]
            kind = type(error).__name__[:64]
            code = ErrorCode.OUT_OF_MEMORY if isinstance(error, MemoryError) else ErrorCode.INTERNAL_ERROR
            return [DecodeError(code, Stage.PREDICT, exception=kind)]

    def _make(self, bundle: Bundle) -> Loaded:
        import torch

        from medvision_ray.scoring.predictor import Predictor

        scale = self._settings.scale
        torch.set_num_threads(scale.threads)
        reuse_freed_memory()
        size = scale.batch_size or (128 if torch.cuda.is_available() else 16)
        try:
            predictor = Predictor(bundle, scale.precision, batch_frames=size)
        except BundleError:
            raise StaleModelError("The model's files are of another version by now.") from None
        return Loaded(predictor, RowMaker(bundle, predictor, size, True, reduced=self._settings.decode.reduced))
