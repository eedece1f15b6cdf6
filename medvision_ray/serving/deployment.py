"""The Ray Serve deployment: the HTTP application and its engine in one replica, with dynamic batches."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from medvision_ray.cluster import cluster_gpus, worker_runtime_env
from medvision_ray.config import build_job
from medvision_ray.config.serving import ServeJob
from medvision_ray.defects import describe
from medvision_ray.serving.app import create_app
from medvision_ray.serving.local import LocalEngine
from medvision_ray.serving.metrics import ServingMetrics
from medvision_ray.serving.predicting_process import PredictingProcess
from medvision_ray.serving.recording import Recorder
from medvision_ray.serving.scaling import LOAD, ByLoad
from medvision_ray.serving.security import load_token

NAME = "medvision"
_HEALTH_SECONDS = 2.0
"""How soon a replica that died is missed; Serve's own 10 s would be most of the time until there is another."""
_UPSCALE_SECONDS = 15.0
"""How long replicas are too loaded before there is one more; Serve's own is 30 s."""
_OVERFLOW = 8
"""Requests that reach a replica beyond those that it takes on, to be refused in our own words."""
_log = logging.getLogger("ray.serve")


class Replica:
    """Answers requests; state is the engine. Ray Serve makes as many as are wanted."""

    async def __init__(self, settings: str, token: str | None) -> None:  # type: ignore[misc]
        self._settings = ServeJob.model_validate_json(settings)
        self._token = token
        self._metrics = ServingMetrics()
        recorder = Recorder(self._settings, self._metrics) if self._settings.record.output else None
        memory = PredictingProcess(self._settings)
        self._engine = LocalEngine(self._settings, self._metrics, recorder, memory)
        await asyncio.to_thread(self._engine.start)
        self._watching = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the application once this is made."""
        app = create_app(self._engine, self._settings, self._token, on_defect=_tell, metrics=self._metrics)
        self._admission = app.state.admission
        return app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve asks now and then, for `scaling.ByLoad`."""
        return {LOAD: self._admission.load}

    async def _watch(self) -> None:
        """Take new versions of the bundles over."""
        pause = self._settings.reload_seconds
        while pause:
            await asyncio.sleep(pause)
            try:
                taken = await asyncio.to_thread(self._engine.models_served.refresh)
            except Exception as error:  # the versions that are served stay
                _tell("reload", error)
                continue
            for model_id in taken:
                _log.warning("medvision: %s is served from now on", model_id)

    async def check_health(self) -> None:
        """What Ray Serve asks now and then; a replica that raises is replaced."""
        if not self._engine.ready():
            raise RuntimeError("the engine is not ready")

    async def __del__(self) -> None:
        self._watching.cancel()
        await asyncio.to_thread(self._engine.close)


def _tell(request_id: str, error: Exception) -> None:
    """A defect, without its text, which can hold identifiers."""
    found = describe(error)
    _log.error("medvision: request %s: %s at %s", request_id, found.kind, "; ".join(found.places))


def application(settings: ServeJob, token: str | None) -> Any:
    """The Serve application; Ray must be connected."""
    scale = settings.scale
    gpus = scale.gpus if scale.gpus is not None else (1.0 if cluster_gpus() else 0.0)
    settings = settings.model_copy(update={"scale": scale.model_copy(update={"gpus": gpus})})
    # Clients that wait for an answer when a replica ends get it; none waits longer than this.
    patience = settings.limits.body_seconds + settings.limits.answer_seconds
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=NAME,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": gpus, "runtime_env": worker_runtime_env()},
        max_ongoing_requests=settings.limits.max_in_flight + _OVERFLOW,
        # That many may come at once; further ones are refused by Serve, before a replica has work with them.
        max_queued_requests=settings.limits.max_in_flight,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            upscale_delay_s=_UPSCALE_SECONDS,
            policy=AutoscalingPolicy(policy_function=ByLoad, policy_kwargs={"target": scale.target_load}),
        ),
        graceful_shutdown_timeout_s=patience,
        health_check_period_s=_HEALTH_SECONDS,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(settings.model_dump_json(), token)


def build(args: dict[str, Any]) -> Any:
    """The application out of the `args` of a Serve config file (deploy/serve.yaml).

    The file, and not these args, says where Serve listens, so a token is needed always.

    Raises:
        ConfigError: an option is unknown or wrong.
        UsageError: there is no token.
    """
    settings = build_job(ServeJob, args, source="`args` of the Serve config")
    return application(settings, load_token(settings.http, needed=True))
