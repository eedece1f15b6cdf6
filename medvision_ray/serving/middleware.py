"""Around every request: an id, the host name, headers that keep a browser safe, and no error without an answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medvision_ray.serving.problems import RequestError, problem_response
from medvision_ray.serving.security import host_is_allowed

_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; "
    "script-src 'self' 'wasm-unsafe-eval'; connect-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def request_id_of(scope: Scope) -> str:
    """The id that this middleware gave a request; ids that clients send could name a patient and are not taken."""
    found: str = scope["state"]["request_id"]
    return found


class Guard:
    """ASGI middleware.

    Args:
        hosts: host names that requests may give; empty is any.
        on_defect: is told the request's id and an error that nobody expected.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], on_defect: Callable[[str, Exception], None]) -> None:
        self._app = app
        self._hosts = hosts
        self._on_defect = on_defect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith("/v1/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if not host_is_allowed(Headers(scope=scope).get("host", ""), self._hosts):
            refused = RequestError(400, "unknown_host", "The Host header names no host that this server answers for.")
            await problem_response(refused, request_id)(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # told without its text, which can hold identifiers
            self._on_defect(request_id, error)
            if begun:
                raise RuntimeError("an answer ended early") from None
            defect = RequestError(500, "internal_error", "A defect in medvision_ray; the server's log names its place.")
            await problem_response(defect, request_id)(scope, receive, send_with_headers)
