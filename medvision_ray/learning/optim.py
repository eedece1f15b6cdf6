"""Parameter groups, learning-rate schedule, freezing and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from medvision_ray.learning.model import HybridCNN

_PROBE_PIXELS = 64


def parameter_groups(model: HybridCNN, lr: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: heads at `lr`, encoder stages slower towards the input, no decay on biases and norms.

    A stage is the encoder's part that works at one resolution. The deepest learns at `lr * layer_decay`, the next
    towards the input at `lr * layer_decay**2`, and so on. Every parameter is in one group, frozen or not, so that
    freezing and unfreezing need no new optimizer.

    Returns:
        Dictionaries with `params`, `lr`, `initial_lr` (what a schedule multiplies), `weight_decay` and `name`.
    """
    stages = encoder_stages(model)
    deepest = max(stages.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        stage = stages[name.removeprefix("encoder.")] if name.startswith("encoder.") else deepest + 1
        decays = parameter.ndim > 1
        rate = lr * layer_decay ** (deepest + 1 - stage)
        label = "heads" if stage > deepest else f"encoder stage {stage}"
        group = groups.setdefault(
            (stage, decays),
            {
                "params": [],
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": label if decays else f"{label}, biases and norms",
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def encoder_stages(model: HybridCNN) -> dict[str, int]:
    """The stage of each encoder parameter: log2 of the stride of the feature map that its layer makes.

    Read off a forward pass, so it holds for every encoder whatever its layers are called. Layers that make no
    feature map (squeeze and excitation, tokens) belong to the stage before them; the number never falls on the way.
    """
    stages: dict[str, int] = {}
    current = 0

    def record(prefix: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal current
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:
                current = max(current, round(math.log2(_PROBE_PIXELS / output.shape[2])))
            for name, _ in module.named_parameters(recurse=False):
                stages.setdefault(f"{prefix}.{name}" if prefix else name, current)

        return hook

    training = model.training
    model.eval()  # keeps the statistics of the normalisation layers
    handles = [layer.register_forward_hook(record(prefix)) for prefix, layer in model.encoder.named_modules()]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model(torch.zeros(1, model.in_channels, _PROBE_PIXELS, _PROBE_PIXELS, device=device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    # A layer that the forward pass never calls gets no gradient; it counts as the last stage.
    return {name: stages.get(name, current) for name, _ in model.encoder.named_parameters()}


def freeze_encoder(model: HybridCNN, frozen: bool) -> None:
    """Freeze or unfreeze the encoder: its parameters ask for no gradient and its statistics stay, through `train()`.

    DDP looks at which parameters ask for gradients when it wraps a model: wrap again after each change.
    """
    for name, parameter in model.encoder.named_parameters():
        parameter.requires_grad_(not frozen and name in model.encoder_trainable)
        if frozen:
            parameter.grad = None
    model.encoder_frozen = frozen
    model.train(model.training)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 (Loshchilov and Hutter 2017, without restarts).

    Args:
        step: optimizer step, from 0.
        total_steps: steps of the whole training; from there on the factor is 0.
        warmup_steps: the last step of these has factor 1.
    """
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


class Ema:
    """Exponential moving average of a model's weights and normalisation statistics.

    The decay grows from 0.1 to `decay` as `(1 + updates) / (10 + updates)`, so that a short training is not dragged
    down by its random start. Whole-number buffers (counters) are copied.

    Attributes:
        module: the averaged model, in evaluation mode.
        decay: largest decay a step.
        updates: how many updates went in; saved with the state.
    """

    def __init__(self, model: HybridCNN, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: HybridCNN) -> None:
        """Take in the weights after an optimizer step; `model` is the bare model, not its DDP wrapper."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        floating = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        # All at once: hundreds of small calls would keep a GPU waiting.
        torch._foreach_lerp_([mean for mean, _ in floating], [value for _, value in floating], 1.0 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
