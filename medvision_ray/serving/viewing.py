"""What the viewer page asks for beside predictions: pixels of an uploaded file, the worklist, and its images.

Objects are decoded by the engine's decoding processes, with the limits of predictions.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from medvision_ray.config.serving import ServeJob
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import SENTENCES, ErrorCode
from medvision_ray.serving import worklist
from medvision_ray.serving.engine import Engine
from medvision_ray.serving.pixel_format import MEDIA_TYPE
from medvision_ray.serving.pixel_task import asked_for
from medvision_ray.serving.problems import RequestError
from medvision_ray.serving.receiving import receive
from medvision_ray.serving.routes import BODY, EngineOf, problems
from medvision_ray.serving.security import authorised
from medvision_ray.serving.source_object import NotOpenableError, read_source

_ANSWER_BYTES = 64 << 20
_STORAGE_STATUS = {"not_found": 404, "too_large": 413, "changed_while_reading": 409}

First = Annotated[int, Query(ge=0, description="First frame wanted; as many follow as fit into 64 MiB.")]
Session = Annotated[
    str,
    Query(
        pattern="^([0-9a-f]{32})?$",
        description="Random, made by the page: slices of one series get the same name within a session only.",
    ),
]
Name = Annotated[str | None, Query(max_length=200)]
Nights = Annotated[int, Query(ge=1, le=3660, description="Days up to the newest run; without `run_key`.")]
PIXELS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Header and stored values (`serving.pixel_format`).",
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}
ResultT = TypeVar("ResultT")


class Viewing:
    """The routes.

    Args:
        settings: limits of one object, which are those of predictions, and the place of the tables.
    """

    def __init__(self, settings: ServeJob) -> None:
        self._settings = settings
        self.router = APIRouter(tags=["viewer"], dependencies=[Depends(authorised)])
        self._add(
            "/v1/pixels", self._pixels, {**PIXELS, **problems(400, 401, 408, 413, 415, 422, 429, 503, 504)}, "POST"
        )
        listed = problems(400, 401, 404, 422, 503)
        self._add("/v1/worklist", self._worklist, listed)
        self._add("/v1/worklist/choices", self._choices, listed)
        self._add("/v1/worklist/{image_id}", self._record, listed)
        read = problems(400, 401, 404, 409, 413, 415, 422, 429, 502, 503, 504)
        self._add("/v1/worklist/{image_id}/pixels", self._source_pixels, {**PIXELS, **read})

    def _add(self, path: str, route: Callable[..., Any], answers: dict[int | str, Any], method: str = "GET") -> None:
        binary = {"response_class": Response} if PIXELS.keys() <= answers.keys() else {}
        self.router.add_api_route(
            path,
            route,
            methods=[method],
            summary=(route.__doc__ or "").partition("\n")[0].rstrip("."),
            name=route.__name__.strip("_"),
            response_model=None,
            responses=answers,
            openapi_extra=BODY if method == "POST" else None,
            **binary,  # type: ignore[arg-type]
        )

    async def _pixels(self, request: Request, engine: EngineOf, first: First = 0, session: Session = "") -> Response:
        """Stored values of an uploaded image, and how to show them."""
        state = request.app.state
        with state.admission.admit() as admitted:
            seconds = self._settings.limits.body_seconds
            content, _ = await receive(request, self._settings.decode.max_bytes, seconds, admitted)
            return await self._encoded(engine, [content], first, session)

    async def _encoded(self, engine: Engine, parts: Sequence[bytes], first: int, session: str = "") -> Response:
        content, options = asked_for(parts, first, _ANSWER_BYTES, session)
        limit = self._settings.limits.answer_seconds
        try:
            _, encoded = await asyncio.wait_for(engine.isolated("pixels", content, options), limit)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestError(504, "answer_timeout", f"The answer was not ready within {limit:g} s.") from None
        return Response(encoded, media_type=MEDIA_TYPE)

    def _worklist(self, query: Annotated[worklist.Query, Query()]) -> JSONResponse:
        """Rows of the predictions or failures table, a page at a time."""
        return JSONResponse(self._from_tables(worklist.page, query))

    def _choices(self, nights: Nights = worklist.DEFAULT_NIGHTS) -> JSONResponse:
        """What the worklist can be filtered by."""
        return JSONResponse(self._from_tables(worklist.choices, nights))

    def _record(self, image_id: int, model_id: Name = None) -> JSONResponse:
        """One row of the tables, its masks as contours."""
        row = self._from_tables(worklist.record, _id(image_id), model_id or None)
        if row is None:
            raise _unknown()
        return JSONResponse(row)

    async def _source_pixels(self, request: Request, engine: EngineOf, image_id: int, first: First = 0) -> Response:
        """The image of one row, read from the archive in the version that was scored.

        Only objects that a table names are read.
        """
        with request.app.state.admission.admit():
            place = await run_in_threadpool(self._from_tables, worklist.address, _id(image_id))
            if place is None:
                raise _unknown()
            try:
                parts = await run_in_threadpool(read_source, *place, self._settings.decode.max_bytes)
            except NotOpenableError as error:
                raise RequestError(409, error.code, str(error)) from None
            except StorageError as error:
                raise _of_storage_error(error) from None
            return await self._encoded(engine, parts, first)

    def _from_tables(self, ask: Callable[..., ResultT], *details: Any) -> ResultT:
        output = self._settings.worklist
        if output is None:
            raise RequestError(404, "no_tables", "This server was started without tables to show (`worklist`).")
        try:
            return functools.partial(ask, output)(*details)
        except StorageError:
            sentence = "The tables could not be read."
            raise RequestError(503, "tables_unreadable", sentence, retry_after_seconds=10) from None


def _of_storage_error(error: StorageError) -> RequestError:
    """The archive's refusal with our sentence for its code; the error's own may quote an address."""
    known = error.code in {code.value for code in ErrorCode}
    sentence = SENTENCES[ErrorCode(error.code) if known else ErrorCode.READ_ERROR]
    return RequestError(_STORAGE_STATUS.get(error.code, 502), error.code, sentence, stage="read")


def _id(image_id: int) -> int:
    if not 0 <= image_id < 1 << 63:
        raise _unknown()
    return image_id


def _unknown() -> RequestError:
    return RequestError(404, "not_found", "No table names an image of this id.")
