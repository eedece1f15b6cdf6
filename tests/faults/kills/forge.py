"""One process that has done the imports, and forks `medvision` commands and Ray's workers from itself.

A round starts a dozen processes, each of which would import torch and Ray for seconds of CPU. What is
forked is an ordinary process of its own that can be killed.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SOCKET_VARIABLE = "KILLS_FORGE_SOCKET"
_POLL_SECONDS = 0.02


@dataclass
class Driver:
    """A started command; `code` is its exit status (negative: the signal), None while it runs."""

    pid: int
    log: Path
    code: int | None = None


def _become_driver(arguments: Sequence[str], log: str) -> None:
    from medvision_ray.cli import main

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 70
    try:
        code = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_worker(request: dict[str, Any], streams: Sequence[int], folder: Path) -> None:
    """Go on as the Python program that `ray_worker.py` was asked to start; `folder` remembers of which node."""
    raylet = next((word for word in request["arguments"] if word.startswith("--raylet-name=")), "")
    (folder / f"node-of-{os.getpid()}").write_text(raylet.partition("=")[2])
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    code = 70
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _serve(pipe: Connection, address: str) -> None:
    import cv2  # noqa: F401 - these are the imports of a worker but for Ray's own
    import imagecodecs  # noqa: F401
    import segmentation_models_pytorch  # noqa: F401
    import torch  # noqa: F401
    from deltalake import DeltaTable  # noqa: F401

    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address)
    server.listen(64)
    workers = os.fork()
    if workers == 0:
        pipe.close()
        _fork_workers(server, Path(address).parent)
    server.close()
    # Ray's core reads the environment when it is imported, which a raylet sets for each worker but not for drivers.
    import ray.data  # noqa: F401

    import medvision_ray.cli
    import medvision_ray.scoring.run  # noqa: F401

    pipe.send(("ready", workers, 0))
    _fork_drivers(pipe)


def _fork_workers(server: socket.socket, folder: Path) -> None:
    parent = os.getppid()
    server.settimeout(1.0)
    while os.getppid() == parent:
        _reap()
        try:
            caller, _ = server.accept()
        except TimeoutError:
            continue
        message, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        while not message.endswith(b"\n"):
            message += caller.recv(1 << 20)
        if os.fork() == 0:
            server.close()
            caller.close()
            _become_worker(json.loads(message), streams, folder)
        caller.close()
        for stream in streams:
            os.close(stream)
    os._exit(0)


def _fork_drivers(pipe: Connection) -> None:
    while True:
        if pipe.poll(_POLL_SECONDS):
            request = pipe.recv()
            if request is None:
                return
            pid = os.fork()
            if pid == 0:
                pipe.close()
                _become_driver(*request)
            pipe.send(("started", pid, 0))
        for pid, status in _reap():
            pipe.send(("ended", pid, os.waitstatus_to_exitcode(status)))


def _reap() -> list[tuple[int, int]]:
    """Children that have ended, with their wait status."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


class Forge:
    """The process that forks; it takes the environment of the moment at which it is made.

    Attributes:
        workers: number of the process that is the parent of all workers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._drivers: dict[int, Driver] = {}
        address = str(folder / "forge")
        os.environ[SOCKET_VARIABLE] = address
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, address), daemon=True)
        self._process.start()
        _, self.workers, _ = self._pipe.recv()

    def start(self, arguments: Sequence[str]) -> Driver:
        """Start `medvision ARGUMENTS`."""
        self._count += 1
        log = self._folder / f"driver-{self._count:04d}.log"
        self._pipe.send((list(arguments), str(log)))
        while True:
            kind, pid, code = self._pipe.recv()
            if kind == "started":
                break
            self._ended(pid, code)
        driver = self._drivers[pid] = Driver(pid, log)
        return driver

    def poll(self) -> None:
        """Take in which drivers have ended."""
        while self._pipe.poll():
            _, pid, code = self._pipe.recv()
            self._ended(pid, code)

    def wait(self, driver: Driver, seconds: float) -> int:
        """The exit status of a driver.

        Raises:
            TimeoutError: it still runs.
        """
        deadline = time.monotonic() + seconds
        while driver.code is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the driver still runs after {seconds:.0f} s:\n{driver.log.read_text()[-2000:]}")
            if self._pipe.poll(_POLL_SECONDS):
                self.poll()
        return driver.code

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(10)
        self._process.kill()

    def _ended(self, pid: int, code: int) -> None:
        if pid in self._drivers:  # else it is the parent of the workers
            self._drivers.pop(pid).code = code
