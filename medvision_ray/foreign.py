"""What libraries write to standard error: kept off it, and told as lines of ours without their text.

Ray, native decoders and Python's warnings write what they like, and that can be a path, a header field
or a patient's name. Inside `only_ours` a line of theirs becomes a line of the log that says which library
spoke, where in its code, and how severe it was. The text is given where it is a constant of that library's
source code, or when debug output was asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import TextIO

from medvision_ray.defects import constant_text, describe, kind_of, place_of
from medvision_ray.logs import Log

_SEVERE = {"D": None, "I": None, "W": "warning", "E": "error", "C": "error", "F": "error"}
# `2026-11-24 03:53:33,717<tab>WARNING executor.py:85 -- text`, and `[2026-11-24 03:47:25,127 W 12 12] rpc.cc:210: text`
_RAY_LINE = re.compile(r"[\d :,.-]{19,}\s+([DIWECF])[A-Z]+ ([\w.-]+:\d+) -- ")
_RAY_NATIVE_LINE = re.compile(r"\[[\d :,.-]{19,} ([DIWECF]) \d+ \d+\] (?:\([\w-]+\) )?([\w.-]+:\d+): ")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PIPE_BYTES = 1 << 20


@contextlib.contextmanager
def only_ours(log: Log) -> Iterator[None]:
    """Inside, standard error of this process carries lines of `log` alone."""
    with contextlib.ExitStack() as stack:
        # Where somebody else has replaced `sys.stderr` (a notebook, a test), the file descriptor is theirs to catch.
        if sys.stderr is sys.__stderr__ and sys.__stderr__ is not None:
            stack.enter_context(_catch_descriptor(log, sys.__stderr__))
        stack.enter_context(_catch_logging(log))
        stack.enter_context(_catch_warnings(log))
        stack.enter_context(_catch_threads(log))
        yield


def tell_foreign(log: Log, level: str, source: str, place: str, *, full: str, text: str | None = None) -> None:
    """One line about what a library said: `text` if it may be repeated, `full` only for debugging."""
    shown = full if log.debug else text
    said = f': "{shown}"' if shown else "; its text is withheld, --debug shows it"
    more = {"event": "foreign", "source": source, "place": place}
    log.write(level, f"{level.capitalize()} of {source} ({place}){said}", "medvision: ", more)


class _Handler(logging.Handler):
    """Log records of libraries."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        text = constant_text(record.msg, record.pathname, record.lineno, record.funcName or "")
        place = place_of(record.pathname, record.lineno)
        full = self.format(record) if self._log.debug else ""
        tell_foreign(self._log, level, record.name, place, full=full, text=text)


@contextlib.contextmanager
def _catch_logging(log: Log) -> Iterator[None]:
    handler = _Handler(log)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _catch_warnings(log: Log) -> Iterator[None]:
    def show(  # noqa: PLR0917 - the signature is Python's
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        tell_foreign(log, "warning", kind_of(category), place_of(filename, lineno), full=str(message))

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def _catch_threads(log: Log) -> Iterator[None]:
    """Exceptions that end a thread, or that nobody can catch, without their text."""

    def tell(error: BaseException | None, where: str) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        found = describe(error)
        full = "".join(traceback.format_exception(error)) if log.debug else ""
        shown = f"{found.kind} in {where}" + (f"\n{full}" if full else "")
        log.error(shown, event="defect", kind=found.kind, places=list(found.places))

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        tell(arguments.exc_value, "a thread")

    def unraisable(arguments: sys.UnraisableHookArgs) -> None:
        tell(arguments.exc_value, "a clean-up")

    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = of_thread, unraisable
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


class _DescriptorReader(threading.Thread):
    """Reads what comes through the pipe that took the place of file descriptor 2."""

    def __init__(self, log: Log, descriptor: int) -> None:
        super().__init__(daemon=True, name="standard-error")
        self._log = log
        self._descriptor = descriptor

    def run(self) -> None:
        with os.fdopen(self._descriptor, "rb", buffering=0) as pipe:
            waiting = b""
            while chunk := pipe.read(1 << 16):
                *lines, waiting = (waiting + chunk).split(b"\n")
                self._tell(lines)
                if len(waiting) > _PIPE_BYTES:
                    self._tell([waiting])
                    waiting = b""
            self._tell([waiting])

    def _tell(self, lines: list[bytes]) -> None:
        """One line each for Ray's own; what is of unknown form comes as one line a chunk, so that nothing floods."""
        unknown: list[str] = []
        for raw in lines:
            text = _ANSI.sub("", raw.decode("utf-8", "replace")).rstrip()
            found = _RAY_LINE.match(text) or _RAY_NATIVE_LINE.match(text)
            if found is None:
                unknown += [text] if text else []
                continue
            level = _SEVERE[found[1]]
            if level or self._log.debug:
                tell_foreign(self._log, level or "info", "ray", found[2], full=text)
        if unknown:
            count = f"{len(unknown)} line{'s' * (len(unknown) > 1)}"
            tell_foreign(self._log, "warning", "a library", count, full="\n".join(unknown))


@contextlib.contextmanager
def _catch_descriptor(log: Log, stderr: TextIO) -> Iterator[None]:
    """Put a pipe in the place of file descriptor 2; the log keeps the real one.

    A library that held Python's lock while it wrote more than the pipe holds would wait for ever, so
    the pipe is made larger than any such line.
    """
    stderr.flush()
    real = os.dup(2)
    reading, writing = os.pipe()
    with contextlib.suppress(OSError, AttributeError):  # Linux alone, and only up to the system's limit
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[attr-defined,unused-ignore]
    os.dup2(writing, 2)
    os.close(writing)
    reader = _DescriptorReader(log, reading)
    reader.start()
    stream = os.fdopen(real, "w", encoding="utf-8", errors="backslashreplace")
    log.stream = stream
    try:
        yield
    finally:
        stderr.flush()
        os.dup2(real, 2)
        reader.join(timeout=1.0)  # ends at once unless a child process still holds the pipe
        log.stream = None
        stream.close()
