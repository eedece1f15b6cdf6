"""Who may ask: the bearer token, and which host names a request may give."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from medvision_ray.config.serving import HttpConfig
from medvision_ray.errors import UsageError
from medvision_ray.serving.problems import RequestError

_MIN_TOKEN_CHARS = 16
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def load_token(http: HttpConfig, *, needed: bool | None = None) -> str | None:
    """The bearer token, or None where the server listens on loopback alone and none is given.

    Args:
        needed: refuse to go without; None asks the address.

    Raises:
        UsageError: no token is given where one is needed, it is too short, or its file cannot be read.
    """
    token: str | None
    if http.token_file is not None:
        try:
            token = Path(http.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError("Expected a readable text file at `http.token_file`, but it cannot be read.") from None
    else:
        token = os.environ.get(http.token_env, "").strip() or None
    if token is None:
        if not http.on_loopback if needed is None else needed:
            raise UsageError(
                f"Expected a bearer token in {http.token_env} or `http.token_file`: without one the server answers this "
                'machine only. Make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`.'
            )
        return None
    if len(token) < _MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"Expected a bearer token of at least {_MIN_TOKEN_CHARS} plain ASCII characters.")
    return token


_bearer = HTTPBearer(auto_error=False, description="The server's token; not needed where it has none (loopback only).")


async def authorised(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> None:
    """A dependency: refuses requests without the server's token, compared in constant time.

    Raises:
        RequestError: 401.
    """
    token: str | None = request.app.state.token
    if token is None:
        return
    offered = given.credentials if given is not None else ""
    if not hmac.compare_digest(offered.encode("utf-8", "surrogateescape"), token.encode()):
        raise RequestError(401, "unauthorized", "Expected the server's bearer token in the Authorization header.")


def allowed_hosts(http: HttpConfig, token: str | None) -> tuple[str, ...]:
    """Host names that requests may give; empty is any.

    Without a token, a page on the web could otherwise reach the server through a name that it makes
    the browser resolve to this machine (DNS rebinding).
    """
    return http.allowed_hosts or (() if token is not None else LOOPBACK_HOSTS)


def host_is_allowed(header: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header, with or without a port, names an allowed host."""
    host = header.lower()
    if not host.endswith("]"):
        name, _, port = host.rpartition(":")
        host = name if name and port.isdigit() else host
    return not allowed or host in allowed
