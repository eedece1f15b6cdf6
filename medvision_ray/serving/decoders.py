"""A replica's decoding processes: each works on one object at a time, and one that dies costs that object alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.scoring.pipes import OUT_OF_MEMORY_STATUS, START_SECONDS, receive, receive_line, send


class DecodingProcess:
    """One process, started when needed and replaced when it died."""

    def __init__(self, limits: DecodeConfig) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Run a task of `serving.tasks` on one object.

        Raises:
            DecodeError: the task's; TIMEOUT, WORKER_CRASH or OUT_OF_MEMORY where the process was too slow or died.
        """
        process = self.start()
        deadline = time.monotonic() + self._limits.max_seconds
        try:
            send(process.stdin, {"task": task, "options": options, "bytes": len(data)}, data)
            answer = json.loads(receive_line(process.stdout, deadline))
            payload = receive(process.stdout, answer["payload"], deadline)
        except TimeoutError:
            self.close()
            raise DecodeError(ErrorCode.TIMEOUT, limit_seconds=self._limits.max_seconds) from None
        except (EOFError, BrokenPipeError):
            status = process.wait()
            self.close()
            code = ErrorCode.OUT_OF_MEMORY if status == OUT_OF_MEMORY_STATUS else ErrorCode.WORKER_CRASH
            raise DecodeError(code, exit_status=status) from None
        except BaseException:  # half an answer may be in the pipe: the next object must not read it
            self.close()
            raise
        facts: dict[str, Any] = answer["facts"]
        if "code" in facts:
            raise DecodeError(ErrorCode(facts["code"]), Stage(facts["stage"]), **facts["facts"])
        return facts, payload

    @property
    def alive(self) -> bool:
        """Whether there is a process that waits for work."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> subprocess.Popen[bytes]:
        """The living process, started where there is none."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "medvision_ray.serving.tasks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            send(self._process.stdin, self._limits.model_dump(mode="json"))
            receive_line(self._process.stdout, time.monotonic() + START_SECONDS)
        except BaseException:
            self.close()
            raise
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


class Decoders:
    """A pool of decoding processes; `run` waits for a free one."""

    def __init__(self, limits: DecodeConfig, processes: int) -> None:
        self._all = [DecodingProcess(limits) for _ in range(processes)]
        self._free: queue.SimpleQueue[DecodingProcess] = queue.SimpleQueue()
        for process in self._all:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode")

    def start(self) -> None:
        """Start every process now, at once."""
        list(self._threads.map(DecodingProcess.start, self._all))

    async def run(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Run a task in a free process; as `DecodingProcess.run`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, task, data, options)

    def _run(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        process = self._free.get()
        try:
            return process.run(task, data, options)
        finally:
            if process.alive:
                self._free.put(process)
            else:  # the next object need not wait for what this one broke
                threading.Thread(target=self._revive, args=(process,), daemon=True, name="revive").start()

    def _revive(self, process: DecodingProcess) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):  # tried again with the next object
            process.start()
        self._free.put(process)

    def close(self) -> None:
        """End every process; objects under way fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.close()
