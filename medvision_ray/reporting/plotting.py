"""What all figures of the report share: a style, a palette, and SVG that follows the reader's light or dark theme.

Colours are Okabe and Ito's (Color Universal Design, 2008), with dashes once they run out, so that
no curve is told apart by colour alone twice over.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#1f2429"
SOFT = "#8a9099"
_INK_DARK_THEME = "#e4e7ea"
_FIRST_DARK_THEME = "#3f9fdc"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_LONGEST_NAME = 32
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "medvision_ray",
    # A class may be called `$5`: names are text, never formulas.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#8a9099",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}


@contextmanager
def styled(**options: Any) -> Iterator[None]:
    """Inside, matplotlib draws in the report's style."""
    with mpl.rc_context({**_STYLE, **options}):
        yield


def line(index: int) -> dict[str, Any]:
    """Colour and dashes of the curve of this index."""
    dash = _DASHES[index // len(PALETTE) % len(_DASHES)]
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": dash}


def shown(name: str) -> str:
    """A name as one short printable line; control characters would make the SVG invalid XML."""
    line = "".join(character if character.isprintable() else "?" for character in name)
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG on no background, its ink light where the reader's theme is dark."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    light, dark = f"color:{INK};--first:{PALETTE[0]}", f"color:{_INK_DARK_THEME};--first:{_FIRST_DARK_THEME}"
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    start = svg.index("<svg ")
    head = svg.index(">", start) + 1
    return (
        svg[start:head] + style + svg[head:].replace(INK, "currentColor").replace(PALETTE[0].lower(), "var(--first)")
    ).encode()
