"""Every file of the corpora against `expected.csv`, and independently against the corpora's own manifest.

`expected.csv` has a line a file: what `decode` gives (`ok` or the error code), shape and checksum of the
stored values, and why a file is refused. After a change of outcome, run

    python tests/imaging/test_expected.py

which writes the file again, keeps the reasons that still apply and leaves `?` where one is missing;
review the difference before it is committed. The checksum is the manifest's `sha_int64`: SHA-1 of
`repr(shape)` and the stored values as little-endian int64 (float64 for floats).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging import dicom, dicom_header, dicom_pixels
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

EXPECTED = Path(__file__).with_name("expected.csv")
CONFIG = DecodeConfig()
LOSSY = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 91, 203))
NO_PICTURE = (ErrorCode.NOT_AN_IMAGE.value, ErrorCode.NO_PIXELS.value, ErrorCode.UNSUPPORTED_FORMAT.value)
# Labels, dose grids and slide levels: their stored values are read and checked here, but no job scores them.
REFUSED_BY_CLASS = {"SEG": "not_an_image", "RTDOSE": "not_an_image", "SM": "unsupported_shape"}


@dataclass(frozen=True)
class Outcome:
    key: str
    outcome: str
    shape: str = ""
    checksum: str = ""
    reason: str = ""


def checksum(pixels: np.ndarray[Any, Any]) -> str:
    kind = "<f8" if pixels.dtype.kind == "f" else "<i8"
    return hashlib.sha1(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).astype(kind).tobytes()).hexdigest()


def stored_values(data: bytes) -> np.ndarray[Any, Any] | None:
    """A DICOM object's stored values, whatever its class; None where they cannot be read."""
    try:
        dataset, syntax = dicom.parse(data, CONFIG)
        return dicom_pixels.read_stored(dataset, dicom_header.read_pixel_header(dataset, syntax, CONFIG))
    except Exception:
        return None


def observe(folder: Path, key: str) -> Outcome:
    data = (folder / key).read_bytes()
    try:
        image = decode(data, CONFIG)
    except DecodeError as error:
        pixels = stored_values(data) if error.code.value in REFUSED_BY_CLASS.values() else None
        outcome = error.code.value
    else:
        outcome = "ok"
        pixels = image.pixels
        if image.source_format == "dicom" and pixels.ndim == 4:  # palettes are looked up, deep colour is cut
            pixels = stored_values(data)
    if pixels is None:
        return Outcome(key, outcome)
    return Outcome(key, outcome, "x".join(map(str, pixels.shape)), checksum(pixels))


@lru_cache(maxsize=1)
def observed(folder: Path) -> dict[str, Outcome]:
    bombs = [f"bombs/{path.name}" for path in (folder / "bombs").iterdir()]
    return {key: observe(folder, key) for key in sorted([*manifest(folder), *bombs])}


@lru_cache(maxsize=1)
def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, (folder / "MANIFEST.jsonl").read_text().splitlines())
    return {row["path"]: row for row in rows}


def expected() -> dict[str, Outcome]:
    if not EXPECTED.exists():
        return {}
    with EXPECTED.open(newline="", encoding="utf-8") as stream:
        return {row["key"]: Outcome(**row) for row in csv.DictReader(stream)}


def write(folder: Path) -> None:
    known = expected()
    with EXPECTED.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        for key, found in observed(folder).items():
            same = key in known and known[key].outcome == found.outcome
            reason = known[key].reason if same else "" if found.outcome == "ok" else "?"
            writer.writerow({**asdict(found), "reason": reason})


def test_every_file_has_its_recorded_outcome(corpora_dir: Path) -> None:
    recorded = expected()
    found = observed(corpora_dir)
    assert found.keys() == recorded.keys()
    lossy = {key for key, row in manifest(corpora_dir).items() if row.get("ts") in LOSSY}
    different = {
        key: outcome
        for key, outcome in found.items()
        if (outcome.outcome, outcome.shape) != (recorded[key].outcome, recorded[key].shape)
        or (outcome.checksum != recorded[key].checksum and key not in lossy)
    }
    assert not different


def test_every_refused_file_has_its_reason() -> None:
    for row in expected().values():
        assert (row.outcome == "ok") or len(row.reason) > 10, row.key


def test_stored_values_are_those_of_the_manifest(corpora_dir: Path) -> None:
    """Exactly where nothing is lost; another build of a lossy codec may differ by 1."""
    decodable = {key: row for key, row in manifest(corpora_dir).items() if row.get("ok")}
    assert len(decodable) > 250
    different = {}
    for key, row in decodable.items():
        found = observed(corpora_dir)[key]
        assert found.shape == "x".join(map(str, row["shape"])), key
        if found.checksum != row["sha_int64"]:
            different[key] = row
    assert not [key for key, row in different.items() if row["ts"] not in LOSSY]
    for key, row in different.items():
        pixels = stored_values((corpora_dir / key).read_bytes())
        assert pixels is not None
        assert abs(int(pixels.min()) - row["min"]) <= 1, key
        assert abs(int(pixels.max()) - row["max"]) <= 1, key


def test_the_goal_of_decodable_objects_is_met(corpora_dir: Path) -> None:
    """At least 99.6 % of what any stack can decode gives stored values, and every picture among them an image."""
    decodable = {key: row for key, row in manifest(corpora_dir).items() if row.get("ok")}
    read = [key for key in decodable if observed(corpora_dir)[key].checksum]
    assert len(read) >= 0.996 * len(decodable)
    for key, row in decodable.items():
        assert observed(corpora_dir)[key].outcome == REFUSED_BY_CLASS.get(row["modality"], "ok"), key


def test_objects_without_a_picture_are_refused_as_such(corpora_dir: Path) -> None:
    others = [key for key, row in manifest(corpora_dir).items() if row["kind"] == "dicom-nonimage"]
    assert len(others) > 90
    for key in others:
        assert observed(corpora_dir)[key].outcome in NO_PICTURE, key


@pytest.mark.parametrize("name", ["liver", "liver_nonbyte_aligned"])
@pytest.mark.parametrize("coding", ["rle", "deflate"])
def test_compressed_single_bits_have_the_values_of_their_native_twin(corpora_dir: Path, name: str, coding: str) -> None:
    """The manifest's stack refuses one-bit RLE and Deflated Image Frame; it has the same object as JPEG 2000."""
    stem = f"pydicom-data/data_store/data/{name}"
    twin = manifest(corpora_dir)[f"{stem}_j2k.dcm"]
    assert observed(corpora_dir)[f"{stem}_{coding}.dcm"].checksum == twin["sha_int64"]


@pytest.mark.parametrize(
    "process", ["Process6_8TransferSyntax_1.2.840.10008.1.2.4.53", "Process10_12TransferSyntax_1.2.840.10008.1.2.4.55"]
)
def test_progressive_twelve_bit_jpeg_has_the_values_of_its_sequential_twin(corpora_dir: Path, process: str) -> None:
    """The manifest's stack refuses both; the same coefficients lie in the sequential file, which it has."""
    stem = "cornerstone3D/packages/dicomImageLoader/examplesOld/test-images/CTImage.dcm_JPEG"
    twin = manifest(corpora_dir)[f"{stem}Process2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm"]
    assert observed(corpora_dir)[f"{stem}{process}.dcm"].checksum == twin["sha_int64"]


if __name__ == "__main__":
    write(Path(os.environ.get("MEDVISION_CORPORA", Path(__file__).parents[2] / "../shared/corpora")).resolve())
