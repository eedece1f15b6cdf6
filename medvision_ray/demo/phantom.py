"""Draw one phantom picture with its lesion: `draw_phantom`. Pure; nothing is written here.

Coordinates are fractions of half the image side: x runs right and y down from -1 to 1, so a
diameter of 0.2 is a tenth of the side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
Modality = Literal["DX", "CT", "MR"]
Label = Literal["cavity", "consolidation", "nodule"]

MODALITIES: tuple[Modality, ...] = ("DX", "CT", "MR")
CLASSES: tuple[Label, ...] = ("cavity", "consolidation", "nodule")

_DIAMETERS: dict[str, tuple[float, float]] = {
    "nodule": (0.18, 0.36),
    "cavity": (0.28, 0.48),
    "consolidation": (0.40, 0.50),
}
_LESION_GREY: dict[str, float] = {"nodule": 0.96, "cavity": 0.93, "consolidation": 0.70}
_HOLE_GREY = 0.04
_SHRINK_PER_FRAME = 0.1
_MOST_TILT_DEGREES, _MOST_SHIFT = 8.0, 0.05
"""How far patients lie from straight and from the middle; without it one in a thousand pairs of them looks nearly the same."""


@dataclass(frozen=True)
class _Site:
    """An ellipse in which a lesion's centre may lie."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class _Canvas:
    """Coordinates of the pixels' centres in the patient, `x` and `y` of shape `(size, size)`."""

    size: int
    x: FloatImage
    y: FloatImage

    def radius(self, x: float, y: float, width: float = 1.0, height: float = 1.0) -> FloatImage:
        """Distance from a point in units of these half axes, shape `(size, size)`."""
        return np.asarray(np.sqrt(((self.x - x) / width) ** 2 + ((self.y - y) / height) ** 2), dtype=np.float32)

    def ellipse(self, x: float, y: float, width: float, height: float, edge: float = 0.0) -> FloatImage:
        """Coverage in [0, 1] of an ellipse with these half axes and an edge this wide."""
        return self.inside((self.radius(x, y, width, height) - 1.0) * min(width, height), edge)

    def line(self, distance: NDArray[np.floating], half_width: float) -> FloatImage:
        """Coverage of a stroke, from the distance to its axis."""
        return self.inside(np.abs(distance) - half_width, half_width)

    def inside(self, signed_distance: NDArray[np.floating], edge: float = 0.0) -> FloatImage:
        """Coverage from a signed distance (negative inside); never sharper than a pixel."""
        ramp = 0.5 - signed_distance / max(edge, 2.0 / self.size)
        return np.asarray(np.clip(ramp, 0.0, 1.0), dtype=np.float32)


def draw_phantom(
    rng: np.random.Generator, modality: str, label: str, size: int, *, frame: int = 0
) -> tuple[FloatImage, NDArray[np.bool_]]:
    """Draw a body part with one lesion, as it is meant to be displayed.

    Args:
        rng: source of anatomy, lesion and noise. Generators in the same state draw the same
            patient, whatever `frame` is.
        modality: `DX` (frontal chest film), `CT` (chest slice) or `MR` (brain slice).
        label: `nodule` (bright solid disc), `cavity` (bright ring, dark centre) or
            `consolidation` (large soft irregular blob).
        size: rows and columns in pixels.
        frame: slices away from the lesion's middle; its size falls by a tenth a slice, and each
            slice has noise of its own.

    Returns:
        The picture, float32 in [0, 1], shape `(size, size)`, and the lesion's mask (a cavity's
        with its hole), bool, same shape. Lesions are 8 to 25 % of the side across at `frame=0`.

    Raises:
        ValueError: an unknown modality or label, or a size below 32.
    """
    if modality not in _ANATOMY or label not in CLASSES or size < 32:
        raise ValueError(
            f"Expected a modality of {MODALITIES}, a label of {CLASSES} and a size of at least 32, "
            f"but got {modality!r}, {label!r} and {size}."
        )
    canvas = _canvas(rng, size)
    image, sites = _ANATOMY[modality](rng, canvas)
    image, mask = _add_lesion(rng, canvas, image, label, sites[int(rng.integers(len(sites)))], frame=frame)
    noise = np.random.default_rng([int(rng.integers(1 << 32)), frame % (1 << 16)])
    grain = noise.standard_normal(image.shape, dtype=np.float32)
    # A second, smoothed share makes the grain the same at every size.
    image = image + 0.012 * grain + 0.02 * _texture(noise, size, 48)
    return np.clip(image, 0.0, 1.0).astype(np.float32), mask


def _canvas(rng: np.random.Generator, size: int) -> _Canvas:
    """A canvas on which a patient lies a little tilted and beside the middle."""
    tilt = math.radians(rng.uniform(-_MOST_TILT_DEGREES, _MOST_TILT_DEGREES))
    cosine, sine = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
    right, down = rng.uniform(-_MOST_SHIFT, _MOST_SHIFT, 2).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = axis[None, :] - right, axis[:, None] - down
    return _Canvas(size, cosine * x + sine * y, cosine * y - sine * x)


def _chest_film(rng: np.random.Generator, at: _Canvas) -> tuple[FloatImage, list[_Site]]:
    """A frontal chest film: dark lungs, ribs, spine, heart, diaphragm."""
    lung_x, lung_y = rng.uniform(0.38, 0.44), rng.uniform(-0.12, 0.0)
    width, height = rng.uniform(0.27, 0.32), rng.uniform(0.58, 0.66)
    image = 0.62 - rng.uniform(-0.08, 0.08) * at.x + 0.08 * at.y + 0.04 * _texture(rng, at.size, 5)
    body = at.ellipse(0.0, 0.45, 0.98, rng.uniform(1.30, 1.42), 0.08)
    image = 0.03 + (image - 0.03) * body
    lungs = np.maximum(
        at.ellipse(-lung_x, lung_y, width, height, 0.09), at.ellipse(lung_x, lung_y, width, height, 0.09)
    )
    image = _blend(image, 0.20 + 0.04 * _texture(rng, at.size, 10), lungs)
    first, step, sag = rng.uniform(-0.75, -0.68), rng.uniform(0.17, 0.20), rng.uniform(0.18, 0.34)
    for rib in range(8):
        axis = at.y - (first + step * rib + sag * (np.abs(at.x) - 0.3) ** 2 * 2.0)
        image = image + 0.09 * at.line(axis, 0.02) * body * (np.abs(at.x) < 0.86)
    image = image + 0.16 * at.line(at.y + 0.72 + 0.22 * np.abs(at.x), 0.025) * body
    image = _blend(image, 0.74, at.line(at.x, rng.uniform(0.07, 0.10)) * body * 0.7)
    heart = at.ellipse(0.12, lung_y + 0.36, rng.uniform(0.26, 0.32), rng.uniform(0.24, 0.30), 0.06)
    image = _blend(image, 0.68, 0.9 * heart)
    dome = rng.uniform(0.42, 0.52) + 0.5 * (np.abs(at.x) - lung_x) ** 2
    image = _blend(image, 0.72, at.inside(dome - at.y, 0.05) * body)
    return image, [
        _Site(-lung_x, lung_y - 0.08, 0.08, 0.26),
        _Site(lung_x + 0.02, lung_y - 0.24, 0.08, 0.14),
    ]


def _chest_slice(rng: np.random.Generator, at: _Canvas) -> tuple[FloatImage, list[_Site]]:
    """An axial chest slice under a soft-tissue window: black air, grey tissue, white bone."""
    wide, tall = rng.uniform(0.84, 0.93), rng.uniform(0.64, 0.74)
    lung_x, lung_y = rng.uniform(0.43, 0.48), rng.uniform(-0.04, 0.04)
    tissue = rng.uniform(0.46, 0.54)
    image = tissue * at.ellipse(0.0, 0.0, wide, tall)
    fat = at.ellipse(0.0, 0.0, wide, tall) - at.ellipse(0.0, 0.0, wide - 0.07, tall - 0.07)
    image = image - 0.32 * fat + 0.03 * _texture(rng, at.size, 12) * (image > 0)
    width, height = rng.uniform(0.29, 0.33), rng.uniform(0.42, 0.48)
    for side in (-1.0, 1.0):
        image = _blend(image, 0.02, at.ellipse(side * lung_x, lung_y, width, height, 0.02))
    image = _blend(image, tissue + 0.06, at.ellipse(0.10, -0.14, 0.25, 0.21, 0.02))
    turn = rng.uniform(0.0, 0.4)
    for rib in range(14):
        angle = turn + rib * math.pi / 7.0
        rib_x, rib_y = (wide - 0.11) * math.cos(angle), (tall - 0.11) * math.sin(angle)
        image = _blend(image, 0.98, at.ellipse(rib_x, rib_y, 0.045, 0.03))
    spine = at.ellipse(0.0, tall - 0.24, 0.13, 0.10)
    image = _blend(image, 0.97, spine)
    image = _blend(image, 0.45, at.ellipse(0.0, tall - 0.10, 0.05, 0.04))
    table = at.line(at.y - (0.90 - 0.10 * at.x**2), 0.012)
    image = _blend(image, 0.35, table)
    return image, [_Site(side * lung_x, lung_y, 0.05, 0.17) for side in (-1.0, 1.0)]


def _brain_slice(rng: np.random.Generator, at: _Canvas) -> tuple[FloatImage, list[_Site]]:
    """An axial head slice: scalp, dark skull, cortex, white matter, ventricles, a coil's shading."""
    wide, tall = rng.uniform(0.66, 0.78), rng.uniform(0.80, 0.92)
    image = 0.02 + 0.66 * at.ellipse(0.0, 0.0, wide, tall, 0.02)
    image = _blend(image, 0.05, at.ellipse(0.0, 0.0, wide - 0.06, tall - 0.06, 0.02))
    brain = at.ellipse(0.0, 0.0, wide - 0.12, tall - 0.12, 0.03)
    folds = 0.03 * _texture(rng, at.size, 26)
    image = _blend(image, 0.34 + folds, brain)
    white = at.inside(at.radius(0.0, 0.0, wide - 0.24, tall - 0.24) - 1.0 + 2.0 * folds, 0.10)
    image = _blend(image, 0.45 + 0.3 * folds, white)
    image = _blend(image, 0.12, at.line(at.x, 0.010) * brain * 0.7)
    tilt = rng.uniform(0.25, 0.45)
    for side in (-1.0, 1.0):
        bow = side * at.x - 0.08 - tilt * at.y**2
        squared = (bow / 0.05) ** 2 + (at.y / rng.uniform(0.22, 0.30)) ** 2
        image = _blend(image, 0.12, at.inside(squared - 1.0, 0.6))
    shade = 1.0 + rng.uniform(-0.1, 0.1) * at.x + rng.uniform(-0.1, 0.1) * at.y
    sites = [_Site(side * 0.36, y, 0.05, 0.08) for side in (-1.0, 1.0) for y in (-0.26, 0.26)]
    return image * shade, sites


_ANATOMY: dict[str, Callable[[np.random.Generator, _Canvas], tuple[FloatImage, list[_Site]]]] = {
    "DX": _chest_film,
    "CT": _chest_slice,
    "MR": _brain_slice,
}


def _add_lesion(
    rng: np.random.Generator, at: _Canvas, image: FloatImage, label: str, site: _Site, *, frame: int
) -> tuple[FloatImage, NDArray[np.bool_]]:
    angle, reach = rng.uniform(0.0, 2.0 * math.pi), math.sqrt(rng.uniform(0.0, 1.0))
    x, y = site.x + site.width * reach * math.cos(angle), site.y + site.height * reach * math.sin(angle)
    shrink = max(0.4, 1.0 - _SHRINK_PER_FRAME * abs(frame))
    radius = 0.5 * rng.uniform(*_DIAMETERS[label]) * shrink
    distance = at.radius(x, y)
    grey = _LESION_GREY[label] + rng.uniform(-0.03, 0.03)
    if label == "consolidation":
        cover = _blob(rng, at, x, y, radius)
        speckle = 0.07 * _texture(rng, at.size, 40)
        return _blend(image, grey + speckle, cover), cover > 0.5
    image = _blend(image, grey, at.inside(distance - radius, 0.015))
    if label == "cavity":
        image = _blend(image, _HOLE_GREY, at.inside(distance - radius * rng.uniform(0.52, 0.64), 0.015))
    return image, distance < radius


def _blob(rng: np.random.Generator, at: _Canvas, x: float, y: float, radius: float) -> FloatImage:
    """Coverage of a soft blob whose outline waves about and stays within `radius`."""
    theta = np.arctan2(at.y - y, at.x - x)
    outline = np.zeros_like(theta)
    for waves in (2, 3, 5):
        outline += rng.uniform(0.04, 0.10) * np.cos(waves * theta + rng.uniform(0.0, 2.0 * math.pi))
    limit = radius * (1.0 + outline) / (1.0 + float(outline.max()))
    return at.inside(at.radius(x, y) - limit, 0.5 * radius)


def _blend(image: FloatImage, grey: float | FloatImage, cover: FloatImage) -> FloatImage:
    return np.asarray(image + (grey - image) * cover, dtype=np.float32)


def _texture(rng: np.random.Generator, size: int, cells: int) -> FloatImage:
    """Smooth noise of unit spread with about `cells` bumps a side, shape `(size, size)`."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, dtype=np.float32)
