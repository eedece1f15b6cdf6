"""The lines that a job writes to standard error: text for people, or one JSON object a line for machines.

A line holds our own sentence and fields out of a closed list. No field can carry an identifier, and an
address below the archive is cut off where the archive ends, since folders are named after patients.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypedDict

from medvision_ray.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from medvision_ray.config import LoggingConfig

FORMATS = ("text", "json")
FORMAT_VARIABLE, DEBUG_VARIABLE = "MEDVISION_LOG_FORMAT", "MEDVISION_DEBUG"
_LEVELS = {"info": 20, "warning": 30, "error": 40}
_REMEMBERED = ("run_key", "model_id")
_COUNTS = ("total", "done", "failed")
# What a job's result may count: told at its end.
RUN_COUNTS = ("listed", "excluded", "already_done", "scored", "failed", "retried", "not_scored", "images")
DEBUG_WARNING = (
    "Debug output shows texts of libraries, which can hold identifiers of patients: keep it on this machine."
)


class Fields(TypedDict, total=False):
    """What a line may carry beside its sentence."""

    event: str
    """What happened, in one word; `message` where nothing else is said. `progress` lines carry the counts below."""
    run_key: str
    """Names the run; given once, every later line has it."""
    model_id: str
    """Name and content hash of the model; given once, every later line has it."""
    total: int
    """Objects of the run."""
    done: int
    """Objects with a committed row, failed ones included."""
    failed: int
    """Of these, failures."""
    rate: float
    """Objects a second."""
    seconds_left: float
    """Estimate."""
    seconds: float
    """How long it took."""
    stage: str
    """Part of a run: list, score, publish and so on."""
    number: int
    """Of a pass, an attempt, an epoch."""


class Reporter(Protocol):
    """What a job is given to say how far it is: `say("3 of 9 objects", event="progress", done=3, total=9)`."""

    def __call__(self, text: str, **fields: Unpack[Fields]) -> None:
        """Write one line."""


class Log:
    """Writes lines; a `Reporter`. State is the format, the level, and what is known of the job by now.

    Attributes:
        stream: where lines go; None is whatever `sys.stderr` is at that moment.
        debug: whether texts of libraries are shown.
        facts: the last run_key, model_id, total, done and failed that a line carried.
    """

    def __init__(self, form: str | None = None, *, debug: bool = False) -> None:
        self.stream: TextIO | None = None
        self.debug = debug
        self.facts: dict[str, Any] = {}
        self._forced = form
        self._format = form or "text"
        self._level = _LEVELS["info"]
        self._job: str | None = None
        self._roots: list[tuple[str, re.Pattern[str]]] = []
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def configure(self, job: str | None, config: LoggingConfig | None = None) -> None:
        """Name the job; take format and level from its configuration, unless a format was forced."""
        self._job = job
        if config is not None:
            self._format = self._forced or config.format
            self._level = _LEVELS[config.level]

    def cut_below(self, root: str, spared: Iterable[str] = ()) -> None:
        """Cut every address below `root` off there, except what lies in one of `spared` (tables, a bundle)."""
        root = root.rstrip("/") + "/"
        inside = (re.escape(place.rstrip("/")) for place in spared if place.startswith(root))
        self._roots.append((root, re.compile(f"(?:{'|'.join(inside) or '(?!)'})(?:/|$|[,;] )")))

    @property
    def seconds(self) -> float:
        """Since the log was made, which is when the command began."""
        return time.monotonic() - self._started

    def __call__(self, text: str, **fields: Unpack[Fields]) -> None:
        """A line about how far the job is."""
        self.facts.update({name: value for name, value in fields.items() if name in (*_REMEMBERED, *_COUNTS)})
        self.write("info", text, f"[{self.seconds:6.1f} s] ", {"event": "message", **fields})

    def warning(self, text: str, event: str = "warning", **more: Any) -> None:
        """A line about something that somebody should look at; the job goes on."""
        self.write("warning", text, "medvision: ", {"event": event, **more})

    def error(self, text: str, event: str = "error", **more: Any) -> None:
        """A line about why the job failed."""
        self.write("error", text, "medvision: ", {"event": event, **more})

    def end(self, verb: str, status: str, exit_code: int, result: Mapping[str, Any]) -> None:
        """The last line: how the job ended and what it counted. In JSON only and whatever the level; people see the code."""
        if self._format == "json":
            self.facts.update({name: result[name] for name in _REMEMBERED if name in result})
            known = {name: self.facts[name] for name in _COUNTS if name in self.facts}
            counts = {name: result[name] for name in RUN_COUNTS if name in result} or known
            more = {"event": "end", "status": status, "exit_code": exit_code, "seconds": self.seconds, **counts}
            self._put(self._as_json("info" if exit_code == 0 else "error", f"{verb}: {status}.", more))

    def write(self, level: str, text: str, prefix: str, more: dict[str, Any]) -> None:
        """One line, if its level is asked for."""
        if _LEVELS[level] >= self._level:
            self._put(self._as_json(level, text, more) if self._format == "json" else prefix + self.cut(text))

    def cut(self, text: str) -> str:
        """A text without what may follow the archive's own address in it; to the end of the line, as names have blanks."""
        return "\n".join(self._cut_line(line) for line in text.split("\n")) if self._roots else text

    def _cut_line(self, line: str) -> str:
        for root, spared in self._roots:
            place = line.find(root)
            while place >= 0:
                if not spared.match(line, place):
                    line = line[: place + len(root)] + "..."
                    break
                place = line.find(root, place + 1)
        return line

    def _as_json(self, level: str, text: str, more: dict[str, Any]) -> str:
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "level": level,
            "event": more.get("event", "message"),
            "message": self.cut(text),
            "job": self._job,
            **{name: self.facts[name] for name in _REMEMBERED if name in self.facts},
        }
        line.update({name: value for name, value in more.items() if name != "event"})
        return json.dumps({name: _rounded(value) for name, value in line.items()})

    def _put(self, line: str) -> None:
        stream = self.stream or sys.stderr
        with self._lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):  # a reader that went away must not end a night's run
                return


def open_log(form: str | None, *, debug: bool) -> Log:
    """The log of a command: `form` from its options, else MEDVISION_LOG_FORMAT, else later the configuration's.

    Raises:
        UsageError: MEDVISION_LOG_FORMAT is no format.
    """
    wanted = form or os.environ.get(FORMAT_VARIABLE, "").strip() or None
    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"Expected {FORMAT_VARIABLE} to be one of {', '.join(FORMATS)}, but it is something else.")
    log = Log(wanted, debug=debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"))
    if log.debug:
        log.warning(DEBUG_WARNING, event="debug")
    return log


def silent(text: str, **fields: Unpack[Fields]) -> None:
    """A `Reporter` that says nothing; for callers that want results alone."""


def finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    """JSON has no NaN, and nobody reads the tenth digit of a rate."""
    return round(value, 3) if isinstance(value, float) and math.isfinite(value) else finite(value)
