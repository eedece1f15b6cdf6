"""The models that are served: found by name, loaded on demand, the least recently used let go, new versions taken over."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config.serving import ServeJob
from medvision_ray.errors import BundleError, StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.preprocess import preprocess_id
from medvision_ray.native import reuse_freed_memory
from medvision_ray.promotion import resolve
from medvision_ray.scoring.objects import PreparedObject
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving.answers import ModelFacts
from medvision_ray.serving.problems import RequestError

if TYPE_CHECKING:
    from medvision_ray.scoring.predictor import Predictor

_CARD, _YAML = "MODEL_CARD.md", "bundle.yaml"


@dataclass(frozen=True)
class Served:
    """A version of a model that is served.

    Attributes:
        bundle: what it is.
        card: its model card, Markdown.
        preprocess: its preprocessing as JSON, as `serving.tasks` takes it.
        version: sha256 of its `bundle.yaml`.
    """

    bundle: Bundle
    card: str
    preprocess: str
    version: str


Item = tuple[Served, Outcome]
Scored = dict[str, Any] | Exception


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    predictor: Predictor
    rows: RowMaker


class StaleModelError(BundleError):
    """A version is no longer in memory and its files are another version's by now."""


class Models:
    """State is which version of each bundle is served, and which models are in memory.

    Every method may be called from any thread.
    """

    def __init__(self, settings: ServeJob) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._served = [_read(uri) for uri in settings.bundles]
        _check_names(self._served)
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

    def find(self, model: str | None) -> Served:
        """A model by id or name; None is the default.

        Raises:
            RequestError: 404.
        """
        served = self._served
        if model is None:
            return served[0]
        for one in served:
            if model in (one.bundle.model_id, one.bundle.name):
                return one
        raise RequestError(404, "unknown_model", "There is no model of this id or name; see /v1/models.")

    def load(self, served: Served) -> Loaded:
        """The loaded model; may take seconds.

        Raises:
            StaleModelError: see there.
        """
        with self._lock:
            key = served.bundle.model_id
            loaded = self._loaded.get(key)
            if loaded is None:
                loaded = self._make(served)
                while len(self._loaded) >= self._settings.scale.models_in_memory:
                    self._loaded.popitem(last=False)
                self._loaded[key] = loaded
            self._loaded.move_to_end(key)
            return loaded

    def score(self, items: list[Item]) -> list[Scored]:
        """Rows of a batch, or for an item its error: one that fails costs the others nothing."""
        found: list[Scored] = [BundleError("not scored")] * len(items)
        groups: dict[str, list[int]] = {}
        for place, (served, _) in enumerate(items):
            groups.setdefault(served.bundle.model_id, []).append(place)
        for places in groups.values():
            for place, result in zip(places, self._score([items[place] for place in places]), strict=True):
                found[place] = result
        return found

    def explain(self, served: Served, ready: PreparedObject, frame: int, class_index: int) -> NDArray[np.uint8]:
        """Grad-CAM of a class in a frame on the source's grid: shape `(rows, columns)`, 255 the most evidence."""
        from medvision_ray.scoring.explain import to_source

        found = self.load(served).predictor.explain(np.array(ready.pixels[frame : frame + 1]), class_index)[0]
        return np.rint(to_source(found, ready.transform) * 255).astype(np.uint8)

    def refresh(self) -> list[str]:
        """Look for new versions, load them, and serve them from then on; answers their ids.

        A bundle that can't be read now, as while it is written, is served on in its old version.
        """
        taken: list[str] = []
        for place, uri in enumerate(self._settings.bundles):
            before = self._served[place]
            with contextlib.suppress(BundleError, StorageError):
                if _version(uri) == before.version:
                    continue
                after = _read(uri)
                served = [after if i == place else one for i, one in enumerate(self._served)]
                _check_names(served)
                self.load(after)
                self._served = served  # what is under way keeps the version it has
                taken.append(after.bundle.model_id)
        return taken

    def facts(self) -> list[ModelFacts]:
        """What is served."""
        served, loaded = self._served, set(self._loaded)
        return [
            ModelFacts(
                id=one.bundle.model_id,
                name=one.bundle.name,
                default=place == 0,
                loaded=one.bundle.model_id in loaded,
                classes=list(one.bundle.classes),
                multi_label=one.bundle.multi_label,
                segmentation=one.bundle.architecture.segmentation,
                mask_threshold=one.bundle.mask_threshold,
                input_size=list(one.bundle.preprocess.size),
                preprocess_id=preprocess_id(one.bundle.preprocess, reduced=self._settings.decode.reduced),
                calibrated=one.bundle.calibration is not None,
            )
            for place, one in enumerate(served)
        ]

    def _score(self, items: list[Item]) -> list[Scored]:
        try:
            rows = self.load(items[0][0]).rows.rows(outcome for _, outcome in items)
            return list(rows)
        except StaleModelError as error:
            return [error] * len(items)
        except Exception as error:  # a model that fails on one object must not fail its company
            if len(items) > 1:
                return [result for item in items for result in self._score([item])]
            kind = type(error).__name__[:64]
            code = ErrorCode.OUT_OF_MEMORY if isinstance(error, MemoryError) else ErrorCode.INTERNAL_ERROR
            return [DecodeError(code, Stage.PREDICT, exception=kind)]

    def _make(self, served: Served) -> Loaded:
        import torch

        from medvision_ray.scoring.predictor import Predictor

        torch.set_num_threads(1)  # as in the batch job; replicas are the parallelism
        reuse_freed_memory()
        scale = self._settings.scale
        size = scale.batch_size or (128 if torch.cuda.is_available() else 16)
        try:
            predictor = Predictor(served.bundle, scale.precision, batch_frames=size)
        except BundleError:
            raise StaleModelError("The model's files are of another version by now.") from None
        return Loaded(predictor, RowMaker(served.bundle, predictor, size, True, reduced=self._settings.decode.reduced))


def _version(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(storage.join(resolve(uri), _YAML))).hexdigest()


def _read(uri: str) -> Served:
    """A bundle and its version; the version is read first, so that one replaced meanwhile is seen as new later."""
    version = _version(uri)
    bundle = load_bundle(resolve(uri))
    card = storage.read_bytes(storage.join(bundle.uri, _CARD)).decode("utf-8", "replace")
    return Served(bundle, card, bundle.preprocess.model_dump_json(), version)


def _check_names(served: list[Served]) -> None:
    names = [one.bundle.name for one in served]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BundleError(
            f"Expected bundles of different names, but several are called {', '.join(twice)}: requests choose by name."
        )
