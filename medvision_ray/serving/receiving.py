"""The body of a request: one object, raw or in a form, counted while it arrives and kept in memory alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from medvision_ray.imaging.dicom import looks_like_dicom
from medvision_ray.imaging.nifti import looks_like_nifti
from medvision_ray.imaging.raster import raster_format
from medvision_ray.serving.admission import Admitted
from medvision_ray.serving.problems import RequestError

RAW_TYPES = {
    "application/dicom": ("dicom",),
    "image/png": ("png",),
    "image/jpeg": ("jpeg",),
    "image/tiff": ("tiff",),
    "image/bmp": ("bmp",),
    "application/gzip": ("nifti",),
    "application/octet-stream": (),
}
"""Content types of raw bodies, and the formats that may be in them; none is any, told by content."""
FORM_TYPE = "multipart/form-data"
_FORM_BYTES = 64 << 10  # of a form around its file
_FIELDS = 8


async def receive(request: Request, max_bytes: int, seconds: float, admitted: Admitted) -> tuple[bytes, str]:
    """Read the object out of a request.

    Returns:
        Its bytes and its format, told by content: `dicom`, `nifti`, `png`, `jpeg`, `tiff` or `bmp`.

    Raises:
        RequestError: 400, 408, 413, 415 or 429.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in RAW_TYPES and kind != FORM_TYPE:
        raise RequestError(415, "unsupported_media_type", f"Expected one of {', '.join([*RAW_TYPES, FORM_TYPE])}.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes + (_FORM_BYTES if kind == FORM_TYPE else 0):
        raise _too_large(max_bytes)
    reading = _form(request, max_bytes, admitted) if kind == FORM_TYPE else _raw(request, max_bytes, admitted)
    try:
        data = await asyncio.wait_for(reading, seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise RequestError(408, "body_timeout", f"The body did not arrive within {seconds:g} s.") from None
    except ClientDisconnect:
        raise RequestError(400, "body_incomplete", "The connection ended before the body did.") from None
    if not data:
        raise RequestError(400, "empty_file", "The object holds no bytes.", stage="read")
    found = sniff(data)
    if found is None:
        raise RequestError(415, "unsupported_format", "The content is not DICOM, NIfTI, PNG, JPEG, TIFF or BMP.")
    if RAW_TYPES.get(kind) and found not in RAW_TYPES[kind]:
        raise RequestError(415, "content_type_mismatch", f"Expected content of type {kind}, but it is {found}.")
    return data, found


def sniff(data: bytes) -> str | None:
    """The format of an object by its first bytes, in the order that `imaging.decode` looks; None for another."""
    if data[128:132] == b"DICM":
        return "dicom"
    kind = raster_format(data)
    if kind:
        return kind
    if looks_like_nifti(data):
        return "nifti"
    return "dicom" if looks_like_dicom(data) else None


async def _counted(request: Request, limit: int, told: int, admitted: Admitted) -> AsyncGenerator[bytes, None]:
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _too_large(told)
        admitted.take(len(chunk))
        yield chunk


async def _raw(request: Request, max_bytes: int, admitted: Admitted) -> bytes:
    body = bytearray()
    async for chunk in _counted(request, max_bytes, max_bytes, admitted):
        body += chunk
    return bytes(body)


async def _form(request: Request, max_bytes: int, admitted: Admitted) -> bytes:
    stream = _counted(request, max_bytes + _FORM_BYTES, max_bytes, admitted)
    parser = MultiPartParser(Headers(raw=request.headers.raw), stream, max_files=1, max_fields=_FIELDS)
    parser.spool_max_size = max_bytes + _FORM_BYTES + 1  # never to a disk: it is a patient's image
    try:
        form = await parser.parse()
    except MultiPartException:
        raise RequestError(400, "bad_form", "Expected multipart/form-data with one file, but it is not.") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise RequestError(400, "bad_form", f"Expected one file in the form, but got {len(files)}.")
    data = await files[0].read()
    await files[0].close()
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "too_large", f"The object is over the limit of {limit} bytes.", stage="read")
