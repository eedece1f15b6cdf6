"""What verbs of the command line print, and to whom it does not matter any more."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from medvision_ray.logs import finite


def print_facts(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Facts as lines, unless JSON is wanted."""
    if options.json:
        return
    for key, value in facts.items():
        text = json.dumps(finite(value), indent=2, default=str) if isinstance(value, dict | list) else value
        sys.stdout.write(f"{key}: {text}\n")


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, what is printed to a reader that went away (`| head`) is dropped: the job and its exit code stay as they are."""
    stdout = sys.stdout
    output = _Output(stdout)
    sys.stdout = output
    try:
        yield
        output.flush()
    finally:
        sys.stdout = stdout


class _Output(io.TextIOBase):
    """Standard output; once nobody reads it, nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's own."""
        with self._or_dropped():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a stream's own."""
        with self._or_dropped():
            self._stream.flush()

    def fileno(self) -> int:
        """As a stream's own."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """As a stream's own."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As a stream's own."""
        return self._stream.encoding

    @contextlib.contextmanager
    def _or_dropped(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is left in the stream's buffer would raise once more when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
