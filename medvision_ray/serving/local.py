"""The engine of one replica: decodes in processes of its own, scores in batches, builds the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from medvision_ray.config.serving import ServeJob
from medvision_ray.scoring.objects import Effort, PreparedObject
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving.answering import answer_of
from medvision_ray.serving.answers import Answer, Explanation, ModelFacts
from medvision_ray.serving.decoders import Decoders
from medvision_ray.serving.drawing import png_base64
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.models import Item, Models, Scored, Served, StaleModelError
from medvision_ray.serving.receiving import sniff
from medvision_ray.tables import probability_columns

Score = Callable[[Item], Awaitable[Scored]]


class LocalEngine:
    """An `Engine`; state is the models, and the decoding processes.

    Args:
        score: scores one item, in a batch with others; None scores each alone.
        predicting: one thread, in which all that needs the network is done.
    """

    def __init__(self, settings: ServeJob, score: Score | None = None, predicting: Executor | None = None) -> None:
        self.models_served = Models(settings)
        self.decoders = Decoders(settings.decode, settings.scale.decoders)
        self._score = score or self._score_alone
        self._predicting = predicting or ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._ready = False

    def start(self) -> None:
        """Start the decoding processes and load the default model."""
        self.decoders.start()
        self.models_served.load(self.models_served.find(None))
        self._ready = True

    def close(self) -> None:
        """End the decoding processes."""
        self._ready = False
        self.decoders.close()

    def ready(self) -> bool:
        """Whether `start` is through."""
        return self._ready

    async def models(self) -> list[ModelFacts]:
        """The models that are served."""
        return self.models_served.facts()

    async def card(self, model: str) -> str:
        """A model's card."""
        return self.models_served.find(model).card

    async def isolated(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Run a task in a decoding process; it is told the preprocessing of `options["model"]`."""
        served = self.models_served.find(options.get("model"))
        return await self.decoders.run(task, data, {"preprocess": served.preprocess, **options})

    async def predict(self, data: bytes, options: PredictOptions) -> Answer:
        """Score one object."""
        try:
            return await self._predict(data, options, self.models_served.find(options.model))
        except StaleModelError:  # a new version has taken over meanwhile
            return await self._predict(data, options, self.models_served.find(options.model))

    async def _predict(self, data: bytes, options: PredictOptions, served: Served) -> Answer:
        started = time.perf_counter()
        facts, pixels = await self.decoders.run("prepare", data, {"preprocess": served.preprocess})
        effort = Effort(**facts["effort"])
        entry = {"image_id": 0, "uri": "", "etag": ""}
        ready = PreparedObject.from_facts(facts, pixels)
        row = await self._score((served, Outcome(entry, ready, effort, 1)))
        if isinstance(row, Exception):
            raise row
        loop, kind = asyncio.get_running_loop(), sniff(data) or "dicom"
        explanation = await self._explanation(served, ready, row) if options.explain else None

        def answer() -> Answer:
            return answer_of(
                served.bundle,
                row,
                options,
                image_format=kind,
                effort=effort,
                started=started,
                explanation=explanation,
            )

        return await loop.run_in_executor(None, answer)

    async def _explanation(self, served: Served, ready: PreparedObject, row: dict[str, Any]) -> Explanation | None:
        """Grad-CAM of the likeliest class in the key frame; None for a model without classes."""
        classes = served.bundle.classes
        if not classes:
            return None
        values = [row[name] for name in probability_columns(classes)]
        likeliest = values.index(max(values))

        def explain() -> str:
            return png_base64(self.models_served.explain(served, ready, row["key_frame"], likeliest))

        png = await asyncio.get_running_loop().run_in_executor(self._predicting, explain)
        return Explanation(kind="gradcam", class_name=classes[likeliest], png=png)

    async def _score_alone(self, item: Item) -> Scored:
        score = self.models_served.score
        return (await asyncio.get_running_loop().run_in_executor(self._predicting, score, [item]))[0]
