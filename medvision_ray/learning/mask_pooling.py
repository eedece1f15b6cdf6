"""A classification head that looks where the mask is: features pooled by the predicted lesion beside the whole image's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = 3
"""Deepest stages whose features are pooled by the mask: a small lesion is less than a cell of the last."""
_BACKGROUND = 1e-3
"""Weight of every pixel besides its lesion probability; without a lesion the pooling is a plain average."""


class MaskGuidedHead(nn.Module):
    """Classes from the average of the deepest features and from mask-weighted averages of the last stages.

    The mask's probabilities weigh the features but get no gradient from the classes: what is lesion is learnt from
    masks alone.

    Args:
        channels: of each feature map of the encoder, deepest last.
        n_classes: outputs.
        dropout: before the linear layer.
    """

    def __init__(self, channels: Sequence[int], n_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels[-1] + sum(channels[-_STAGES:]), n_classes)

    def forward(self, features: Sequence[Tensor], mask_logits: Tensor) -> Tensor:
        """Class logits `(N, K)`.

        Args:
            features: feature maps `(N, C, h, w)`, deepest last.
            mask_logits: `(N, H, W)` on the input's grid.
        """
        lesion = mask_logits.detach().float().sigmoid().unsqueeze(1)
        pooled = [features[-1].mean(dim=(2, 3)), *[mask_pool(part, lesion) for part in features[-_STAGES:]]]
        logits: Tensor = self.linear(self.dropout(torch.cat(pooled, dim=1)))
        return logits


def mask_pool(features: Tensor, lesion: Tensor) -> Tensor:
    """Average of features, each place weighed by its share of lesion, `(N, C)`.

    Args:
        features: `(N, C, h, w)`.
        lesion: probability `(N, 1, H, W)`, H and W multiples of h and w.
    """
    weights = F.adaptive_avg_pool2d(lesion, (features.shape[2], features.shape[3])) + _BACKGROUND
    weights = (weights / weights.sum(dim=(2, 3), keepdim=True)).to(features.dtype)
    return (features * weights).sum(dim=(2, 3))
