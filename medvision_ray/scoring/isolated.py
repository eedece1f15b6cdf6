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

from medvision_ray.config import DecodeConfig, PreprocessConfig, PrivacyConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.objects import Effort, ObjectReader, PreparedObject

_START_SECONDS = 60.0
_OUT_OF_MEMORY_STATUS = 86
_NO_STORE_STATUS = 87


class IsolatedReader:
    """Prepares objects in a child process that is started when needed and replaced when it dies."""

    def __init__(self, reader: ObjectReader) -> None:
        self._reader = reader
        self._child: subprocess.Popen[bytes] | None = None

    def prepare(self, uri: str, etag: str, effort: Effort) -> PreparedObject:
        """`prepare_entry` of an object by itself."""
        return self.prepare_entry({"uri": uri, "etag": etag}, effort)

    def prepare_entry(self, entry: dict[str, Any], effort: Effort) -> PreparedObject:
        """Read, decode and prepare what one inventory row stands for.

        Args:
            effort: is filled in; of a child that died only the time is known, and counted as decoding.

        Raises:
            StorageError: as in-process.
            DecodeError: as in-process, and TIMEOUT, WORKER_CRASH or OUT_OF_MEMORY where the child
                was too slow or died.
        """
        child = self._living_child()
        started = time.monotonic()
        deadline = started + self._reader.decode.max_seconds
        try:
            _send(child.stdin, {name: entry.get(name) for name in ("uri", "etag", "size", "members")})
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
            self.close()
            code = ErrorCode.OUT_OF_MEMORY if status == _OUT_OF_MEMORY_STATUS else ErrorCode.WORKER_CRASH
            raise DecodeError(code, exit_status=status) from None
        except DecodeError:
            raise
        except BaseException:  # half an answer may be in the pipe: the next object must not read it
            self.close()
            raise
        return PreparedObject.from_facts(answer, pixels)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def _living_child(self) -> subprocess.Popen[bytes]:
        """The child, started where there is none or it died after its last answer."""
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        try:
            return self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "medvision_ray.scoring.isolated"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        keys = self._reader.pseudonymiser
        settings = {
            "decode": self._reader.decode.model_dump(mode="json"),
            "preprocess": self._reader.preprocess.model_dump(mode="json"),
            "key": base64.b64encode(keys.key).decode() if keys else None,
            "policy": keys.policy.model_dump(mode="json") if keys else None,
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


def _answer(out: IO[bytes], message: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(message).encode()
    out.write(len(text).to_bytes(4, "big") + text + payload)
    out.flush()


def _serve() -> None:
    out = _own_stdout()
    import cv2

    cv2.setNumThreads(1)
    settings = json.loads(sys.stdin.buffer.readline())
    config = DecodeConfig.model_validate_json(json.dumps(settings["decode"]))
    preprocess = PreprocessConfig.model_validate_json(json.dumps(settings["preprocess"]))
    reader = ObjectReader(config, preprocess, _pseudonymiser(settings))
    _limit_memory(config.max_memory_bytes)
    _answer(out, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        effort = Effort()
        try:
            ready = reader.prepare(reader.read_entry(request, effort), effort)
        except DecodeError as error:
            _answer(out, _reason(error, effort))
            continue
        except MemoryError:
            os._exit(_OUT_OF_MEMORY_STATUS)
        except StorageError:
            os._exit(_NO_STORE_STATUS)
        except (Exception, SystemExit) as error:  # a defect of a decoder, as in the worker itself
            defect = DecodeError(ErrorCode.INTERNAL_ERROR, exception=type(error).__name__[:64])
            _answer(out, _reason(defect, effort))
            continue
        pixels = np.ascontiguousarray(ready.pixels).tobytes()
        _answer(out, {**ready.facts(), "effort": dataclasses.asdict(effort)}, pixels)


def _pseudonymiser(settings: dict[str, Any]) -> Pseudonymiser | None:
    if settings["key"] is None:
        return None
    policy = PrivacyConfig.model_validate_json(json.dumps(settings["policy"]))
    return Pseudonymiser(base64.b64decode(settings["key"]), policy)


def _own_stdout() -> IO[bytes]:
    """The pipe to the parent, out of the way of native code that prints."""
    pipe = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return pipe


def _limit_memory(more_bytes: int) -> None:
    """Limit the address space to what is mapped now and so much more; allocations beyond it fail."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        now = 0
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


def _reason(error: DecodeError, effort: Effort) -> dict[str, Any]:
    return {
        "code": error.code.value,
        "stage": error.stage.value,
        "facts": error.facts,
        "effort": dataclasses.asdict(effort),
    }


if __name__ == "__main__":
    _serve()
