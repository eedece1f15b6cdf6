"""An S3 endpoint that misbehaves on order: it stands before a real one and injects faults by a script.

A fault strikes a request when its operation and its key match. Which keys and which calls it strikes is a function
of the seed, the key and how often the key was asked for, never of the order in which threads come, so that a run
with the same seed meets the same faults. The proxy counts what it did; a test asserts that the faults happened.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

OPERATIONS = ("GET", "PUT", "HEAD", "LIST", "DELETE", "MULTIPART")

# kind -> (status, code): an answer with S3's error document and nothing done in the store.
ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "request_timeout": (400, "RequestTimeout"),
    "access_denied": (403, "AccessDenied"),
    "expired_token": (400, "ExpiredToken"),
    "invalid_access_key": (403, "InvalidAccessKeyId"),
    "signature": (403, "SignatureDoesNotMatch"),
    "skewed": (403, "RequestTimeTooSkewed"),
}
# What goes wrong on the connection, before the store is asked or after, or with the object itself.
DISTURBANCES = (
    "reset",  # RST before any byte of the answer; the store was not asked
    "lost_answer",  # the store did it, then RST
    "reset_half_way",  # RST in the middle of the body
    "short_read",  # Content-Length says more than comes; then a plain close
    "short_chunked",  # chunked, closed before the last chunk
    "stall",  # silence for `seconds` before the answer
    "stall_half_way",  # silence for `seconds` in the middle of the body
    "trickle",  # a hundredth of the body every tenth of a second
    "deleted",  # the object is gone when the read comes
    "changed",  # another version is in place when the read comes
    "changed_half_way",  # RST in the middle of the body, and another version is in place afterwards
    "wrong_bytes",  # the right length, other bytes
    "latency",  # `seconds` later, and right
)
_SIGNED = ("host", "authorization")


@dataclass(frozen=True)
class Fault:
    """One line of the script.

    Attributes:
        kind: a name of `ANSWERS` or `DISTURBANCES`.
        operations: which of `OPERATIONS` it strikes; empty is all.
        keys: regular expression searched in BUCKET/KEY (BUCKET/PREFIX for a listing).
        access_key: strikes only who signs with it; empty is all.
        share: fraction of keys that are struck at all.
        chance: fraction of the calls of such a key.
        first: at most so many calls of a key; None is without end.
        after: spare so many matching calls at first.
        total: at most so many calls in all.
        rate: strike only what comes faster than so many requests a second.
        seconds: how long a stall or the latency lasts.
        retry_after: seconds in a Retry-After header.
    """

    kind: str
    operations: tuple[str, ...] = ()
    keys: str = ""
    access_key: str = ""
    share: float = 1.0
    chance: float = 1.0
    first: int | None = None
    after: int = 0
    total: int | None = None
    rate: float | None = None
    seconds: float = 0.0
    retry_after: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ANSWERS and self.kind not in DISTURBANCES:
            raise ValueError(f"Expected a kind of {sorted((*ANSWERS, *DISTURBANCES))}, but got {self.kind}.")
        if not set(self.operations) <= set(OPERATIONS):
            raise ValueError(f"Expected operations of {OPERATIONS}, but got {self.operations}.")


def operation_of(method: str, path: str, query: dict[str, list[str]]) -> str:
    """Which of `OPERATIONS` a request is."""
    if {"uploads", "uploadId"} & set(query):
        return "MULTIPART"
    if method == "POST" and "delete" in query:
        return "DELETE"
    if method == "GET" and "/" not in path.strip("/"):
        return "LIST"
    return method


class S3Proxy:
    """Forwards to an S3 endpoint; `script` may be replaced between two tests."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.seed = seed
        self.requests: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.calls: list[tuple[float, str, str, str]] = []
        self._lock = threading.Lock()
        self._script: tuple[Fault, ...] = ()
        self._asked: Counter[tuple[int, str]] = Counter()
        self._hits: Counter[tuple[int, str]] = Counter()
        self._tokens: dict[int, tuple[float, float]] = {}
        self._server = _Server(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self, "connections": threading.local()})
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def play(self, *script: Fault, seed: int | None = None) -> None:
        """Replace the script and forget the counts."""
        with self._lock:
            self._script = script
            self.seed = self.seed if seed is None else seed
            for counter in (self.requests, self.struck, self._asked, self._hits):
                counter.clear()
            self._tokens.clear()
            self.calls.clear()

    def struck_keys(self, fault: Fault, keys: Sequence[str]) -> set[str]:
        """Which of these keys (BUCKET/KEY) a fault with a `share` strikes."""
        return {key for key in keys if re.search(fault.keys, key) and self._fraction(fault.kind, key) < fault.share}

    def fault_for(self, operation: str, key: str, signature: str) -> Fault | None:
        """The first line of the script that strikes this request, counted."""
        with self._lock:
            self.requests[operation] += 1
            script = enumerate(self._script)
            struck = next(
                (f for i, f in script if f.access_key in signature and self._strikes(i, f, operation, key)), None
            )
            if struck is not None:
                self.struck[struck.kind] += 1
            self.calls.append((time.monotonic(), operation, key, struck.kind if struck else ""))
            return struck

    def _strikes(self, index: int, fault: Fault, operation: str, key: str) -> bool:
        if fault.operations and operation not in fault.operations:
            return False
        if not re.search(fault.keys, key) or self._fraction(fault.kind, key) >= fault.share:
            return False
        nth = self._asked[index, key]
        self._asked[index, key] += 1
        self._asked[index, ""] += 1
        if self._asked[index, ""] <= fault.after:
            return False
        if fault.chance < 1 and self._fraction(f"{fault.kind}#{nth}", key) >= fault.chance:
            return False
        if fault.first is not None and self._hits[index, key] >= fault.first:
            return False
        if fault.total is not None and self._hits[index, ""] >= fault.total:
            return False
        if fault.rate is not None and self._token(index, fault.rate):
            return False
        self._hits[index, key] += 1
        self._hits[index, ""] += 1
        return True

    def _token(self, index: int, rate: float) -> bool:
        """Whether a request is within the rate; a tenth of a second may be saved up."""
        now = time.monotonic()
        tokens, last = self._tokens.get(index, (max(1.0, rate / 10), now))
        tokens = min(max(1.0, rate / 10), tokens + (now - last) * rate)
        self._tokens[index] = (tokens - 1 if tokens >= 1 else tokens, now)
        return tokens >= 1

    def _fraction(self, what: str, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}|{what}|{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.aborted: set[socket.socket] = set()

    def shutdown_request(self, request: Any) -> None:
        if request in self.aborted:  # no FIN: with SO_LINGER 0 the close sends RST
            self.aborted.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[S3Proxy]
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    connections: ClassVar[threading.local]

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        operation = operation_of(self.command, parts.path, query)
        key = unquote(parts.path).strip("/")
        if operation == "LIST":
            key = f"{key}/{query.get('prefix', [''])[0]}"
        body = self._request_body()
        fault = self.proxy.fault_for(operation, key, self.headers.get("Authorization", ""))
        if fault is None or fault.kind == "latency":
            time.sleep(fault.seconds if fault else 0)
            self._answer(*self._forward(body))
        elif fault.kind in ANSWERS:
            self._refuse(fault, key)
        else:
            self._disturb(fault, body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

    def _request_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _forward(self, body: bytes, method: str = "", only: Sequence[str] = ()) -> tuple[int, Any, bytes]:
        """What the store answers; a connection that it has closed since is opened again once."""
        drop = ("expect", "transfer-encoding", "connection", "content-length")
        sent = {k: v for k, v in self.headers.items() if k.lower() not in drop and (not only or k.lower() in only)}
        sent["Content-Length"] = str(len(body))
        for last in (False, True):
            connection = getattr(self.connections, "open", None) or http.client.HTTPConnection(self.proxy.upstream)
            try:
                connection.request(method or self.command, self.path, body, sent)
                answer = connection.getresponse()
                content = answer.read()
            except (http.client.HTTPException, ConnectionError):
                connection.close()
                self.connections.open = None
                if last:
                    raise
                continue
            self.connections.open = connection
            return answer.status, answer.headers, content
        raise AssertionError("unreachable")

    def _head(self, status: int, headers: Any, length: int | None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        elif self.command == "HEAD" and "Content-Length" in headers:
            self.send_header("Content-Length", headers["Content-Length"])
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer(self, status: int, headers: Any, content: bytes) -> None:
        self._head(status, headers, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, fault: Fault, key: str) -> None:
        status, code = ANSWERS[fault.kind]
        document = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code} by order</Message>'
            f"<Resource>/{key}</Resource><RequestId>0</RequestId></Error>"
        )
        headers = {"Content-Type": "application/xml"}
        if fault.retry_after is not None:
            headers["Retry-After"] = str(fault.retry_after)
        self._answer(status, headers, document.encode())

    def _disturb(self, fault: Fault, body: bytes) -> None:
        if fault.kind in ("stall", "reset"):
            time.sleep(fault.seconds if fault.kind == "stall" else 0)
            return self._abort()
        if fault.kind in ("changed", "deleted"):
            self._replace() if fault.kind == "changed" else self._forward(b"", "DELETE", _SIGNED)
            return self._answer(*self._forward(body))
        status, headers, content = self._forward(body)
        if fault.kind == "lost_answer":
            return self._abort()
        if fault.kind == "wrong_bytes":
            return self._answer(status, headers, bytes(byte ^ 1 for byte in content))
        half = content[: len(content) // 2]
        if fault.kind == "short_chunked":
            self._head(status, headers, None)
            self.wfile.write(f"{len(half):x}\r\n".encode() + half + b"\r\n" if half else b"")
            self.close_connection = True
            return None
        self._head(status, headers, len(content))
        if fault.kind == "trickle":
            return self._trickle(content)
        self.wfile.write(half)
        if fault.kind == "short_read":
            self.close_connection = True
            return None
        if fault.kind == "changed_half_way":
            self._replace()
        time.sleep(fault.seconds if fault.kind == "stall_half_way" else 0.05)  # let the first half arrive
        return self._abort()

    def _trickle(self, content: bytes) -> None:
        step = max(1, len(content) // 100)
        for place in range(0, len(content), step):
            self.wfile.write(content[place : place + step])
            time.sleep(0.1)

    def _replace(self) -> None:
        """Put another version of the object that is asked for in its place."""
        _, _, content = self._forward(b"", "GET", _SIGNED)
        self._forward(content + b"\0", "PUT", _SIGNED)

    def _abort(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.aborted.add(self.connection)
        self.close_connection = True
