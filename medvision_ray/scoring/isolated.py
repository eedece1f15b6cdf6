"""Prepare suspect objects in a process of their own, with limits on its time and memory.

The child (`python -m medvision_ray.scoring.isolated`) reads one JSON line of settings and then one
JSON line per object on standard input; for each it answers one JSON line and the pixels as raw
bytes. Nothing is pickled. A child that dies or is too slow costs the one object it worked on.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import resource
import selectors
import subprocess
import sys
import time
from typing import IO, Any

import numpy as np

from medvision_ray.config import DecodeConfig, PreprocessConfig
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.objects import Effort, ObjectReader, PreparedObject

_START_SECONDS = 60.0
_OUT_OF_MEMORY_STATUS = 86


class IsolatedReader:
    """Prepares objects in a child process that is started when needed and replaced when it dies."""

    def __init__(self, reader: ObjectReader) -> None:
        self._reader = reader
        self._child: subprocess.Popen[bytes] | None = None

    def prepare(self, uri: str, etag: str, effort: Effort) -> PreparedObject:
        """Read, decode and prepare one object.

        Args:
            effort: is filled in; of a child that died only the time is known, and counted as decoding.

        Raises:
            DecodeError: as in-process, and TIMEOUT, WORKER_CRASH or OUT_OF_MEMORY where the child
                was too slow or died.
        """
        child = self._child or self._start()
        started = time.monotonic()
        deadline = started + self._reader.decode.max_seconds
        try:
            _send(child.stdin, {"uri": uri, "etag": etag})
            answer = json.loads(_receive_line(child.stdout, deadline))
            for name, value in answer["effort"].items():
                setattr(effort, name, value)
            if "code" in answer:
                raise DecodeError(ErrorCode(answer["code"]), Stage(answer["stage"]), **answer["facts"])
            pixels = _receive(child.stdout, int(np.prod(answer["shape"])), deadline)
        except TimeoutError:
            effort.decode_seconds = time.monotonic() - started
            self.close()
            raise DecodeError(ErrorCode.TIMEOUT, limit_seconds=self._reader.decode.max_seconds) from None
        except (EOFError, BrokenPipeError):
            effort.decode_seconds = time.monotonic() - started
            status = child.wait()
            self._child = None
            code = ErrorCode.OUT_OF_MEMORY if status == _OUT_OF_MEMORY_STATUS else ErrorCode.WORKER_CRASH
            raise DecodeError(code, exit_status=status) from None
        return PreparedObject.from_facts(answer, pixels)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "medvision_ray.scoring.isolated"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        key = self._reader.pseudonymiser.key if self._reader.pseudonymiser else None
        settings = {
            "decode": self._reader.decode.model_dump(mode="json"),
            "preprocess": self._reader.preprocess.model_dump(mode="json"),
            "key": base64.b64encode(key).decode() if key else None,
        }
        _send(self._child.stdin, settings)
        _receive_line(self._child.stdout, time.monotonic() + _START_SECONDS)
        return self._child


def _send(stream: IO[bytes] | None, message: dict[str, Any]) -> None:
    if stream is None:
        raise BrokenPipeError
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _receive(stream: IO[bytes] | None, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes; the pipe is read unbuffered so that `select` tells the truth."""
    if stream is None:
        raise EOFError
    parts = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(parts) < count:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(stream.fileno(), min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
    return bytes(parts)


def _receive_line(stream: IO[bytes] | None, deadline: float) -> bytes:
    size = int.from_bytes(_receive(stream, 4, deadline), "big")
    return _receive(stream, size, deadline)


def _answer(message: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(message).encode()
    out = sys.stdout.buffer
    out.write(len(text).to_bytes(4, "big") + text + payload)
    out.flush()


def _serve() -> None:
    import cv2

    cv2.setNumThreads(1)
    settings = json.loads(sys.stdin.buffer.readline())
    config = DecodeConfig.model_validate_json(json.dumps(settings["decode"]))
    limit = config.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    key = base64.b64decode(settings["key"]) if settings["key"] else None
    preprocess = PreprocessConfig.model_validate_json(json.dumps(settings["preprocess"]))
    reader = ObjectReader(config, preprocess, Pseudonymiser(key) if key else None)
    _answer({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        effort = Effort()
        try:
            ready = reader.prepare(reader.read(request["uri"], request["etag"], effort), effort)
        except DecodeError as error:
            reason = {"code": error.code.value, "stage": error.stage.value, "facts": error.facts}
            _answer({**reason, "effort": dataclasses.asdict(effort)})
            continue
        except MemoryError:
            os._exit(_OUT_OF_MEMORY_STATUS)
        _answer({**ready.facts(), "effort": dataclasses.asdict(effort)}, np.ascontiguousarray(ready.pixels).tobytes())


if __name__ == "__main__":
    _serve()
