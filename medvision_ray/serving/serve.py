"""`medvision serve`: check, start Ray Serve, say where it listens, and wait to be stopped."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medvision_ray.bundle import load_bundle
from medvision_ray.cluster import ray_session
from medvision_ray.config.serving import HttpConfig, ServeJob
from medvision_ray.errors import UsageError
from medvision_ray.logs import Reporter, silent
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.promotion import resolve
from medvision_ray.serving.ingress import environment
from medvision_ray.serving.security import load_token

_LOOK_SECONDS = 5.0


def serve(settings: ServeJob, say: Reporter = silent) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM, which end it after the requests under way.

    Raises:
        UsageError: the address needs a token or readable TLS files; answers are kept, and the pseudonym key is not there.
        BundleError: a bundle can't be used.
    """
    with serving(settings, say):
        while True:
            time.sleep(_LOOK_SECONDS)


@contextmanager
def serving(settings: ServeJob, say: Reporter = silent) -> Iterator[str]:
    """The server, for the block; answers its address."""
    token = load_token(settings.http)
    _check_files(settings)
    if not (settings.ray.address or os.environ.get("RAY_ADDRESS")):
        _check_place(settings.http)
    if settings.record.output:
        load_pseudonymiser(settings.privacy)
    models = [load_bundle(resolve(uri)).model_id for uri in settings.bundles]
    with environment(settings.http), ray_session(settings.ray):
        from ray import serve as ray_serve

        from medvision_ray.serving.deployment import NAME, application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # that Serve started is said below
        http, limits = settings.http, settings.limits
        ray_serve.start(
            http_options={
                "host": http.host,
                "port": http.port,
                "ssl_certfile": http.tls_certificate,
                "ssl_keyfile": http.tls_key,
                # The application answers late requests itself; this is for those that never reach it.
                "request_timeout_s": limits.body_seconds + limits.answer_seconds + 10,
            },
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        try:
            ray_serve.run(application(settings, token), name=NAME, route_prefix="/")
            address = f"{'https' if http.tls_certificate else 'http'}://{http.host}:{http.port}"
            locked = "with a token" if token else "without a token, to this machine alone"
            say(
                f"{', '.join(models)} at {address}, {locked}; API: {address}/docs, viewer: {address}/.",
                event="serving",
                model_id=models[0],
            )
            yield address
        finally:
            with contextlib.redirect_stdout(io.StringIO()):  # Ray says there that Serve's controller "failed" to end
                ray_serve.shutdown()


def _check_files(settings: ServeJob) -> None:
    for name in ("tls_certificate", "tls_key"):
        place = getattr(settings.http, name)
        if place is not None and not os.access(place, os.R_OK):
            raise UsageError(f"Expected a readable PEM file at `http.{name}`, but it cannot be read.")


def _check_place(http: HttpConfig) -> None:
    """That this machine can listen there now; Ray's own refusal comes late, as an error of its controller's."""
    try:
        family, *_, place = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended server's connections do not count
            trial.bind(place)
            trial.listen()
    except OSError as error:
        raise UsageError(
            f"Expected to listen on {http.host}, port {http.port} (`http.host`, `http.port`), but the system refuses it: "
            f"{error.strerror}. End what listens there, or give another port or an address of this machine."
        ) from None
