"""The HTTP application around an engine; runs under Ray Serve, and in a test without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from medvision_ray import __version__
from medvision_ray.config.serving import ServeJob
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.serving.admission import Admission
from medvision_ray.serving.engine import Engine
from medvision_ray.serving.metrics import ServingMetrics
from medvision_ray.serving.middleware import Guard, request_id_of
from medvision_ray.serving.page import page_router
from medvision_ray.serving.pages import STATIC, StaticPages, pages
from medvision_ray.serving.problems import Problem, RequestError, of_decode_error, problem_response
from medvision_ray.serving.routes import open_routes, routes
from medvision_ray.serving.security import allowed_hosts
from medvision_ray.serving.viewing import Viewing

_ABOUT = (
    "Scores medical images with the models of bundles, as the batch job does. "
    "Not a medical device: answers are for research and engineering, not for diagnosis."
)
ROUTERS: list[APIRouter] = [open_routes, routes, pages]
"""Every router of the application. Another one is added here; `Depends(security.authorised)` asks for the token."""


def _say_nothing(request_id: str, error: Exception) -> None:
    """Where nobody listens."""


def create_app(
    engine: Engine,
    settings: ServeJob,
    token: str | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    on_defect: Callable[[str, Exception], None] = _say_nothing,
    metrics: ServingMetrics | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        engine: what predicts.
        settings: limits and addresses.
        token: bearer token that requests must carry; None asks for none (`security.load_token`).
        routers: further routers, before the static pages.
        on_defect: is told the request's id and an error that nobody expected, to log it without its text.
        metrics: counts of this process; None begins at nothing.
    """
    app = FastAPI(title="medvision_ray", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.settings = settings
    app.state.token = token
    app.state.admission = Admission(settings.limits)
    app.state.metrics = metrics or ServingMetrics()
    for router in (*ROUTERS, Viewing(settings).router, page_router(), *routers):
        app.include_router(router)
    app.mount("/", StaticPages(directory=STATIC, html=True), name="static")
    app.add_middleware(Guard, hosts=allowed_hosts(settings.http, token), on_defect=on_defect)
    for kind in (RequestError, DecodeError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    _document_problems(app)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    response = problem_response(_as_refusal(error), request_id_of(request.scope))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _as_refusal(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DecodeError):
        return of_decode_error(error)
    if isinstance(error, RequestValidationError):
        places = sorted({".".join(str(part) for part in item["loc"][:2]) for item in error.errors()})
        return RequestError(400, "bad_request", f"Expected other values of: {', '.join(places)}.")
    status = error.status_code if isinstance(error, HTTPException) else 500
    known = {404: ("not_found", "There is nothing at this address."), 405: ("method_not_allowed", "Not this method.")}
    code, sentence = known.get(status, ("refused", "The request was refused."))
    return RequestError(status, code, sentence)


def _document_problems(app: FastAPI) -> None:
    """Put `Problem` among the schemas, as the routes' refusals refer to it, and take FastAPI's own 422 out."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = plain()
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]
