"""The engine of one replica: decodes in processes of its own, scores in batches, builds the answer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from medvision_ray.config import PrivacyConfig
from medvision_ray.config.serving import ServeJob
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.operating_points import named_class
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.scoring.objects import Effort, Failure, PreparedObject
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.scoring.rows import failed_row
from medvision_ray.serving.answering import answer_of
from medvision_ray.serving.answers import Answer, Explanation, ModelFacts
from medvision_ray.serving.batching import Batcher
from medvision_ray.serving.decoders import Decoders
from medvision_ray.serving.drawing import png_base64
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.metrics import ServingMetrics
from medvision_ray.serving.model_memory import Scored, StaleModelError
from medvision_ray.serving.models import Item, Models, Served
from medvision_ray.serving.online_runs import entry_of
from medvision_ray.serving.predicting_process import PredictingProcess
from medvision_ray.serving.receiving import sniff
from medvision_ray.serving.recording import Recorder
from medvision_ray.tables import probability_columns


class LocalEngine:
    """An `Engine`; state is the models, the decoding processes, and what waits for the next batch.

    Args:
        metrics: where batches are counted.
        recorder: keeps rows of what was scored or could not be; None keeps none.
        memory: the process that predicts; None is this one.
    """

    def __init__(
        self,
        settings: ServeJob,
        metrics: ServingMetrics | None = None,
        recorder: Recorder | None = None,
        memory: PredictingProcess | None = None,
    ) -> None:
        self.models_served = Models(settings, memory)
        self.decoders = Decoders(settings.decode, settings.scale.decoders)
        self._predicting = ThreadPoolExecutor(1, thread_name_prefix="predict")  # all that needs the network
        scale = settings.scale
        self._score: Batcher[Item, Scored] = Batcher(
            self.models_served.score,
            self._predicting,
            scale.batch_size or (128 if scale.gpus else 16),
            scale.batch_wait_ms / 1000,
            (metrics or ServingMetrics()).batch_objects.observe,
        )
        self._recorder = recorder
        self._privacy = {"privacy": settings.privacy.model_dump_json()} if recorder else {}
        self._closing_seconds = settings.limits.body_seconds + settings.limits.answer_seconds
        self._ready = False

    def start(self) -> None:
        """Start the decoding processes and load the default model.

        Raises:
            UsageError: rows are to be kept, and the site's pseudonym key is not there.
        """
        if self._recorder:
            load_pseudonymiser(PrivacyConfig.model_validate_json(self._privacy["privacy"]))
            self._recorder.start()
        with ThreadPoolExecutor(1) as beside:  # both wait for processes of their own to import
            decoding = beside.submit(self.decoders.start)
            self._predicting.submit(self.models_served.load, self.models_served.find(None)).result()
            decoding.result()
        self._ready = True

    def close(self) -> None:
        """End the decoding processes, and write the rows that wait."""
        self._ready = False
        self.decoders.close()
        self.models_served.memory.close()
        if self._recorder:
            self._recorder.close(self._closing_seconds)

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
        entry: dict[str, Any] = {"image_id": 0, "uri": "", "etag": ""}
        if self._recorder:
            self._recorder.check_room()
            entry = await asyncio.to_thread(entry_of, options.request_id, data)
        served = self.models_served.find(options.model)
        try:
            try:
                return await self._predict(data, options, served, entry)
            except StaleModelError:  # a new version has taken over meanwhile
                served = self.models_served.find(options.model)
                return await self._predict(data, options, served, entry)
        except DecodeError as error:
            if self._recorder:
                self._recorder.add(served.bundle, failed_row(entry, Failure.of(error)))
            raise

    async def _predict(self, data: bytes, options: PredictOptions, served: Served, entry: dict[str, Any]) -> Answer:
        started = time.perf_counter()
        facts, pixels = await self.decoders.run("prepare", data, {"preprocess": served.preprocess, **self._privacy})
        effort = Effort(**facts["effort"])
        ready = PreparedObject.from_facts(facts, pixels)
        row = await self._score((served, Outcome(entry, ready, effort, 1)))
        if isinstance(row, Exception):
            raise row
        effort = replace(effort, predict_seconds=row["predict_seconds"])  # known where it was predicted
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

        found = await loop.run_in_executor(None, answer)
        if self._recorder:
            self._recorder.add(served.bundle, row)
        return found

    async def _explanation(self, served: Served, ready: PreparedObject, row: dict[str, Any]) -> Explanation | None:
        """Grad-CAM of the class that the answer names, of findings the likeliest, in the key frame; None without classes."""
        classes = served.bundle.classes
        if not classes:
            return None
        values = np.array([row[name] for name in probability_columns(classes)], np.float32)
        named = int(named_class(values, served.bundle.class_offsets))

        def explain() -> str:
            return png_base64(self.models_served.explain(served, ready, row["key_frame"], named))

        png = await asyncio.get_running_loop().run_in_executor(self._predicting, explain)
        return Explanation(kind="gradcam", class_name=classes[named], png=png)
