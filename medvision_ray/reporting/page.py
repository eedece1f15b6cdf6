"""A report's page out of blocks: one self-contained HTML file without script, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

import jinja2

from medvision_ray.reporting.overlays import Example, overlay
from medvision_ray.reporting.summary import Tile

_MB = 1_000_000
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """Names and values, in order."""

    rows: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Tiles:
    """Headline figures."""

    tiles: Sequence[Tile]
    kind: str = "tiles"


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG.

    Attributes:
        alt: what it shows, for those who cannot see it: what is drawn, and the figures that matter.
        caption: how to read it.
        wide: takes the whole width.
    """

    svg: bytes
    alt: str
    caption: str
    wide: bool = False

    @property
    def source(self) -> str:
        """The drawing as a data URI."""
        return _data_uri(self.svg, "image/svg+xml")


@dataclass(frozen=True)
class Figures:
    """Drawings side by side."""

    drawings: Sequence[Figure]
    kind: str = "figures"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        rows: cells as text, or as value and what stands small below it.
        left: so many of the first columns are words, the others numbers.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Gallery:
    """Pictures with captions.

    Attributes:
        masks: the key of masks' colours is shown.
        left_out: pictures that found no room on the page; `render` counts them.
    """

    title: str
    examples: Sequence[Example]
    masks: bool = True
    left_out: int = 0
    kind: str = "gallery"

    @property
    def pictures(self) -> list[tuple[str, str, str]]:
        """Data URI, alternative text and caption."""
        return [(_data_uri(overlay(each), "image/jpeg"), each.described, each.caption) for each in self.examples]


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: Sequence[Block]
    kind: str = "details"


Block = Text | Facts | Tiles | Figures | Table | Gallery | Details


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; one without blocks is left out."""

    name: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Page:
    """A whole report. Nothing on it may name a patient: it is made to be handed on.

    Attributes:
        subtitle: what kind of report, of what.
        generated_at: when it was made, as text.
    """

    title: str
    subtitle: str
    generated_at: str
    sections: Sequence[Section]


def render(page: Page, max_megabytes: float = 8.0) -> str:
    """The page as HTML: no script, no external resource, every text escaped.

    Args:
        max_megabytes: pictures beyond so many megabytes of the page are left out, and the page says how many.
    """
    shown = replace(page, sections=_within(page.sections, max_megabytes * _MB))
    source = resources.files("medvision_ray.reporting").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(page=shown).lstrip()


def _within(sections: Sequence[Section], budget: float) -> list[Section]:
    """Sections with at most so many bytes of drawings and pictures; drawings stay, pictures go from the end."""
    used = float(sum(len(figure.source) for section in sections for figure in _figures(section.blocks)))
    kept = []
    for section in sections:
        blocks, used = _trimmed(section.blocks, used, budget)
        if blocks:
            kept.append(replace(section, blocks=blocks))
    return kept


def _figures(blocks: Sequence[Block]) -> list[Figure]:
    found: list[Figure] = []
    for block in blocks:
        if isinstance(block, Figures):
            found.extend(block.drawings)
        elif isinstance(block, Details):
            found.extend(_figures(block.blocks))
    return found


def _trimmed(blocks: Sequence[Block], used: float, budget: float) -> tuple[list[Block], float]:
    kept: list[Block] = []
    for block in blocks:
        if isinstance(block, Details):
            inner, used = _trimmed(block.blocks, used, budget)
            kept.append(replace(block, blocks=inner))
        elif isinstance(block, Gallery):
            sizes = [len(uri) for uri, _, _ in block.pictures]
            fitting = [size for place, size in enumerate(sizes) if used + sum(sizes[: place + 1]) <= budget]
            used += sum(fitting)
            shown = block.examples[: len(fitting)]
            kept.append(replace(block, examples=shown, left_out=block.left_out + len(sizes) - len(fitting)))
        else:
            kept.append(block)
    return kept, used


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
