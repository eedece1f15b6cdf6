"""The network of a bundle made ready for inference; that of an ensemble asks every member and combines what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medvision_ray.bundle import Bundle
from medvision_ray.bundle_fields import Vote
from medvision_ray.ensemble import TIE_WEIGHT
from medvision_ray.learning.model import HybridOutput
from medvision_ray.scoring.folding import InferenceModel, fold_batch_norms

_MASK_EPS = 1e-7


class VotingNetwork(nn.Module):
    """Members side by side; its logits are those whose softmax or sigmoid is the combined probability (`ensemble`).

    So whoever takes logits of a single network takes these, and a temperature or a Platt scaling fitted on them is one
    of the whole.

    Args:
        members: networks that give a `HybridOutput`; some may lack a head.
        thresholds: multi-label: those of each member with a classification head, `(members with it, K)`; else None.
        offsets: single-label: the `class_offsets` of each, `(members with a head, K)`; None where no member has any.
    """

    thresholds: Tensor | None
    offsets: Tensor | None

    def __init__(
        self, members: Sequence[nn.Module], vote: Vote, thresholds: Tensor | None, offsets: Tensor | None = None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.vote = vote
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x: Tensor) -> HybridOutput:
        """Score a batch of pixels `(N, C, H, W)`, as `HybridCNN` takes them."""
        classified: list[Tensor] = []
        mask_sum: Tensor | None = None
        masking = 0
        for member in self.members:
            output: HybridOutput = member(x)
            if output.logits is not None:
                classified.append(output.logits.float())
            if output.mask_logits is not None:
                mask = output.mask_logits.float().sigmoid()
                mask_sum, masking = mask if mask_sum is None else mask_sum + mask, masking + 1
        logits = self._combined(torch.stack(classified)) if classified else None
        return HybridOutput(logits, None if mask_sum is None else torch.logit(mask_sum / masking, eps=_MASK_EPS))

    def _combined(self, logits: Tensor) -> Tensor:
        """Logits `(M, N, K)` of the members to logits `(N, K)` of the whole."""
        multi_label = self.thresholds is not None
        each = logits.sigmoid() if multi_label else logits.softmax(dim=2)
        combined = each.mean(dim=0)
        if self.vote == "majority":
            if self.thresholds is not None:
                votes = each >= self.thresholds[:, None, :]
            else:
                named = each if self.offsets is None else logits.log_softmax(dim=2) + self.offsets[:, None, :]
                votes = nn.functional.one_hot(named.argmax(dim=2), each.shape[2])
            combined = (1 - TIE_WEIGHT) * votes.float().mean(dim=0) + TIE_WEIGHT * combined
        tiny = torch.finfo(combined.dtype).tiny
        return torch.logit(combined, eps=_MASK_EPS) if multi_label else combined.clamp_min(tiny).log()


def inference_model(bundle: Bundle, probe: Tensor) -> InferenceModel:
    """A bundle's network with its normalisations folded, in evaluation mode, on the CPU; an ensemble's member by member.

    Args:
        probe: an input of one frame, `(1, C, H, W)`.
    """
    if bundle.vote is None:
        return fold_batch_norms(bundle.build_model().eval(), probe)
    ready = [fold_batch_norms(member.build_model().eval(), probe) for member in bundle.members]
    thresholds = offsets = None
    labelled = [member for member in bundle.members if member.classes]
    if bundle.multi_label:
        thresholds = torch.tensor([member.thresholds for member in labelled])
    elif any(member.class_offsets for member in labelled):
        none = (0.0,) * len(bundle.classes)
        offsets = torch.tensor([member.class_offsets or none for member in labelled])
    network = VotingNetwork([item.network for item in ready], bundle.vote, thresholds, offsets).eval()
    return InferenceModel(network, max(item.activation_bytes for item in ready))
