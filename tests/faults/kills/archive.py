"""A small archive on S3 with broken objects in it, and what must come out for each."""

from __future__ import annotations

import tempfile
from pathlib import Path

from medvision_ray import storage
from medvision_ray.demo.archive import make_archive

_WHOLE = 18
_BROKEN = {
    "incoming/empty.dcm": "empty_file",
    "incoming/cut-off.dcm": "truncated",
    "incoming/letter.dcm": "unsupported_format",
    "incoming/absurd-size.dcm": "bad_dimensions",
    "incoming/referral.pdf": "unsupported_format",
    "incoming/no-pixels.dcm": "no_pixels",
}


def upload(uri: str) -> dict[str, str | None]:
    """Write the archive below `uri`; the answer has each object's address and its code (None: scored)."""
    expected: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        night = Path(make_archive(Path(folder), patients=12).night_1)
        whole = sorted((path for path in night.glob("case-*/*")), key=lambda path: (path.stat().st_size, path))
        for path in whole[:_WHOLE]:
            expected[_put(uri, night, path)] = None
        for name, code in _BROKEN.items():
            expected[_put(uri, night, night / name)] = code
    return expected


def _put(uri: str, root: Path, path: Path) -> str:
    place = storage.join(uri, path.relative_to(root).as_posix())
    storage.write_bytes(place, path.read_bytes())
    return place
