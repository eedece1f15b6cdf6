"""The files that are damaged: real ones of every DICOM transfer syntax and NIfTI, and pictures of every raster kind."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from medvision_ray.demo import encode
from medvision_ray.demo.encode import Subject
from medvision_ray.imaging.nifti import looks_like_nifti
from medvision_ray.imaging.raster import raster_format

Strata = dict[str, list[tuple[str, bytes]]]

_LARGEST_BYTES = 600_000


def strata_of(corpora: Path | None) -> Strata:
    """Files by transfer syntax or format; without the corpora, phantoms stand for them."""
    strata: Strata = defaultdict(list)
    for name, data in [*_phantoms(), *_rasters()]:
        strata[_stratum(data)].append((name, data))
    for path in sorted(corpora.rglob("*")) if corpora else ():
        if path.is_file() and path.suffix not in (".jsonl", ".md") and 0 < path.stat().st_size <= _LARGEST_BYTES:
            data = path.read_bytes()
            strata[_stratum(data)].append((str(path.relative_to(corpora)) if corpora else path.name, data))
    return dict(strata)


def _stratum(data: bytes) -> str:
    if data[128:132] == b"DICM":
        place = data.find(b"\x02\x00\x10\x00UI", 0, 4096)
        length = int.from_bytes(data[place + 6 : place + 8], "little")
        syntax = data[place + 8 : place + 8 + length].strip(b" \0").decode("ascii", "replace") if place > 0 else "none"
        return f"dicom {syntax}"
    kind = raster_format(data)
    if kind:
        return kind
    return "nifti" if looks_like_nifti(data) else "other"


def _phantoms() -> list[tuple[str, bytes]]:
    picture = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    subject = Subject("DOE^JANE", "7731", "9", 1, 0)
    return [
        ("phantom film", encode.xray_dicom(subject, 0, picture, digital=True, inverted=True)),
        ("phantom slice", encode.ct_dicom(subject, 1, picture, signed=True, compressed=False)),
        ("phantom JPEG-LS", encode.ct_dicom(subject, 2, picture, signed=False, compressed=True)),
        ("phantom frames", encode.multiframe_dicom(subject, 3, np.stack([picture] * 3))),
        ("phantom volume", encode.nifti(subject, np.stack([picture] * 3))),
    ]


def _rasters() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    grey = cv2.GaussianBlur(rng.integers(0, 255, (72, 96), dtype=np.uint8), (0, 0), 3)
    deep = grey.astype(np.uint16) * 257
    colour = np.stack([grey, np.roll(grey, 9, 0), 255 - grey], -1)
    alpha = np.dstack([colour, grey])
    found = [
        (f"{name}{suffix}", cv2.imencode(suffix, image)[1].tobytes())
        for suffix, name, image in (
            (".png", "grey", grey),
            (".png", "deep", deep),
            (".png", "colour", colour),
            (".png", "alpha", alpha),
            (".png", "deep colour", colour.astype(np.uint16) * 257),
            (".jpg", "grey", grey),
            (".jpg", "colour", colour),
            (".bmp", "grey", grey),
            (".bmp", "colour", colour),
            (".bmp", "alpha", alpha),
        )
    ]
    found.append(("lossless.jpg", imagecodecs.jpeg8_encode(grey, lossless=True)))
    for name, image, options in (
        ("plain", deep, {}),
        ("inverted", grey, {"photometric": "miniswhite"}),
        ("deflated", deep, {"compression": "zlib", "predictor": True}),
        ("lzw", grey, {"compression": "lzw"}),
        ("jpeg", colour, {"compression": "jpeg"}),
        ("tiled", deep, {"tile": (32, 32), "compression": "zstd"}),
        ("pages", np.stack([grey] * 3), {"photometric": "minisblack"}),
        ("big", grey, {"bigtiff": True}),
        ("palette", grey, {"photometric": "palette", "colormap": rng.integers(0, 65535, (3, 256), dtype=np.uint16)}),
    ):
        sink = io.BytesIO()
        tifffile.imwrite(sink, image, **options)
        found.append((f"{name}.tif", sink.getvalue()))
    return found
