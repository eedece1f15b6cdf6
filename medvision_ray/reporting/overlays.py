"""An example picture with the predicted and the true mask drawn on it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 320
_PREDICTED_BGR = (0, 159, 230)
_TRUE_BGR = (233, 180, 86)
_FILL = 0.22
_DASH, _PERIOD = 7, 12


@dataclass(frozen=True, eq=False)
class Example:
    """One scored image to show.

    Attributes:
        image: the picture as displayed, uint8, shape `(H, W)`.
        predicted: predicted mask, bool, shape `(H, W)`; None where the model has no decoder.
        true: true mask, bool, shape `(H, W)`; None where it is not known.
        caption: a line below the picture. It must name no patient.
    """

    image: NDArray[np.uint8]
    predicted: NDArray[np.bool_] | None
    true: NDArray[np.bool_] | None
    caption: str


def overlay(example: Example) -> bytes:
    """Draw an example as PNG, its longer side 320 px: prediction filled and outlined in orange, truth dashed in blue.

    Raises:
        ValueError: the image is not 2-D uint8, or a mask has another shape.
    """
    image = example.image
    if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"Expected an example image of shape (H, W) and type uint8, but got {image.shape} {image.dtype}."
        )
    scale = _SIDE / max(image.shape)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    canvas = np.repeat(shown[..., None], 3, axis=2)
    if example.predicted is not None:
        inside = _resized(example.predicted, image, size)
        tint = np.asarray(_PREDICTED_BGR, dtype=np.float32)
        canvas[inside] = np.rint(canvas[inside] * (1 - _FILL) + tint * _FILL).astype(np.uint8)
        cv2.drawContours(canvas, _outlines(inside), -1, _PREDICTED_BGR, 2, cv2.LINE_AA)
    if example.true is not None:
        _draw_dashed(canvas, _outlines(_resized(example.true, image, size)))
    _, encoded = cv2.imencode(".png", canvas, (cv2.IMWRITE_PNG_COMPRESSION, 9))
    return bytes(encoded.tobytes())


def _resized(mask: NDArray[np.bool_], image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.bool_]:
    if mask.shape != image.shape:
        raise ValueError(f"Expected a mask on the image's grid {image.shape}, but got {mask.shape}.")
    grown = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(grown > 0.5)


def _outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return list(found)


def _draw_dashed(canvas: NDArray[np.uint8], outlines: list[NDArray[np.int32]]) -> None:
    for outline in outlines:
        for start in range(0, len(outline), _PERIOD):
            cv2.polylines(canvas, [outline[start : start + _DASH]], False, _TRUE_BGR, 2, cv2.LINE_AA)
