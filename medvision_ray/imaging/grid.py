"""GridTransform: the way of a mask between an image's own pixel grid and the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GridTransform:
    """Where an image lies within the model's grid.

    Attributes:
        source_shape: rows and columns of the image.
        model_shape: rows and columns of the model's input.
        top: first row of the image within the model's grid; rows above it are padding.
        left: first column likewise.
        height: rows that the image covers there.
        width: columns that the image covers there.
    """

    source_shape: tuple[int, int]
    model_shape: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def mask_to_source(self, probability: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
        """A model's probability map as a mask on the image's grid.

        Args:
            probability: shape `(H, W)`; floats in [0, 1], or uint8 where 255 is 1.
            threshold: a pixel is in the mask from this probability on, after bilinear resizing.

        Returns:
            Shape `(rows, columns)`.

        Raises:
            ValueError: `probability` is not on this model's grid.
        """
        if probability.shape != self.model_shape:
            raise ValueError(f"Expected a map of shape {self.model_shape}, but got {probability.shape}.")
        scale = 255.0 if probability.dtype == np.uint8 else 1.0
        box = probability[self.top : self.top + self.height, self.left : self.left + self.width].astype(np.float32)
        rows, columns = self.source_shape
        resized = cv2.resize(box, (columns, rows), interpolation=cv2.INTER_LINEAR)
        return np.asarray(resized >= np.float32(threshold * scale))

    def mask_to_model(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """A mask on the image's grid as 0 and 1 on the model's.

        A model pixel is in the mask where at least half of its area is. A lesion (8-connected
        component) of which nothing would be left keeps the pixel that it covers most.

        Args:
            mask: shape `(rows, columns)`; anything but 0 is in the mask.

        Raises:
            ValueError: `mask` is not on this image's grid.
        """
        if mask.shape != self.source_shape:
            raise ValueError(f"Expected a mask of shape {self.source_shape}, but got {mask.shape}.")
        binary = (mask != 0).astype(np.uint8)
        box = (self._share(binary) >= 0.5).astype(np.uint8)
        if binary.any():
            self._keep_small_lesions(binary, box)
        placed = np.zeros(self.model_shape, dtype=np.uint8)
        placed[self.top : self.top + self.height, self.left : self.left + self.width] = box
        return placed

    def _share(self, binary: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The share of each model pixel that the mask covers, shape `(height, width)`."""
        rows, columns = self.source_shape
        shrinks = self.height <= rows and self.width <= columns
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized = cv2.resize(binary.astype(np.float32), (self.width, self.height), interpolation=interpolation)
        return np.asarray(resized, dtype=np.float32)

    def _keep_small_lesions(self, binary: NDArray[np.uint8], box: NDArray[np.uint8]) -> None:
        count, labels = cv2.connectedComponents(binary, connectivity=8)
        rows, columns = np.nonzero(binary)
        model_rows = rows * self.height // self.source_shape[0]
        model_columns = columns * self.width // self.source_shape[1]
        label = labels[rows, columns]
        kept = np.bincount(label, weights=box[model_rows, model_columns], minlength=count) > 0
        for lost in np.flatnonzero(~kept[1:]) + 1:
            cells = model_rows[label == lost] * self.width + model_columns[label == lost]
            found, covered = np.unique(cells, return_counts=True)
            box.flat[found[int(np.argmax(covered))]] = 1


def fit(source_shape: tuple[int, int], model_shape: tuple[int, int], keep_aspect: bool) -> GridTransform:
    """Place an image in the model's grid: centred with its aspect kept, or stretched over all of it."""
    rows, columns = source_shape
    height, width = model_shape
    if keep_aspect:
        scale = min(height / rows, width / columns)
        height = min(max(round(rows * scale), 1), height)
        width = min(max(round(columns * scale), 1), width)
    top, left = (model_shape[0] - height) // 2, (model_shape[1] - width) // 2
    return GridTransform(source_shape, model_shape, top, left, height, width)
