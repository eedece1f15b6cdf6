"""What a site's operators configure: how a job logs, and whom it tells how it ended."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from medvision_ray.config.sections import Section


class LoggingConfig(Section):
    """What standard error carries. `--log-format` and MEDVISION_LOG_FORMAT win over `format`."""

    format: Literal["text", "json"] = "text"
    """`text` for people; `json` is one JSON object a line (docs/operations.md)."""
    level: Literal["info", "warning", "error"] = "info"
    """The least severe lines that are written; progress is `info`."""


class OnFinishConfig(Section):
    """Whom to tell how the job ended. What goes wrong here is logged and never changes the job's exit code."""

    command: tuple[str, ...] = ()
    """Program and arguments, run without a shell; the result is JSON on its standard input. Not a place for secrets."""
    webhook: SecretStr | None = None
    """URL that the result is posted to as JSON: https, or http on this machine. Shown as `**********` everywhere."""
    token_env: str | None = None
    """Environment variable that holds the webhook's bearer token."""
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Longest time for the command, and for each of the webhook's three tries."""
    when: Literal["always", "failure"] = "always"
    """`failure`: only when the exit code is not 0."""
    allow_http: bool = False
    """Let the webhook be plain http to another machine: result and token are readable on the way."""

    @model_validator(mode="after")
    def _consistent(self) -> OnFinishConfig:
        if self.command and not self.command[0]:
            raise ValueError("`command` must begin with the name or path of a program")
        if self.token_env is not None and self.webhook is None:
            raise ValueError("`token_env` is the webhook's and needs `webhook`")
        if self.webhook is not None:
            _check_address(self.webhook.get_secret_value(), self.allow_http)
        return self

    @property
    def wanted(self) -> bool:
        """Whether anybody is to be told."""
        return bool(self.command) or self.webhook is not None


def _check_address(url: str, allow_http: bool) -> None:
    """Refuse what would send the result anywhere but to one host over TLS; the address itself is never quoted."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = None, None, None
    if parts is None or parts.scheme not in ("http", "https") or not host or port == 0 or not url.isprintable():
        raise ValueError("`webhook` must be a URL such as https://HOST/PATH")
    if " " in url or not url.isascii():
        raise ValueError("`webhook` must be plain ASCII without blanks; percent-encode other characters")
    if parts.username is not None or parts.password is not None:
        raise ValueError("`webhook` must hold no user and password; give a token through `token_env`")
    if parts.scheme == "http" and not allow_http and not _is_loopback(host):
        raise ValueError("`webhook` must be https, or http on this machine; `allow_http: true` sends it readable")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
