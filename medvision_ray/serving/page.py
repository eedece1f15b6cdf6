"""The viewer page and its parts, as built into the package; nothing of it comes from elsewhere."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_router() -> APIRouter:
    """`/` and `/assets/*`. They hold no data and need no token; what they fetch does."""
    router = APIRouter(include_in_schema=False)
    for name, content in _parts().items():
        path = "/" if name == "index.html" else f"/assets/{name}"
        router.add_api_route(path, _giver(content, _TYPES["." + name.rsplit(".", 1)[1]]), methods=["GET", "HEAD"])
    return router


def _parts() -> dict[str, bytes]:
    folder = resources.files("medvision_ray.serving") / "static"
    parts = {item.name: item for item in (*folder.iterdir(), *(folder / "assets").iterdir())}
    return {name: item.read_bytes() for name, item in parts.items() if "." + name.rsplit(".", 1)[-1] in _TYPES}


def _giver(content: bytes, media_type: str):  # type: ignore[no-untyped-def] # the signature is what FastAPI reads
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    async def give(request: Request) -> Response:
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return give
