"""A picture with the predicted and the true mask drawn on it, or with the evidence for a class as heat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

SIDE = 320
"""Longer side of a picture in the report, in pixels."""
_JPEG_QUALITY = 88
_PREDICTED_BGR = (0, 159, 230)
_TRUE_BGR = (233, 180, 86)
_FILL = 0.22
_DASH, _PERIOD = 7, 12
_HEAT = 0.75
"""Most that heat covers of the picture below it."""


@dataclass(frozen=True, eq=False)
class Example:
    """One scored image to show.

    Attributes:
        image: the picture as displayed, uint8, shape `(H, W)`.
        predicted: predicted mask, bool, shape `(H, W)`; None where the model has no decoder.
        true: true mask, bool, shape `(H, W)`; None where it is not known.
        caption: a line below the picture. It must name no patient.
        heat: evidence for a class in [0, 1], shape `(H, W)`, drawn as a second picture beside the first; None without.
    """

    image: NDArray[np.uint8]
    predicted: NDArray[np.bool_] | None
    true: NDArray[np.bool_] | None
    caption: str
    heat: NDArray[np.float32] | None = None

    @property
    def described(self) -> str:
        """What the picture shows, for those who cannot see it."""
        drawn = [
            text
            for text, part in (
                ("the predicted mask outlined in orange", self.predicted),
                ("the true mask dashed in blue", self.true),
            )
            if part is not None
        ]
        beside = "; beside it the evidence for the class as heat" if self.heat is not None else ""
        return f"Image with {' and '.join(drawn) or 'no mask'}{beside}: {self.caption}."


def overlay(example: Example) -> bytes:
    """An example as JPEG, its longer side 320 px, heat in a panel to the right."""
    panels = [draw(example, SIDE)]
    if example.heat is not None:
        panels.append(draw_heat(example.image, example.heat, SIDE))
    options = (
        cv2.IMWRITE_JPEG_QUALITY,
        _JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    )
    _, encoded = cv2.imencode(".jpg", np.hstack(panels), options)
    return bytes(encoded.tobytes())


def draw(example: Example, side: int) -> NDArray[np.uint8]:
    """The picture, prediction filled and outlined in orange, truth dashed in blue, as BGR of shape `(h, w, 3)`.

    Args:
        side: of the longer side, in pixels.

    Raises:
        ValueError: the image is not 2-D uint8, or a mask has another shape.
    """
    canvas = _canvas(example.image, side)
    size = (canvas.shape[1], canvas.shape[0])
    if example.predicted is not None:
        inside = _resized(example.predicted, example.image, size) > 0.5
        tint = np.asarray(_PREDICTED_BGR, dtype=np.float32)
        canvas[inside] = np.rint(canvas[inside] * (1 - _FILL) + tint * _FILL).astype(np.uint8)
        cv2.drawContours(canvas, _outlines(inside), -1, _PREDICTED_BGR, 2, cv2.LINE_AA)
    if example.true is not None:
        _draw_dashed(canvas, _outlines(_resized(example.true, example.image, size) > 0.5))
    return canvas


def draw_heat(image: NDArray[np.uint8], heat: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """The picture with heat on it (matplotlib's `inferno`, even in lightness), the more of it the less is seen below.

    Raises:
        ValueError: the image is not 2-D uint8, or the heat has another shape.
    """
    canvas = _canvas(image, side)
    grown = _resized(heat, image, (canvas.shape[1], canvas.shape[0])).clip(0, 1)
    colored = _inferno_bgr()[np.rint(grown * 255).astype(np.uint8)]
    share = (_HEAT * np.sqrt(grown))[..., None]
    mixed: NDArray[np.uint8] = np.rint(canvas * (1 - share) + colored * share).astype(np.uint8)
    return mixed


@lru_cache
def _inferno_bgr() -> NDArray[np.float32]:
    table: NDArray[np.float32] = np.asarray(mpl.colormaps["inferno"](np.arange(256)), np.float32)
    return table[:, 2::-1] * 255


def _canvas(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"Expected an example image of shape (H, W) and type uint8, but got {image.shape} {image.dtype}."
        )
    scale = side / max(image.shape)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.repeat(shown[..., None], 3, axis=2)


def _resized(part: NDArray[np.generic], image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    if part.shape != image.shape:
        raise ValueError(f"Expected a mask on the image's grid {image.shape}, but got {part.shape}.")
    grown = cv2.resize(part.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(grown, dtype=np.float32)


def _outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return list(found)


def _draw_dashed(canvas: NDArray[np.uint8], outlines: list[NDArray[np.int32]]) -> None:
    for outline in outlines:
        for start in range(0, len(outline), _PERIOD):
            cv2.polylines(canvas, [outline[start : start + _DASH]], False, _TRUE_BGR, 2, cv2.LINE_AA)
