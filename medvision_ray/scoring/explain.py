"""Why a model said so: Grad-CAM for a class, and the outlines of a mask.

Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) weighs the channels of the encoder's deepest feature map by the
gradient of the class's logit and keeps what speaks for the class. The gradient is taken at each place, as in HiResCAM
(Draelos and Carin 2020), not its mean: of a head that averages over the image both are the same, but a mask-guided head
looks where the mask is, and the mean forgets that (docs/metrics.md has figures). The map is as coarse as the feature
map (a thirty-second of the input's side with five stages), so it shows a region and no outline. It tells what the model
used, not whether that is right.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medvision_ray.errors import MedVisionError
from medvision_ray.imaging.grid import GridTransform
from medvision_ray.learning.model import HybridCNN
from medvision_ray.precision import exact_float32

_PART_FRAMES = 8
"""Inputs that are explained at once: a gradient keeps the activations of all of the heads."""


def grad_cam(
    model: nn.Module, pixels: NDArray[np.uint8], classes: int | NDArray[np.integer] | None = None
) -> NDArray[np.float32]:
    """Grad-CAM of each input, on the device the model is on, in float32 whatever precision predicts.

    With mirrored views (`test_time_flips`) the map is the mean over views; with several networks inside `model` the
    mean over networks, each scaled by its own largest. Of a mask-guided head it shows what comes through the deepest
    feature map; what that head takes from shallower ones by the mask is seen in the mask.

    Args:
        model: a `HybridCNN`, or a module with some inside, in evaluation mode; folded or not.
        pixels: prepared inputs, shape `(N, C, H, W)`, 0 to 255.
        classes: index of the class, one for all or one an input; None takes each input's largest logit.

    Returns:
        Shape `(N, H, W)` in [0, 1]: 1 where an input's evidence for the class is strongest, 0 where there is none;
        all 0 where nothing in the deepest feature map speaks for the class. Values of two inputs do not compare.

    Raises:
        MedVisionError: the model has no classification head, or no such class.
    """
    networks = [part for part in model.modules() if isinstance(part, HybridCNN) and part.classification_head]
    if not networks:
        raise MedVisionError(
            "Expected a model with a classification head to explain, but it has none: its mask is all it says."
        )
    device = networks[0].mean.device
    parts = [np.empty((0, *pixels.shape[2:]), np.float32)]
    # Whoever asks may be in inference mode, whose tensors take part in no gradient.
    with torch.inference_mode(False), torch.enable_grad(), exact_float32(device.type):
        for batch, chosen in _batches(pixels, classes):
            inputs = torch.from_numpy(batch).to(device).contiguous(memory_format=torch.channels_last)
            known = _chosen(model, inputs, chosen)
            maps = [_scaled(_evidence(network, inputs, known), inputs.shape[-2:]) for network in networks]
            mean = torch.stack(maps).mean(dim=0)
            parts.append(_of_its_largest(mean).cpu().numpy())
    return np.concatenate(parts)


def to_source(explanation: NDArray[np.float32], transform: GridTransform) -> NDArray[np.float32]:
    """One map of `grad_cam` on the image's own grid, bilinear, the model's padding cut off.

    Args:
        explanation: shape `(H, W)`.
        transform: of the prepared object.

    Returns:
        Shape `(rows, columns)` in [0, 1].

    Raises:
        ValueError: the map is not on this model's grid.
    """
    if explanation.shape != transform.model_shape:
        raise ValueError(f"Expected a map of shape {transform.model_shape}, but got {explanation.shape}.")
    rows = slice(transform.top, transform.top + transform.height)
    columns = slice(transform.left, transform.left + transform.width)
    size = (transform.source_shape[1], transform.source_shape[0])
    resized = cv2.resize(np.ascontiguousarray(explanation[rows, columns]), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.float32)


def mask_outlines(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Outlines of a mask's regions and of the holes in them (Suzuki and Abe 1985, by OpenCV).

    Args:
        mask: shape `(rows, columns)`.

    Returns:
        A closed polygon an outline, its points `(column, row)` in pixels: centres of the outermost pixels inside (of a
        hole: of the pixels around it), the last one joined to the first. A region of one pixel is one point.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [[(int(column), int(row)) for column, row in outline.reshape(-1, 2)] for outline in found]


def _batches(
    pixels: NDArray[np.uint8], classes: int | NDArray[np.integer] | None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.integer] | None]]:
    each = None if classes is None else np.broadcast_to(np.asarray(classes, np.int64), (len(pixels),))
    for start in range(0, len(pixels), _PART_FRAMES):
        part = slice(start, start + _PART_FRAMES)
        yield pixels[part], None if each is None else each[part]


def _chosen(model: nn.Module, inputs: Tensor, classes: NDArray[np.integer] | None) -> Tensor:
    """The class to explain of each input, `(N,)`."""
    if classes is None:
        with torch.no_grad():
            logits: Tensor = model(inputs).logits
        return logits.argmax(dim=1)
    return torch.as_tensor(classes.copy(), device=inputs.device)


def _evidence(network: HybridCNN, inputs: Tensor, classes: Tensor) -> Tensor:
    """What each place adds to the logit through the deepest features, `(N, h, w)`; the mean over mirrored views."""
    axes = network.flip_axes
    views = torch.cat([inputs, *[inputs.flip(axis) for axis in axes]])
    with torch.no_grad():
        features = network.encode(views)
    deepest = features[-1].detach().requires_grad_()
    logits = network.score_features([*features[:-1], deepest]).logits
    if logits is None or not bool(((classes >= 0) & (classes < logits.shape[1])).all()):
        known = 0 if logits is None else logits.shape[1]
        raise MedVisionError(f"Expected the index of one of {known} classes to explain, but got another.")
    score = logits.gather(1, classes.repeat(1 + len(axes)).unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, deepest)
    plain, *mirrored = (gradient * deepest.detach()).sum(dim=1).chunk(1 + len(axes))
    back = [view.flip(axis) for view, axis in zip(mirrored, axes, strict=True)]
    return torch.stack([plain, *back]).mean(dim=0)


def _scaled(evidence: Tensor, size: torch.Size) -> Tensor:
    """What speaks for the class, on the input's grid, of its largest."""
    grown = F.interpolate(evidence.relu().unsqueeze(1), size=list(size), mode="bilinear", align_corners=False)
    return _of_its_largest(grown.squeeze(1))


def _of_its_largest(maps: Tensor) -> Tensor:
    largest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest.clamp(min=torch.finfo(maps.dtype).tiny), torch.zeros_like(maps))
