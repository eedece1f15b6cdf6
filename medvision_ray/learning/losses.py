"""The masked multi-task loss: a sample without a label or a mask adds nothing to that term."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from medvision_ray.config import LossConfig
from medvision_ray.learning.model import HybridOutput

_DICE_SMOOTH = 1.0
_LARGEST_POSITIVE_WEIGHT = 100.0


class LossParts(NamedTuple):
    """Scalars in float32: the weighted sum to go back from, and each term before its weight."""

    total: Tensor
    classification: Tensor
    segmentation: Tensor


class MultiTaskLoss(nn.Module):
    """Cross entropy of the classes, or another loss of theirs, plus binary cross entropy and soft Dice of the mask.

    Single label: `F.cross_entropy`, or `focal_cross_entropy`. Multi-label: binary cross entropy, torchvision's
    `sigmoid_focal_loss` or `asymmetric_loss`, averaged over the findings that are not blank.
    Segmentation: binary cross entropy over pixels plus one minus soft Dice (Milletari et al. 2016, smoothed by 1), each
    per image, averaged over the images that have a mask; every image weighs the same however large its lesion.

    Where no sample of a batch has a term, the term is zero but keeps its graph, so that DDP gets a gradient for every
    parameter. All is computed in float32, under autocast too.

    Args:
        config: weights of the terms, label smoothing.
        class_weights: `(K,)`; single label: weight of each class; multi-label: weight of each finding's positives.
        multi_label: classes are findings that may occur together.
    """

    class_weights: Tensor | None

    def __init__(self, config: LossConfig, class_weights: Tensor | None, multi_label: bool) -> None:
        super().__init__()
        self.config = config
        self.multi_label = multi_label
        self.register_buffer("class_weights", None if class_weights is None else class_weights.float())

    def forward(
        self, output: HybridOutput, labels: Tensor, targets: Tensor | None, masks: Tensor | None, has_mask: Tensor
    ) -> LossParts:
        """Compute the loss of a batch.

        Args:
            output: of the model.
            labels: class index `(N,)` int64, -1 for none; not looked at where `multi_label`.
            targets: 0 or 1 a finding, NaN for blank, `(N, K)` float32; needed where `multi_label`.
            masks: uint8 `(N, H, W)`, above 0 is lesion; None where the model has no decoder.
            has_mask: bool `(N,)`; the mask of an image without one is not looked at.
        """
        with torch.autocast(device_type=has_mask.device.type, enabled=False):
            zero = torch.zeros((), device=has_mask.device)
            classification = segmentation = zero
            if output.logits is not None:
                classification = self._classification(output.logits.float(), labels, targets)
            if output.mask_logits is not None and masks is not None:
                segmentation = mask_loss(output.mask_logits.float(), masks, has_mask)
            elif output.mask_logits is not None:
                segmentation = output.mask_logits.float().sum() * 0.0
            weights = self.config.classification_weight, self.config.segmentation_weight
            return LossParts(weights[0] * classification + weights[1] * segmentation, classification, segmentation)

    def _classification(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if not self.multi_label:
            total = self._of_classes(logits, labels)
            known = (labels >= 0).float()
            weights = known if self.class_weights is None else known * self.class_weights[labels.clamp(min=0)]
            # Torch's own mean is 0 / 0 where no sample has a label; asking first would wait for a GPU.
            return total / torch.where(weights.sum() > 0, weights.sum(), 1.0)
        if targets is None:
            raise ValueError("Expected `targets` (N, K) for a multi-label loss, but got None.")
        known = ~torch.isnan(targets)
        terms = self._of_findings(logits, torch.where(known, targets, 0.0))
        return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)

    def _of_classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the labelled samples, each times its class's weight."""
        if self.config.classification == "focal":
            return focal_cross_entropy(logits, labels, self.class_weights, self.config.focal_gamma)
        smoothing = self.config.label_smoothing
        return F.cross_entropy(
            logits, labels, self.class_weights, ignore_index=-1, label_smoothing=smoothing, reduction="sum"
        )

    def _of_findings(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Each finding's loss, `(N, K)`; a positive counts as often as its finding weighs."""
        if self.config.classification == "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.class_weights, reduction="none")
        if self.config.classification == "focal":
            terms: Tensor = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=self.config.focal_gamma)
        else:
            terms = asymmetric_loss(logits, targets, self.config.asymmetric_gammas, self.config.asymmetric_margin)
        return terms if self.class_weights is None else terms * torch.where(targets == 1, self.class_weights, 1.0)


def focal_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None, gamma: float) -> Tensor:
    """Sum over the labelled samples of weight * (1 - p)^gamma * -log p of the true class (Lin et al. 2017, equation 4).

    Args:
        logits: `(N, K)` float32.
        labels: `(N,)` int64, -1 for none.
        class_weights: `(K,)`.
        gamma: focusing, at least 1.
    """
    surprise = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    focused = surprise * (-torch.expm1(-surprise)) ** gamma  # 1 - p without cancellation
    weights = (labels >= 0).float()
    if class_weights is not None:
        weights = weights * class_weights[labels.clamp(min=0)]
    return (focused * weights).sum()


def asymmetric_loss(logits: Tensor, targets: Tensor, gammas: tuple[float, float], margin: float) -> Tensor:
    """Asymmetric loss of each finding (Ben-Baruch et al., ICCV 2021, equations 5 to 7), `(N, K)`.

    timm's `AsymmetricLossMultiLabel` is the same, reduced: without weights, and without blanks to leave out.

    Args:
        logits: `(N, K)` float32.
        targets: 0 or 1, `(N, K)`.
        gammas: focusing of positives and of negatives.
        margin: subtracted from the probability of a negative.
    """
    # The smallest floats in place of 0: a root has no finite gradient there.
    smallest = torch.finfo(torch.float32).tiny
    shifted = (logits.sigmoid() - margin).clamp(min=smallest)
    missing = (-logits).sigmoid().clamp(min=smallest)
    # With a margin the logarithm's argument is at least the margin; without, softplus keeps it finite.
    surprise = -torch.log1p(-shifted) if margin else F.softplus(logits)
    return torch.where(targets == 1, missing ** gammas[0] * F.softplus(-logits), shifted ** gammas[1] * surprise)


def mask_loss(mask_logits: Tensor, masks: Tensor, has_mask: Tensor) -> Tensor:
    """Binary cross entropy plus one minus soft Dice, averaged over the images that have a mask.

    Args:
        mask_logits: `(N, H, W)` float.
        masks: `(N, H, W)`, above 0 is lesion.
        has_mask: bool `(N,)`.
    """
    logits = mask_logits.flatten(1)
    truth = (masks > 0).flatten(1).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=1)
    probability = logits.sigmoid()
    overlap = 2.0 * (probability * truth).sum(dim=1) + _DICE_SMOOTH
    dice = overlap / (probability.sum(dim=1) + truth.sum(dim=1) + _DICE_SMOOTH)
    # All images are computed and some left out: choosing first would wait for a GPU to say how many.
    return torch.where(has_mask, entropy + 1.0 - dice, 0.0).sum() / has_mask.sum().clamp(min=1)


def balanced_class_weights(labels: Tensor, n_classes: int) -> Tensor:
    """Weights that make every class count the same.

    Args:
        labels: of the train split; class indices `(n,)` with -1 for none, or findings `(n, K)` of 0, 1 and NaN.
        n_classes: K.

    Returns:
        `(K,)` float32. Classes: images over (K times images of the class), as scikit-learn's `balanced`. Findings:
        negatives over positives, at most 100. A class without an image weighs 1, and so does a finding without a positive or
        without a negative one.
    """
    if labels.ndim == 2:
        positive = (labels == 1).sum(dim=0).float()
        negative = (labels == 0).sum(dim=0).float()
        both = (positive > 0) & (negative > 0)
        return torch.where(both, (negative / positive).clamp(max=_LARGEST_POSITIVE_WEIGHT), 1.0)
    counts = torch.bincount(labels[labels >= 0], minlength=n_classes).float()
    return torch.where(counts > 0, counts.sum() / (n_classes * counts), 1.0)
