"""A loopback S3 in a process of its own that can stop at a chosen write request until it is let go.

The n-th write of a run is a better random moment than the n-th second: each step between two
states of the store is hit as often as any other, on a fast machine as on a slow one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

WRITES = ("PUT", "POST", "DELETE")
_HOLD_SECONDS = 600.0


@dataclass
class _Gate:
    """WSGI middleware: counts writes, and holds the one that is asked for."""

    app: Callable[..., Iterable[bytes]]
    tell: Callable[[Any], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    seen: list[str] = field(default_factory=list)
    pattern: str = ""
    number: int = 0
    drop: bool = False
    onwards: bool = False

    def arm(self, pattern: str, number: int, drop: bool, onwards: bool) -> None:
        with self.lock:
            self.seen, self.pattern, self.number, self.drop, self.onwards = [], pattern, number, drop, onwards
            self.released.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in WRITES:
            return self.app(environ, start_response)
        name = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self.lock:
            matches = re.search(self.pattern, name) is not None
            if matches:
                self.seen.append(name)
            first = matches and len(self.seen) == self.number
            later = matches and self.onwards and len(self.seen) > self.number > 0
        if not first and not later:
            return self.app(environ, start_response)
        answer = None if self.drop else list(self.app(environ, start_response))
        if first:
            self.tell(name)
        self.released.wait(_HOLD_SECONDS)
        if answer is None:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        return answer


def _serve(pipe: Connection) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.server import MotoRequestHandler
    from werkzeug.serving import make_server

    sending = threading.Lock()

    def tell(message: Any) -> None:
        with sending:
            pipe.send(message)

    class Quiet(MotoRequestHandler):
        def log_request(self, *_arguments: object) -> None:
            """Thousands of requests a minute would bury the test's own words."""

    gate = _Gate(DomainDispatcherApplication(create_backend_app), lambda name: tell(("hit", name)))
    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tell(("ready", f"http://127.0.0.1:{server.server_port}"))
    while True:
        command, *arguments = pipe.recv()
        if command == "arm":
            gate.arm(*arguments)
            tell(("armed", None))
        elif command == "release":
            gate.released.set()
        elif command == "seen":
            tell(("seen", list(gate.seen)))
        elif command == "stop":
            return


class Store:
    """The S3; `endpoint` is its address. One thread may use it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        self._hit: str | None = None
        self.endpoint: str = self._answer("ready")

    def arm(self, pattern: str = "", number: int = 0, *, drop: bool = False, onwards: bool = False) -> None:
        """Count writes that match a pattern from now on, and hold the `number`-th (0: none).

        Args:
            drop: answer the held write with 503 instead of doing it; else it is done before it is held.
            onwards: hold all that come after the `number`-th too.
        """
        self._pipe.send(("arm", pattern, number, drop, onwards))
        self._answer("armed")
        self._hit = None

    def held(self) -> str | None:
        """Method and path of the write that is held, or None."""
        while self._hit is None and self._pipe.poll():
            self._hit = self._pipe.recv()[1]
        return self._hit

    def release(self) -> None:
        """Let the held write go."""
        self._pipe.send(("release",))

    def seen(self) -> list[str]:
        """The writes since `arm` that matched its pattern."""
        self._pipe.send(("seen",))
        answer: list[str] = self._answer("seen")
        return answer

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(("stop",))
        self._process.join(10)
        self._process.kill()

    def _answer(self, kind: str) -> Any:
        while True:
            got, value = self._pipe.recv()
            if got == kind:
                return value
            self._hit = value
