"""What may be said about an exception or a warning that this package did not write: its kind and its place.

Its text may not: it can hold a path, a header field or a patient's name.
"""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_.()]{0,120}")
_MOST_PLACES = 12
_WITHHELD = "withheld"


@dataclass(frozen=True)
class Defect:
    """An unexpected exception without its text.

    Attributes:
        kind: its type, and after `from` those of its causes.
        places: `file:line function`, outermost first; at most 12, the innermost ones.
    """

    kind: str
    places: tuple[str, ...]

    def sentence(self) -> str:
        """For a person, without the places."""
        return (
            f"An unexpected error ({self.kind}): a defect in medvision_ray or in a library. Its text is withheld, since it "
            "can hold identifiers; --debug shows it. Please report the places below."
        )


def describe(error: BaseException) -> Defect:
    """Kind and places of an exception; neither its text nor any value of a variable."""
    kinds: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(kinds) < 5:
        seen.add(id(current))
        kinds.append(kind_of(type(current)))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_PLACES:]
    places = tuple(place_of(frame.filename, frame.lineno or 0, frame.name) for frame in frames)
    return Defect(" from ".join(kinds), places)


def kind_of(kind: type) -> str:
    """A type's name with its module, where that is plain."""
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    name = f"{module}{kind.__qualname__}".replace(".<locals>", "")
    return name if _KIND.fullmatch(name) else _WITHHELD


def place_of(filename: str, line: int, function: str = "") -> str:
    """`package/file.py:12 function`, without the folder that the package lies in."""
    path = Path(filename)
    roots = [Path(root) for root in sys.path if root] + [Path(__file__).resolve().parents[1]]
    inside = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
    short = min(inside, key=lambda found: len(found.parts)) if inside else Path(path.name)
    return f"{short.as_posix()}:{line} {function}".rstrip()


def constant_text(message: object, filename: str, line: int, function: str) -> str | None:
    """A log call's text if it is a constant of the source code that made the call, else None.

    A constant (`"Lost node %s"`) holds no data; text that was put together at run time can hold anything.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == filename and code.co_name == function and frame.f_lineno == line:
            return message if isinstance(message, str) and message in code.co_consts else None
        frame = frame.f_back
    return None
