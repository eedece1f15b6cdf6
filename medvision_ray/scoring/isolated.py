"""Prepare suspect objects in a process of their own, with limits on its time and memory.

The child (`python -m medvision_ray.scoring.isolated`) reads one JSON line of settings and then one
JSON line per object on standard input; for each it answers one JSON line and the pixels as raw
bytes. Nothing is pickled. A child that dies or is too slow costs the one object it worked on.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from medvision_ray.config import DecodeConfig, PreprocessConfig, PrivacyConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.objects import Effort, ObjectReader, PreparedObject
from medvision_ray.scoring.pipes import (
    OUT_OF_MEMORY_STATUS,
    START_SECONDS,
    answer_with,
    end_child,
    limit_memory,
    own_stdout,
    receive,
    receive_line,
    send,
)

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
            send(child.stdin, {name: entry.get(name) for name in ("uri", "etag", "size", "members")})
            answer = json.loads(receive_line(child.stdout, deadline))
            for name, value in answer["effort"].items():
                setattr(effort, name, value)
            if "code" in answer:
                raise DecodeError(ErrorCode(answer["code"]), Stage(answer["stage"]), **answer["facts"])
            pixels = receive(child.stdout, int(np.prod(answer["shape"])), deadline)
        except TimeoutError:
            effort.decode_seconds = time.monotonic() - started
            self.close()
            raise DecodeError(ErrorCode.TIMEOUT, limit_seconds=self._reader.decode.max_seconds) from None
        except (EOFError, BrokenPipeError):
            effort.decode_seconds = time.monotonic() - started
            status = child.wait()
            self.close()
            code = ErrorCode.OUT_OF_MEMORY if status == OUT_OF_MEMORY_STATUS else ErrorCode.WORKER_CRASH
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
            end_child(child)

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
        send(self._child.stdin, settings)
        receive_line(self._child.stdout, time.monotonic() + START_SECONDS)
        return self._child


def _serve() -> None:
    out = own_stdout()
    import cv2

    cv2.setNumThreads(1)
    settings = json.loads(sys.stdin.buffer.readline())
    config = DecodeConfig.model_validate_json(json.dumps(settings["decode"]))
    preprocess = PreprocessConfig.model_validate_json(json.dumps(settings["preprocess"]))
    reader = ObjectReader(config, preprocess, _pseudonymiser(settings))
    limit_memory(config.max_memory_bytes)
    answer_with(out, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        effort = Effort()
        try:
            ready = reader.prepare(reader.read_entry(request, effort), effort)
        except DecodeError as error:
            answer_with(out, _reason(error, effort))
            continue
        except MemoryError:
            os._exit(OUT_OF_MEMORY_STATUS)
        except StorageError:
            os._exit(_NO_STORE_STATUS)
        except (Exception, SystemExit) as error:  # a defect of a decoder, as in the worker itself
            defect = DecodeError(ErrorCode.INTERNAL_ERROR, exception=type(error).__name__[:64])
            answer_with(out, _reason(defect, effort))
            continue
        pixels = np.ascontiguousarray(ready.pixels).tobytes()
        answer_with(out, {**ready.facts(), "effort": dataclasses.asdict(effort)}, pixels)


def _pseudonymiser(settings: dict[str, Any]) -> Pseudonymiser | None:
    if settings["key"] is None:
        return None
    policy = PrivacyConfig.model_validate_json(json.dumps(settings["policy"]))
    return Pseudonymiser(base64.b64decode(settings["key"]), policy)


def _reason(error: DecodeError, effort: Effort) -> dict[str, Any]:
    return {
        "code": error.code.value,
        "stage": error.stage.value,
        "facts": error.facts,
        "effort": dataclasses.asdict(effort),
    }


if __name__ == "__main__":
    _serve()
