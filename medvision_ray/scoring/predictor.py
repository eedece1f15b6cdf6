"""From a bundle to predictions for a batch of prepared inputs; batch jobs and serving share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle


@dataclass(frozen=True)
class Prediction:
    """Predictions for a batch.

    Attributes:
        probabilities: shape `(N, K)` in [0, 1]; rows sum to 1 unless the bundle is multi-label;
            None without a classification head.
        masks: lesion probability on the model's grid, shape `(N, H, W)`; None without a
            segmentation decoder.
    """

    probabilities: NDArray[np.float32] | None
    masks: NDArray[np.float32] | None


class Predictor:
    """A loaded model on one device.

    Args:
        precision: `bf16` runs the network under autocast; `float32` does not.
        device: torch device name; None takes a GPU where there is one.
    """

    def __init__(self, bundle: Bundle, precision: str = "bf16", device: str | None = None) -> None:
        self.bundle = bundle
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._autocast = precision == "bf16"
        model = bundle.build_model().eval().to(self.device)
        self._model = model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def predict(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Predict.

        Args:
            pixels: prepared inputs, shape `(N, C, H, W)`, 0 to 255.
        """
        batch = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            output = self._model(batch)
        probabilities = masks = None
        if output.logits is not None:
            logits = output.logits.float()
            scores = logits.sigmoid() if self.bundle.multi_label else logits.softmax(dim=1)
            probabilities = scores.cpu().numpy()
        if output.mask_logits is not None:
            masks = output.mask_logits.float().sigmoid().cpu().numpy()
        return Prediction(probabilities, masks)
