"""The page that the package ships is the one that its sources make (`make viewer`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VIEWER, STATIC = ROOT / "viewer", ROOT / "medvision_ray" / "serving" / "static"


def digest(root: Path, paths: list[str]) -> str:
    """As `viewer/vite.config.ts` makes it."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path}\0".encode() + (root / path).read_bytes() + b"\0")
    return found.hexdigest()


def test_the_shipped_page_was_built_of_these_sources_and_not_touched_since() -> None:
    record = json.loads((VIEWER / "built.json").read_text(encoding="utf-8"))
    sources = ["index.html", "package.json", "vite.config.ts"]
    sources += [f"src/{path.relative_to(VIEWER / 'src').as_posix()}" for path in (VIEWER / "src").rglob("*.*")]
    built = [path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()]
    assert record["sources"] == digest(VIEWER, sorted(sources)), "run `make viewer`"
    assert record["built"] == digest(STATIC, sorted(built)), "run `make viewer`"


def test_nothing_third_party_is_in_it() -> None:
    package = json.loads((VIEWER / "package.json").read_text(encoding="utf-8"))
    assert "dependencies" not in package
