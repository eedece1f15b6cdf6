"""A replica's predicting process (`python -m medvision_ray.serving.predicting_process`): the network computes apart from the requests.

In one process a network of hundreds of small operations waits for the interpreter's lock after each of them, up to 5 ms
while requests are parsed or refused: beside a thread that was busy a fifth of the time it took 1.5 times as long, beside one
that was busy half of it 2.2 times. Parent and child are one program and talk in pickles over pipes of their own; what
clients send is decoded elsewhere (`serving.decoders`).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import ServeJob
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.scoring.objects import PreparedObject
from medvision_ray.scoring.pipes import end_child, own_stdout
from medvision_ray.serving.model_memory import ModelMemory, Pair, Scored, StaleModelError
from medvision_ray.serving.problems import RequestError

_SIZE_BYTES = 8


class PredictingProcess:
    """`ModelMemory` in a child, which is started when needed and again when it died. Calls wait for one another."""

    def __init__(self, settings: ServeJob) -> None:
        self._settings = settings.model_dump_json()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()

    def loaded(self) -> set[str]:
        """Ids of the models in memory after the last call."""
        return self._loaded

    def load(self, bundle: Bundle) -> None:
        """As `ModelMemory.load`; also what the child raises otherwise, as a RuntimeError that names its kind."""
        self._call("load", bundle)

    def score(self, items: Sequence[Pair]) -> list[Scored]:
        """As `ModelMemory.score`; where the child dies, every item is told to come again (503)."""
        try:
            return [_received(item) for item in self._call("score", list(items))]
        except RequestError as error:
            return [error] * len(items)

    def explain(self, bundle: Bundle, ready: PreparedObject, frame: int, class_index: int) -> NDArray[np.uint8]:
        """As `ModelMemory.explain`.

        Raises:
            RequestError: 503, the child died.
        """
        found: NDArray[np.uint8] = self._call("explain", bundle, ready, frame, class_index)
        return found

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        self._loaded = set()
        if child is not None:
            end_child(child)

    def _call(self, method: str, *details: Any) -> Any:
        with self._lock:
            child = self._living()
            try:
                _write(child.stdin, (method, details))
                failed, result, self._loaded = _read(child.stdout)
            except (EOFError, BrokenPipeError):
                self.close()
                sentence = "The process that predicts ended; another one starts. Send this again."
                raise RequestError(503, "predictor_lost", sentence, retry_after_seconds=1) from None
            except BaseException:  # half an answer may be in the pipe
                self.close()
                raise
        if failed == "stale":
            raise StaleModelError("The model's files are of another version by now.")
        if failed:
            raise RuntimeError(f"the predicting process raised {result}")
        return result

    def _living(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "medvision_ray.serving.predicting_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        _write(self._child.stdin, self._settings)
        return self._child


def _write(stream: IO[bytes] | None, message: Any) -> None:
    if stream is None:
        raise BrokenPipeError
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(content).to_bytes(_SIZE_BYTES, "big"))
    stream.write(content)
    stream.flush()


def _read(stream: IO[bytes] | None) -> Any:
    """One message of `_write`.

    Raises:
        EOFError: the other side is gone.
    """
    if stream is None:
        raise EOFError
    head = stream.read(_SIZE_BYTES)
    content = stream.read(int.from_bytes(head, "big")) if len(head) == _SIZE_BYTES else b""
    if not content or len(content) < int.from_bytes(head, "big"):
        raise EOFError
    return pickle.loads(content)  # noqa: S301 - of our own child or parent, over a pipe of our own


def _sent(scored: Scored) -> tuple[str, Any]:
    """A row or an error as both sides know it: an exception's own pickle would need its constructor's arguments."""
    if isinstance(scored, DecodeError):
        return "decode", (scored.code.value, scored.stage.value, scored.facts)
    if isinstance(scored, Exception):
        return "stale", None
    return "row", scored


def _received(item: tuple[str, Any]) -> Scored:
    kind, value = item
    if kind == "decode":
        code, stage, facts = value
        return DecodeError(ErrorCode(code), Stage(stage), **facts)
    if kind == "stale":
        return StaleModelError("The model's files are of another version by now.")
    row: dict[str, Any] = value
    return row


def _answer(memory: ModelMemory, method: str, details: tuple[Any, ...]) -> tuple[str, Any]:
    """How a call failed (nothing, `stale`, or by a defect), and its result."""
    try:
        if method == "score":
            return "", [_sent(item) for item in memory.score(*details)]
        return "", getattr(memory, method)(*details)
    except StaleModelError:
        return "stale", None
    except Exception as error:  # without its text, which can hold an address
        return "defect", type(error).__name__


def _serve() -> None:
    out = own_stdout()
    memory = ModelMemory(ServeJob.model_validate_json(_read(sys.stdin.buffer)))
    while True:
        try:
            method, details = _read(sys.stdin.buffer)
        except EOFError:  # the replica is gone
            return
        failed, result = _answer(memory, method, details)
        _write(out, (failed, result, memory.loaded()))


if __name__ == "__main__":
    _serve()
