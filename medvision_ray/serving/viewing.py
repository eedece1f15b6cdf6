"""What the viewer page asks for beside predictions: pixels of an uploaded file, the worklist, and its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from medvision_ray.config import DecodeConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import SENTENCES, DecodeError, ErrorCode
from medvision_ray.serving import worklist
from medvision_ray.serving.decoder_process import DecoderPool, DecodersBusy, Excerpt
from medvision_ray.serving.pixel_format import MEDIA_TYPE
from medvision_ray.serving.source_object import NotOpenable, read_source

_ANSWER_BYTES = 64 << 20
_MOST_ROWS = 200
_PRIVATE = {"Cache-Control": "no-store"}
_STORAGE_STATUS = {"not_found": 404, "too_large": 413, "changed_while_reading": 409}

First = Annotated[int, Query(ge=0, description="First frame wanted; as many follow as fit into 64 MiB.")]
Session = Annotated[
    str,
    Query(
        pattern="^[0-9a-f]{32}$|^$",
        description="Random, made by the page: slices of one series get the same name within a session only.",
    ),
]


class Problem(Exception):
    """An answer that is an error (RFC 9457)."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers

    def response(self) -> JSONResponse:
        """As `application/problem+json`."""
        content = {"type": "about:blank", "status": self.status, "code": self.code, "detail": self.detail}
        headers = {**_PRIVATE, **(self.headers or {})}
        return JSONResponse(content, self.status, headers, media_type="application/problem+json")


class Viewing:
    """The routes and the decoders behind them.

    Args:
        decode: limits of one object; the same as in scoring, so that what is shown is what was scored.
        output: the place whose tables the worklist reads; None where there is none.
        decoders: how many objects are decoded at once.
    """

    def __init__(self, decode: DecodeConfig, output: str | None = None, decoders: int = 2) -> None:
        self._decode = decode
        self._output = output
        self._pool = DecoderPool(decode, decoders)
        self.router = self._routes()

    def close(self) -> None:
        """End the decoders."""
        self._pool.close()

    def _routes(self) -> APIRouter:
        router = APIRouter(tags=["viewer"])
        answers: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {}}}}
        router.add_api_route("/v1/pixels", self._pixels, methods=["POST"], responses=answers, response_class=Response)
        router.add_api_route("/v1/worklist", self._worklist, methods=["GET"], response_model=None)
        router.add_api_route("/v1/worklist/choices", self._choices, methods=["GET"], response_model=None)
        router.add_api_route("/v1/worklist/{image_id}", self._record, methods=["GET"], response_model=None)
        router.add_api_route(
            "/v1/worklist/{image_id}/pixels",
            self._source_pixels,
            methods=["GET"],
            responses=answers,
            response_class=Response,
        )
        return router

    async def _pixels(self, request: Request, first: First = 0, session: Session = "") -> Response:
        """Stored values of an uploaded DICOM, NIfTI, PNG, JPEG, TIFF or BMP file, and how to show them."""
        try:
            content = await self._body(request)
            return await run_in_threadpool(self._encoded, lambda: [content], Excerpt(first, _ANSWER_BYTES, session))
        except Problem as problem:
            return problem.response()

    async def _body(self, request: Request) -> bytes:
        limit = self._decode.max_bytes
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise Problem(413, "too_large", f"{SENTENCES[ErrorCode.TOO_LARGE]} (limit_bytes={limit})")
        return bytes(content)

    def _encoded(self, parts: Callable[[], list[bytes]], excerpt: Excerpt) -> Response:
        try:
            content = self._pool.pixels(parts(), excerpt)
        except DecodeError as error:
            status = 413 if error.code is ErrorCode.TOO_LARGE else 422
            return Problem(status, error.code.value, str(error)).response()
        except DecodersBusy:
            return Problem(503, "busy", "All decoders are at work; try again.", {"Retry-After": "5"}).response()
        except NotOpenable as error:
            return Problem(409, error.code, str(error)).response()
        except StorageError as error:
            known = error.code in ErrorCode._value2member_map_
            sentence = SENTENCES[ErrorCode(error.code) if known else ErrorCode.READ_ERROR]  # not its own: it may quote an address
            return Problem(_STORAGE_STATUS.get(error.code, 502), error.code, sentence).response()
        return Response(content, media_type=MEDIA_TYPE, headers=_PRIVATE)

    def _worklist(
        self,
        table: Literal["predictions", "failures"] = "predictions",
        run_key: Annotated[str | None, Query(max_length=200)] = None,
        nights: Annotated[int, Query(ge=1, le=3660, description="Days up to the newest run; without `run_key`.")] = (
            worklist.DEFAULT_NIGHTS
        ),
        model_id: Annotated[str | None, Query(max_length=200)] = None,
        label: Annotated[str | None, Query(max_length=200, description="Predicted class or present finding.")] = None,
        modality: Annotated[str | None, Query(max_length=16)] = None,
        min_probability: Annotated[float | None, Query(ge=0, le=1, description="Of `label`, else of the prediction.")] = None,
        max_probability: Annotated[float | None, Query(ge=0, le=1)] = None,
        error_code: Annotated[str | None, Query(max_length=64)] = None,
        order: Literal["newest", "probability", "uncertain"] = "newest",
        offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=_MOST_ROWS)] = 50,
    ) -> Response:
        """Rows of the predictions or failures table, a page at a time."""
        query = worklist.Query(
            table,
            run_key or None,
            nights,
            model_id or None,
            label or None,
            modality or None,
            min_probability,
            max_probability,
            error_code or None,
            order,
            offset,
            limit,
        )
        return self._from_tables(lambda output: worklist.page(output, query))

    def _choices(self, nights: Annotated[int, Query(ge=1, le=3660)] = worklist.DEFAULT_NIGHTS) -> Response:
        """What the worklist can be filtered by."""
        return self._from_tables(lambda output: worklist.choices(output, nights))

    def _record(self, image_id: int, model_id: Annotated[str | None, Query(max_length=200)] = None) -> Response:
        """One row with its mask as contours."""

        def found(output: str) -> dict[str, Any]:
            row = worklist.record(output, _id(image_id), model_id)
            if row is None:
                raise Problem(404, "not_found", "No table names an image of this id.")
            return row

        return self._from_tables(found)

    def _source_pixels(self, image_id: int, first: First = 0) -> Response:
        """The image of one row, read from the archive: only objects that a table names, in the version that was scored."""
        try:
            place = worklist.address(self._tables(), _id(image_id))
        except StorageError:
            return _unreadable().response()
        except Problem as problem:
            return problem.response()
        if place is None:
            return Problem(404, "not_found", "No table names an image of this id.").response()
        return self._encoded(lambda: read_source(*place, self._decode.max_bytes), Excerpt(first, _ANSWER_BYTES))

    def _from_tables(self, ask: Callable[[str], dict[str, Any]]) -> Response:
        try:
            return JSONResponse(ask(self._tables()), headers=_PRIVATE)
        except Problem as problem:
            return problem.response()
        except StorageError:
            return _unreadable().response()

    def _tables(self) -> str:
        if self._output is None:
            raise Problem(404, "no_tables", "This server was started without tables to show (`output`).")
        return self._output


def _id(image_id: int) -> int:
    if not 0 <= image_id < 1 << 63:
        raise Problem(404, "not_found", "No table names an image of this id.")
    return image_id


def _unreadable() -> Problem:
    return Problem(503, "tables_unreadable", "The tables could not be read.", {"Retry-After": "10"})
