"""The models that are served: found by name, new versions taken over."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config.serving import ServeJob
from medvision_ray.errors import BundleError, StorageError
from medvision_ray.imaging.preprocess import preprocess_id
from medvision_ray.promotion import resolve
from medvision_ray.scoring.objects import PreparedObject
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving.answers import ModelFacts
from medvision_ray.serving.model_memory import ModelMemory, Scored
from medvision_ray.serving.predicting_process import PredictingProcess
from medvision_ray.serving.problems import RequestError

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


class Models:
    """State is which version of each bundle is served. Every method may be called from any thread.

    Args:
        memory: where models are loaded and computed with; None is this process.
    """

    def __init__(self, settings: ServeJob, memory: ModelMemory | PredictingProcess | None = None) -> None:
        self._settings = settings
        self._served = [_read(uri) for uri in settings.bundles]
        _check_names(self._served)
        self.memory = memory or ModelMemory(settings)

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

    def load(self, served: Served) -> None:
        """Have a model in memory; may take seconds.

        Raises:
            StaleModelError: see there.
        """
        self.memory.load(served.bundle)

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rows of a batch, or for an item its error: one that fails costs the others nothing."""
        return self.memory.score([(served.bundle, outcome) for served, outcome in items])

    def explain(self, served: Served, ready: PreparedObject, frame: int, class_index: int) -> NDArray[np.uint8]:
        """Grad-CAM of a class in a frame on the source's grid: shape `(rows, columns)`, 255 the most evidence."""
        return self.memory.explain(served.bundle, ready, frame, class_index)

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
        served, loaded = self._served, self.memory.loaded()
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
