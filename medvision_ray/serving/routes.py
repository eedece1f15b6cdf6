"""The routes of the API, version 1."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse

from medvision_ray.imaging.errors import DecodeError
from medvision_ray.serving.answers import Answer, ModelList, State
from medvision_ray.serving.engine import Engine, PredictOptions
from medvision_ray.serving.metrics import CONTENT_TYPE_LATEST
from medvision_ray.serving.middleware import request_id_of
from medvision_ray.serving.negotiation import choose
from medvision_ray.serving.problems import MEDIA_TYPE, RequestError, of_decode_error
from medvision_ray.serving.receiving import FORM_TYPE, RAW_TYPES, receive
from medvision_ray.serving.security import authorised

ModelName = Annotated[str, Path(min_length=1, max_length=128, description="Id of a model, or its name.")]

_WHY = {
    400: "The request is malformed, or its body empty or cut off.",
    401: "The bearer token is missing or wrong.",
    404: "There is no such thing.",
    406: "None of the answers that Accept names can be given.",
    408: "The body did not arrive in time.",
    409: "The object is not as it was when it was scored, or its address is not kept.",
    413: "The body is over the byte limit.",
    415: "The content type is none of those taken, or the content is no image format.",
    422: "The object could not be decoded; `code` is that of the failures table.",
    429: "The server is busy: see Retry-After.",
    500: "A defect.",
    502: "The archive refused.",
    503: "The server can't answer now: see Retry-After.",
    504: "The answer took too long.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route's refusals are documented."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {status: {"description": _WHY[status], "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "requestBody": {
        "required": True,
        "description": "One object: raw, or the only file of a form. The format is told by content.",
        "content": {
            **{kind: _BINARY for kind in RAW_TYPES},
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}

_JSON, _PNG, _SEG = "application/json", "image/png", "application/dicom"
_FORMS = (_JSON, _PNG, _SEG)
_ANSWERS: dict[str, Any] = {
    "description": "The prediction; by Accept the key frame with the mask's outline on it as PNG, or the masks as a DICOM "
    "SEG object in the source's geometry.",
    "content": {_PNG: _BINARY, _SEG: _BINARY},
}

open_routes = APIRouter(tags=["state"])
routes = APIRouter(tags=["predictions"], dependencies=[Depends(authorised)])


async def engine_of(request: Request) -> Engine:
    """A dependency: the engine that the app was made with. Async, or FastAPI asks for it in a thread (0.5 ms)."""
    engine: Engine = request.app.state.engine
    return engine


EngineOf = Annotated[Engine, Depends(engine_of)]


@open_routes.get("/healthz", summary="The process is alive")
async def healthz() -> State:
    """Answers as long as the process does."""
    return State(status="ok")


@open_routes.get("/readyz", summary="Models are loaded", responses=problems(503))
async def readyz(engine: EngineOf) -> State:
    """200 once predictions can be made, else 503."""
    if not engine.ready():
        raise RequestError(503, "starting", "The server is not ready yet.", retry_after_seconds=2)
    return State(status="ok")


@routes.get(
    "/metrics",
    summary="Prometheus metrics",
    tags=["state"],
    response_class=PlainTextResponse,
    responses={
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(401),
    },
)
async def metrics(request: Request) -> PlainTextResponse:
    """Counts of the replica that answers, in Prometheus' exposition format."""
    return PlainTextResponse(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models", summary="The models that are served", tags=["models"], responses=problems(401, 503))
async def list_models(engine: EngineOf) -> ModelList:
    """The default model is the first one."""
    return ModelList(models=await engine.models())


@routes.get(
    "/v1/models/{model}/card",
    summary="A model's card",
    tags=["models"],
    response_class=PlainTextResponse,
    responses={
        200: {"description": "The card, Markdown.", "content": {"text/markdown": {"schema": {"type": "string"}}}},
        **problems(400, 401, 404, 422, 503),
    },
)
async def model_card(model: ModelName, engine: EngineOf) -> PlainTextResponse:
    """What the model is, what it was trained on, and how well it did."""
    return PlainTextResponse(await engine.card(model), media_type="text/markdown")


@routes.post(
    "/v1/predict",
    summary="Score one image or volume",
    response_model=Answer,
    openapi_extra=BODY,
    responses={200: _ANSWERS, **problems(400, 401, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504)},
)
async def predict(
    request: Request,
    engine: EngineOf,
    model: Annotated[
        str | None,
        Query(min_length=1, max_length=128, description="Id or name of a model; without it the default one."),
    ] = None,
    mask: Annotated[
        Literal["none", "rle", "png"], Query(description="How the mask comes beside its contours.")
    ] = "none",
    explain: Annotated[
        Literal["gradcam"] | None, Query(description="Add a Grad-CAM of the likeliest class in the key frame.")
    ] = None,
) -> Response:
    """Score a DICOM, NIfTI, PNG, JPEG, TIFF or BMP object. Not a diagnosis: this is no medical device."""
    started = time.perf_counter()
    status, code = 200, "none"
    try:
        return await _predict(request, engine, PredictOptions(request_id_of(request.scope), model, mask, explain))
    except (RequestError, DecodeError) as error:
        refusal = of_decode_error(error) if isinstance(error, DecodeError) else error
        status, code = refusal.status, refusal.code
        raise refusal from None
    except Exception:
        status, code = 500, "internal_error"
        raise
    finally:
        request.app.state.metrics.answered(status, code, time.perf_counter() - started)


async def _predict(request: Request, engine: Engine, options: PredictOptions) -> Response:
    state, settings = request.app.state, request.app.state.settings
    form = choose(request.headers.get("accept", ""), _FORMS)
    if form is None:
        raise RequestError(406, "not_acceptable", f"Expected Accept to take one of {', '.join(_FORMS)}.")
    with state.admission.admit() as admitted, state.metrics.in_flight.track_inprogress():
        data, found = await receive(request, settings.decode.max_bytes, settings.limits.body_seconds, admitted)
        if form == _SEG and found != "dicom":
            raise RequestError(406, "not_acceptable", "A DICOM SEG object is made of a DICOM object alone.")
        limit = settings.limits.answer_seconds
        try:
            with state.admission.working():
                answer, response = await asyncio.wait_for(_answer(engine, data, options, form), limit)
                state.admission.answered(answer.image.frames)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestError(504, "answer_timeout", f"The answer was not ready within {limit:g} s.") from None
    state.metrics.scored(answer)
    return response


async def _answer(engine: Engine, data: bytes, options: PredictOptions, form: str) -> tuple[Answer, Response]:
    """The answer, and its form."""
    if form == _JSON:
        answer = await engine.predict(data, options)
        return answer, Response(answer.model_dump_json(by_alias=True), media_type=_JSON)
    answer = await engine.predict(data, replace(options, mask="rle", explain=None))
    if answer.mask is None:
        raise RequestError(406, "not_acceptable", "This model draws no masks; its answer is JSON.")
    if form == _PNG:
        drawn = {"model": answer.model_id, "frame": answer.key_frame, "contours": answer.mask.contours}
        _, content = await engine.isolated("overlay", data, drawn)
    else:
        masks = [frame.mask for frame in answer.frames] or [answer.mask]
        lengths = [mask.rle.counts for mask in masks if mask is not None and mask.rle is not None]
        shape = {"rows": answer.image.height, "columns": answer.image.width}
        given = {"model": answer.model_id, "model_id": answer.model_id, "masks": lengths, **shape}
        _, content = await engine.isolated("segment", data, given)
    return answer, Response(content, media_type=form, headers={"X-Model-ID": answer.model_id})
