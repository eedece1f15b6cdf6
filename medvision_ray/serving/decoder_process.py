"""Decoding for the viewer in child processes, where a crash, a hang or a bomb costs one request.

Parent and child talk over a socket pair in messages with a length; nothing is pickled. The child keeps
the image that it decoded last, so that more frames of a long file do not decode it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.volume import decode_series
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.isolated import _limit_memory as limit_memory
from medvision_ray.serving.pixel_format import encode, header_of, ready_to_send

_START_SECONDS = 60.0
_OUT_OF_MEMORY_STATUS = 86


class DecodersBusy(Exception):
    """All decoders have been at work for longer than a request waits."""


@dataclass(frozen=True)
class Excerpt:
    """Which frames of an object are wanted.

    Attributes:
        first: index of the first frame.
        budget_bytes: most bytes of pixels in the answer.
        session: keys the pseudonym by which slices of a series find one another; empty leaves it out.
    """

    first: int = 0
    budget_bytes: int = 64 << 20
    session: str = ""


class DecoderPool:
    """A few child processes that decode; each is started when first needed and replaced when it dies.

    Args:
        config: limits of one object.
        processes: how many work at once.
        wait_seconds: how long a request waits for one of them.
    """

    def __init__(self, config: DecodeConfig, processes: int = 2, wait_seconds: float = 20.0) -> None:
        self._config = config
        self._wait_seconds = wait_seconds
        self._idle = [_Child(config) for _ in range(processes)]
        self._all = tuple(self._idle)
        self._changed = threading.Condition()

    def pixels(self, parts: Sequence[bytes], excerpt: Excerpt) -> bytes:
        """Decode an object, or the slices of a series, to the page's format (`pixel_format`).

        Raises:
            DecodeError: as scoring; TIMEOUT, WORKER_CRASH or OUT_OF_MEMORY where the child was too slow or died.
            DecodersBusy: no decoder became free in time.
        """
        digests = [hashlib.sha256(part).digest() for part in parts]
        key = hashlib.sha256(b"".join([*digests, excerpt.session.encode()])).hexdigest()
        with self._borrowed(key) as child:
            return child.pixels(parts, excerpt, key)

    def close(self) -> None:
        """End the children."""
        for child in self._all:
            child.close()

    @contextmanager
    def _borrowed(self, key: str) -> Iterator[_Child]:
        """A child of our own for a while: the one that holds this object, if it is free."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._idle, self._wait_seconds):
                raise DecodersBusy
            child = next((child for child in self._idle if child.holds == key), self._idle[0])
            self._idle.remove(child)
        try:
            yield child
        finally:
            with self._changed:
                self._idle.append(child)
                self._changed.notify()


class _Child:
    """One decoding process.

    Attributes:
        holds: which object it decoded last.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self.holds = ""

    def pixels(self, parts: Sequence[bytes], excerpt: Excerpt, key: str) -> bytes:
        try:
            pipe = self._living()
            deadline = time.monotonic() + self._config.max_seconds
            again = key == self.holds
            asked = {**vars(excerpt), "key": key, "parts": 0 if again else len(parts)}
            self.holds = ""
            pipe.send_bytes(json.dumps(asked).encode())
            for part in () if again else parts:
                pipe.send_bytes(part)
            answer = json.loads(_received(pipe, deadline))
            if "code" in answer:
                raise DecodeError(ErrorCode(answer["code"]), **answer["facts"])
            content = _received(pipe, deadline)
        except TimeoutError:
            self.close()
            raise DecodeError(ErrorCode.TIMEOUT, limit_seconds=self._config.max_seconds) from None
        except (EOFError, OSError):
            status = self.close()
            code = ErrorCode.OUT_OF_MEMORY if status == _OUT_OF_MEMORY_STATUS else ErrorCode.WORKER_CRASH
            raise DecodeError(code, exit_status=status) from None
        except DecodeError:
            raise
        except BaseException:  # half an answer may be in the pipe: the next object must not read it
            self.close()
            raise
        self.holds = key
        return content

    def close(self) -> int:
        """End the process; its exit status, also of one that died before."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        self.holds = ""
        if pipe is not None:
            pipe.close()
        if process is None:
            return 0
        try:
            return process.wait(0.5)  # the pipe is closed, so it ends by itself unless it hangs
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _living(self) -> Connection:
        if self._pipe is not None and self._process is not None and self._process.poll() is None:
            return self._pipe
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._pipe = Connection(ours.detach())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "medvision_ray.serving.decoder_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # native code that prints may print a header
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._pipe.send_bytes(self._config.model_dump_json().encode())
        _received(self._pipe, time.monotonic() + _START_SECONDS)
        return self._pipe


def _received(pipe: Connection, deadline: float) -> bytes:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    return pipe.recv_bytes()


class _Decoder:
    """The child's side: decodes, and keeps the last image."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._key = ""
        self._held: tuple[Any, dict[str, Any]] | None = None

    def answer(self, asked: dict[str, Any], parts: list[bytes]) -> bytes:
        if self._held is None or asked["key"] != self._key:
            self._held = None  # let go before the next one takes its memory
            names = Pseudonymiser(hashlib.sha256(asked["session"].encode()).digest()) if asked["session"] else None
            if len(parts) == 1:
                image = decode(parts[0], self._config, names)
            else:
                image = decode_series(parts, self._config, names)
            image = ready_to_send(image)
            self._held = image, header_of(image)
            self._key = asked["key"]
        image, header = self._held
        if asked["first"] >= image.frames:
            raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, frames=image.frames, first=asked["first"])
        return encode(image, header, asked["first"], asked["budget_bytes"])


def _serve(pipe: Connection) -> None:
    import cv2

    cv2.setNumThreads(1)
    config = DecodeConfig.model_validate_json(pipe.recv_bytes())
    limit_memory(config.max_memory_bytes)
    decoder = _Decoder(config)
    pipe.send_bytes(b"{}")
    while True:
        asked = json.loads(pipe.recv_bytes())
        parts = [pipe.recv_bytes() for _ in range(asked["parts"])]
        try:
            content = decoder.answer(asked, parts)
        except DecodeError as error:
            pipe.send_bytes(json.dumps({"code": error.code.value, "facts": error.facts}).encode())
        except MemoryError:
            os._exit(_OUT_OF_MEMORY_STATUS)
        except (Exception, SystemExit) as error:  # a defect in here; its text may hold a name
            facts = {"exception": type(error).__name__[:64]}
            pipe.send_bytes(json.dumps({"code": ErrorCode.INTERNAL_ERROR.value, "facts": facts}).encode())
        else:
            pipe.send_bytes(b"{}")
            pipe.send_bytes(content)


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except EOFError:  # the parent is gone
        sys.exit(0)
