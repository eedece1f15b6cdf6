"""A network made ready for inference: batch normalisations folded into the convolutions before them.

In evaluation mode a batch normalisation is a scale and a shift a channel, which the convolution's own weights can
carry (Jacob et al. 2018, section 3.2); on CPUs the saved passes over memory are a tenth of the time
(benchmarks/score_vs_dataloader.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-4
"""Largest difference between logits before and after, of the largest logit; float32 rounds to a thousandth of it."""


@dataclass(frozen=True)
class InferenceModel:
    """A network and what a forward pass of it takes.

    Attributes:
        network: in evaluation mode, on the CPU.
        activation_bytes: largest output of a layer for one frame.
    """

    network: nn.Module
    activation_bytes: int


def fold_batch_norms(model: nn.Module, probe: Tensor) -> InferenceModel:
    """Fold what can be folded; a model whose outputs would change by more than rounding is left as it is.

    Args:
        model: in evaluation mode, float32, on the CPU; not changed.
        probe: an input of one frame, `(1, C, H, W)`.
    """
    with torch.inference_mode(False), torch.no_grad():
        pairs, expected, activation_bytes = _pairs(model, probe)
        folded = copy.deepcopy(model)
        for conv, norm in pairs:
            _fold(folded, conv, norm)
        if not all(_close(before, after) for before, after in zip(expected, folded(probe), strict=True)):
            folded = model
    return InferenceModel(folded, activation_bytes)


def _pairs(model: nn.Module, probe: Tensor) -> tuple[list[tuple[str, str]], tuple[Tensor | None, ...], int]:
    """Names of each convolution and the normalisation that takes its output, the model's outputs, the largest output."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by identity; the tensor is kept so that no other gets its address
    pairs: list[tuple[str, str]] = []
    largest = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs.append((names[made.pop(id(inputs[0]))[0]], names[module]))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        outputs: tuple[Tensor | None, ...] = model(probe)
    finally:
        for hook in hooks:
            hook.remove()
    calls = [name for pair in pairs for name in pair]
    return [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)], outputs, largest


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
        raise TypeError(f"Expected a convolution and a batch normalisation, but got {type(conv)} and {type(norm)}.")
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return  # it normalises by each batch, in evaluation too
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    parent, _, name = norm_name.rpartition(".")
    # timm's normalisations bring their activation along.
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    setattr(model.get_submodule(parent), name, nn.Sequential(*rest) if rest else nn.Identity())


def _close(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return before is after
    return bool((before - after).abs().max() <= _TOLERANCE * before.abs().max().clamp(min=1.0))
