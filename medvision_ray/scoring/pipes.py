"""How a parent and a decoding child talk: JSON lines and raw bytes over pipes; what the child is limited by."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import time
from typing import IO, Any

START_SECONDS = 60.0
"""Longest time for a child to start."""
OUT_OF_MEMORY_STATUS = 86
"""Exit status of a child that ran out of its memory."""


def send(stream: IO[bytes] | None, message: dict[str, Any], payload: bytes = b"") -> None:
    """Write a message as one JSON line, and bytes after it."""
    if stream is None:
        raise BrokenPipeError
    stream.write(json.dumps(message).encode() + b"\n")
    if payload:
        stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes] | None, count: int, deadline: float) -> bytes:
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


def receive_line(stream: IO[bytes] | None, deadline: float) -> bytes:
    """One message of `answer_with`, without its payload."""
    size = int.from_bytes(receive(stream, 4, deadline), "big")
    return receive(stream, size, deadline)


def answer_with(out: IO[bytes], message: dict[str, Any], payload: bytes = b"") -> None:
    """Write a message with its length before it, and bytes after it."""
    text = json.dumps(message).encode()
    out.write(len(text).to_bytes(4, "big") + text + payload)
    out.flush()


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Kill a child, wait for its end, and close the pipes to it."""
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def own_stdout() -> IO[bytes]:
    """The pipe to the parent, out of the way of native code that prints."""
    pipe = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return pipe


def limit_memory(more_bytes: int) -> None:
    """Limit the address space to what is mapped now and so much more; allocations beyond it fail."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        now = 0
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))
