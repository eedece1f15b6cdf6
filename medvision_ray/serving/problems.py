"""Errors as HTTP answers: problem details (RFC 9457) with the error codes of the failures table."""

from __future__ import annotations

import math
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from medvision_ray.errors import MedVisionError
from medvision_ray.imaging.errors import DecodeError, ErrorCode

MEDIA_TYPE = "application/problem+json"
_STATUS_OF_CODE = {
    ErrorCode.UNSUPPORTED_FORMAT: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.EMPTY_FILE: HTTPStatus.BAD_REQUEST,
}


class Problem(BaseModel):
    """Why a request has no answer (RFC 9457). Its texts hold nothing of the request's content."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    """Always `about:blank`: `code` tells kinds apart."""
    title: str = Field(examples=["Unprocessable Content"])
    """The status in words."""
    status: int = Field(ge=400, le=599, examples=[422])
    """The HTTP status."""
    detail: str = Field(examples=["The object ends before its pixels do."])
    """What was expected and what came."""
    code: str = Field(examples=["truncated"])
    """Stable name of the reason; for objects that could not be decoded, `error_code` of the failures table."""
    stage: str | None = Field(default=None, examples=["decode"])
    """Where the object failed: `read`, `decode`, `preprocess` or `predict`; null for other problems."""
    request_id: str = Field(examples=["5f0c2b1e9a2f4c55a1f0b6f4f2f5d9aa"])
    """32 hexadecimal digits that the server's log has too."""


class RequestError(MedVisionError):
    """A request is refused.

    Args:
        status: the HTTP status, 400 to 599.
        code: stable name of the reason.
        detail: our own sentence; never content of the request.
        retry_after_seconds: when to come again (429, 503).
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        stage: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.stage = stage
        self.retry_after_seconds = retry_after_seconds


def of_decode_error(error: DecodeError) -> RequestError:
    """415 for what is no image format of ours, 400 for no bytes, else 422; the code is the failures table's."""
    status = _STATUS_OF_CODE.get(error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
    return RequestError(status, error.code.value, str(error), stage=error.stage.value)


def problem_response(error: RequestError, request_id: str) -> JSONResponse:
    """The answer to a refused request."""
    status = int(error.status)
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        code=error.code,
        stage=error.stage,
        request_id=request_id,
    )
    headers = {"X-Request-ID": request_id}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return JSONResponse(body.model_dump(), status, headers, media_type=MEDIA_TYPE)
