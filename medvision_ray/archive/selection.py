"""Which of the listed objects are wanted: by path, by pattern and by age, counted, a batch at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from medvision_ray import listing, storage
from medvision_ray.config import ArchiveConfig
from medvision_ray.config.since import parse_since


class Selection:
    """The choice that an archive's configuration makes.

    Attributes:
        listed: objects that were looked at.
        outside: of these, those that do not lie below `uri`.
        excluded: those outside, and those that the include and exclude patterns took out.
        older: objects left out because they were last modified before `since`.
    """

    def __init__(self, config: ArchiveConfig, now: datetime) -> None:
        self.listed = self.outside = self.excluded = self.older = 0
        self._roots = _spellings(storage.absolute(config.uri).rstrip("/") + "/")
        self._prefixes = outermost(config.prefix)
        self._include = None if "**" in config.include else _any_of(config.include)
        self._exclude = _any_of(config.exclude) if config.exclude else None
        self._since = parse_since(config.since, now) if config.since else None

    def by_path(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Keep what the paths allow; `path` is filled in from `uri` where it is null."""
        self.listed += batch.num_rows
        if batch["path"].null_count:
            batch = self._below_root(batch)
        if self._prefixes:
            below = [pc.starts_with(batch["path"], f"{prefix}/") for prefix in self._prefixes]
            batch = batch.filter(_or(below))
        wanted = pc.match_substring_regex(batch["path"], self._include) if self._include else None
        if self._exclude is not None:
            rest = pc.invert(pc.match_substring_regex(batch["path"], self._exclude))
            wanted = rest if wanted is None else pc.and_(wanted, rest)
        if wanted is None:
            return batch
        kept = batch.filter(wanted)
        self.excluded += batch.num_rows - kept.num_rows
        return kept

    def by_age(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Keep what was modified since then; what tells no time is kept."""
        if self._since is None:
            return batch
        since = pa.scalar(self._since, batch["mtime"].type)
        kept = batch.filter(pc.fill_null(pc.greater_equal(batch["mtime"], since), True))
        self.older += batch.num_rows - kept.num_rows
        return kept

    def _below_root(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        below = [pc.starts_with(batch["uri"], root) for root in self._roots]
        inside = pc.sum(_or(below)).as_py() or 0
        self.outside += batch.num_rows - inside
        self.excluded += batch.num_rows - inside
        paths = batch["path"]
        for root, mask in zip(self._roots, below, strict=True):
            paths = pc.if_else(mask, pc.utf8_slice_codeunits(batch["uri"], len(root)), paths)
        return batch.set_column(0, batch.schema.field("path"), paths).filter(_or(below))


def _spellings(root: str) -> tuple[str, ...]:
    """How addresses below a folder begin: those of names that are not UTF-8 as file://, percent-encoded."""
    if storage.scheme_of(root) != "file":
        return (root,)
    quoted = f"file://{quote(os.fsencode(root))}"
    return (quoted,) if listing.spelled([root])[0].as_py() == quoted else (root, quoted)


def outermost(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Paths in order, without those that lie below another."""
    found: list[str] = []
    for prefix in sorted(path.strip("/") + "/" for path in prefixes):
        if not found or not prefix.startswith(found[-1]):
            found.append(prefix)
    return tuple(prefix.rstrip("/") for prefix in found)


def _or(masks: Sequence[pa.Array]) -> pa.Array:
    found = masks[0]
    for mask in masks[1:]:
        found = pc.or_(found, mask)
    return found


def _any_of(patterns: Sequence[str]) -> str:
    """One regular expression (RE2) for several globs."""
    return r"(?s)\A(?:" + "|".join(_glob(pattern) for pattern in patterns) + r")\z"


def _glob(pattern: str) -> str:
    """`**/` spans folders (also none), `**` anything, `*` and `?` stay inside a name."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return "".join(parts.get(token, re.escape(token)) for token in tokens)
