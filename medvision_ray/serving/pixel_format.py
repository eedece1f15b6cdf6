"""A decoded image as the viewer page reads it: a JSON header, then the stored values of some frames.

The answer is `length (uint32, little-endian) | header | blanks up to a multiple of 8 | frames`. Frames are
stored values, row by row, little-endian; the display chain (rescale, window, inversion) is in the header and
applied in the browser, so that a window can be changed without asking again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from medvision_ray.imaging.display import Bounds, Scaling, frame_scalings, modality_values
from medvision_ray.imaging.geometry import Geometry, Vector
from medvision_ray.imaging.image import Display, LookupTable, MedicalImage, Window

MEDIA_TYPE = "application/vnd.medvision.pixels"
VERSION = 1
SOFT_TISSUE_HU = Window(40.0, 400.0)
PERCENTILES = (0.5, 99.5)

_ALIGNMENT = 8
_OBLIQUE = 0.25  # of a unit vector: from here on an axis has a letter
_AXES = (("L", "R"), ("P", "A"), ("H", "F"))


def ready_to_send(image: MedicalImage) -> MedicalImage:
    """The same picture in one of the types that are sent: uint8, int16, uint16, float32, or RGB uint8.

    A modality LUT is applied, since it makes other values of stored ones; int32 and wider go as 16 bits where
    they fit and as float32 elsewhere (exact up to 2**24).
    """
    displays = [image.display_of(index) for index in range(image.frames)]
    if any(display.modality_lut is not None for display in displays):
        pixels = np.stack(
            [modality_values(frame, display) for frame, display in zip(image.pixels, displays, strict=True)]
        ).astype(np.float32)
        plain = [replace(display, modality_lut=None, slope=1.0, intercept=0.0, padding=None) for display in displays]
        image = replace(image, pixels=pixels, display=plain[0], frame_display=tuple(plain))
    return replace(image, pixels=image.pixels.astype(_sent_type(image.pixels), copy=False))


def header_of(image: MedicalImage) -> dict[str, Any]:
    """All that the page shows of an image beside its pixels; nothing that names a patient.

    Args:
        image: as `ready_to_send` made it.
    """
    rows, columns = image.shape
    scalings: list[Scaling] = [] if image.pixels.ndim == 4 else list(_scalings(image))
    luts = _Tables()
    displays = [
        _display(image.display_of(index), scaling, luts) for index, scaling in enumerate(scalings or [Bounds(0, 255)])
    ]
    geometry = image.geometry
    return {
        "version": VERSION,
        "height": rows,
        "width": columns,
        "frames": image.frames,
        "type": "rgb8" if image.pixels.ndim == 4 else image.pixels.dtype.name,
        "format": image.source_format,
        "modality": image.modality,
        "unit": "HU" if _in_hounsfield(image) else "",
        "spacing_mm": list(image.spacing_mm) if image.spacing_mm else None,
        "spacing_source": image.spacing_source.value,
        "slice_spacing_mm": geometry.slice_spacing_mm if geometry else None,
        "slice_order": list(image.slice_order),
        "edges": edge_letters(geometry) if geometry else None,
        "stack": _stack(image),
        "may_contain_text": image.header.may_contain_text,
        "displays": displays if any(display != displays[0] for display in displays) else displays[:1],
        "luts": luts.encoded,
    }


def frame_bytes(image: MedicalImage) -> int:
    """Bytes of one frame."""
    return int(image.pixels[0].nbytes)


def encode(image: MedicalImage, header: dict[str, Any], first: int, budget_bytes: int) -> bytes:
    """Header and frames from `first` on: as many as fit the budget, at least one.

    Args:
        image: as `ready_to_send` made it.
        header: as `header_of` made it of the same image.
        first: index of the first frame.
        budget_bytes: how many bytes of pixels to send at most.
    """
    count = max(1, min(image.frames - first, budget_bytes // max(frame_bytes(image), 1)))
    chosen = image.pixels[first : first + count]
    little = np.ascontiguousarray(chosen, dtype=chosen.dtype.newbyteorder("<"))
    text = json.dumps({**header, "first": first, "count": len(chosen)}, allow_nan=False).encode()
    text += b" " * (-(4 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(4, "little") + text + little.tobytes()


def edge_letters(geometry: Geometry) -> dict[str, str]:
    """Which side of the patient each edge of the picture shows (DICOM PS3.3 C.7.6.1.1.1)."""
    across, down = geometry.across_lps, geometry.down_lps
    return {
        "left": _letters(across, -1),
        "right": _letters(across, 1),
        "top": _letters(down, -1),
        "bottom": _letters(down, 1),
    }


def _letters(vector: Vector, sign: int) -> str:
    parts = sorted(zip(vector, _AXES, strict=True), key=lambda part: -abs(part[0]))
    return "".join(letters[value * sign < 0] for value, letters in parts if abs(value) >= _OBLIQUE)


def _sent_type(pixels: NDArray[Any]) -> np.dtype[Any]:
    kind = pixels.dtype
    if kind in (np.uint8, np.int16, np.uint16, np.float32):
        return kind.newbyteorder("=")
    if kind in (np.bool_, np.int8):
        return np.dtype(np.uint8 if kind == np.bool_ else np.int16)
    if kind.kind in "iu" and pixels.size:
        lowest, highest = int(pixels.min()), int(pixels.max())
        for narrow in (np.int16, np.uint16):
            if np.iinfo(narrow).min <= lowest and highest <= np.iinfo(narrow).max:
                return np.dtype(narrow)
    return np.dtype(np.float32)


def _in_hounsfield(image: MedicalImage) -> bool:
    return image.modality == "CT" and image.source_format == "dicom" and image.display.hounsfield


def _scalings(image: MedicalImage) -> list[Scaling]:
    """What the picture is first shown with: the file's own LUT or window, else soft tissue for HU, else percentiles.

    8-bit PNG, JPEG and their like are shown as they are, as in scoring.
    """
    if image.source_format not in ("dicom", "nifti") and image.pixels.dtype == np.uint8:
        return [Bounds(0.0, 255.0)] * image.frames
    own = [image.display_of(index).voi_lut or image.display_of(index).window for index in range(image.frames)]
    if _in_hounsfield(image) and not any(own):
        return [SOFT_TISSUE_HU] * image.frames
    return list(frame_scalings(image, True, PERCENTILES, None))


class _Tables:
    """VOI LUTs in use, each once."""

    def __init__(self) -> None:
        self.encoded: list[dict[str, Any]] = []
        self._places: dict[bytes, int] = {}

    def place(self, table: LookupTable) -> int:
        data = table.values.astype("<u2").tobytes()
        key = data + f"{table.first},{table.bits}".encode()
        if key not in self._places:
            self._places[key] = len(self.encoded)
            values = base64.b64encode(data).decode()
            self.encoded.append({"first": table.first, "bits": table.bits, "values": values})
        return self._places[key]


def _display(display: Display, scaling: Scaling, luts: _Tables) -> dict[str, Any]:
    return {
        "slope": display.slope,
        "intercept": display.intercept,
        "invert": display.invert,
        "padding": [float(value) for value in display.padding] if _finite(display.padding) else None,
        "window": _window(scaling),
        "lut": luts.place(scaling) if isinstance(scaling, LookupTable) else None,
    }


def _window(scaling: Scaling) -> dict[str, Any]:
    """As a window; two bounds are one of the function LINEAR_EXACT, with the bounds beside it for the last bit of rounding.

    A LUT has the window of its inputs, which a change by hand starts from.
    """
    if isinstance(scaling, Window):
        return {"center": scaling.center, "width": scaling.width, "function": scaling.function.value}
    if isinstance(scaling, LookupTable):
        scaling = Bounds(scaling.first, scaling.first + scaling.values.size - 1)
    center, width = scaling.low / 2 + scaling.high / 2, scaling.high - scaling.low
    width = min(max(width, 0.0), sys.float_info.max)
    return {"center": center, "width": width, "function": "LINEAR_EXACT", "bounds": [scaling.low, scaling.high]}


def _finite(values: tuple[float, float] | None) -> TypeGuard[tuple[float, float]]:
    return values is not None and all(math.isfinite(value) for value in values)


def _stack(image: MedicalImage) -> dict[str, Any] | None:
    """For a single slice of a series: a name that its neighbours share, and where it lies along their normal.

    The name is a digest of a pseudonym that is keyed for one visit of the page.
    """
    geometry, series = image.geometry, image.keys.series_key
    if geometry is None or series is None or image.frames != 1:
        return None
    facts = (
        series,
        image.shape,
        image.pixels.ndim,
        np.round((*geometry.across_lps, *geometry.down_lps), 3).tolist(),
        np.round(geometry.spacing_mm, 4).tolist(),
    )
    position = float(np.dot(geometry.normal_lps, geometry.origin_lps_mm))
    return {"name": hashlib.sha256(repr(facts).encode()).hexdigest()[:16], "position_mm": round(position, 4)}
