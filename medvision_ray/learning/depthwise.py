"""Depthwise convolutions whose bf16 gradients PyTorch computes slowly on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FAST_KERNEL = 3
_CACHED_VALUES = 1 << 20
"""Largest part of a batch that is turned to float32 at once; more would leave the processor's cache (5 times as slow)."""


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` whose gradients are computed in float32 where the forward pass is in bf16 on a CPU.

    oneDNN (torch 2.15) has no fast bf16 gradient for depthwise convolutions with a stride or a kernel above 3 x 3: it takes
    up to 70 times as long as in float32. The output, the parameters and their names are those of
    `nn.Conv2d`; gradients are the more exact ones.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Input `(N, C, H, W)`, as `nn.Conv2d`."""
        in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if not (in_bf16 and input.device.type == "cpu" and torch.is_grad_enabled()):
            return super().forward(input)
        output: Tensor = _Float32Backward.apply(input, self.weight, self.bias, self)
        return output


class _Float32Backward(torch.autograd.Function):
    """A convolution under autocast, with its gradients in float32."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.layer = layer
        return nn.functional.conv2d(images, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        layer = ctx.layer
        wanted = [*ctx.needs_input_grad[:2], layer.bias is not None and ctx.needs_input_grad[2]]
        of_images = torch.empty_like(images) if wanted[0] else None
        sums: list[Tensor | None] = [None, None]
        step = max(1, _CACHED_VALUES // images[0].numel())
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            of_part, *of_parameters = torch.ops.aten.convolution_backward(
                gradient[part].float(),
                images[part].float(),
                weight.float(),
                None if layer.bias is None else list(layer.bias.shape),
                list(layer.stride),
                list(layer.padding),
                list(layer.dilation),
                False,  # not transposed
                [0, 0],
                layer.groups,
                wanted,
            )
            if of_images is not None:
                of_images[part] = of_part
            sums = [new if old is None else old + new for old, new in zip(sums, of_parameters, strict=True)]
        return of_images, *sums, None


def speed_up_depthwise(model: nn.Module) -> None:
    """Turn the convolutions of a model that gain by it into `DepthwiseConv2d`, in place."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and _gains(layer):
            layer.__class__ = DepthwiseConv2d


def _gains(layer: nn.Conv2d) -> bool:
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return depthwise and plain and (max(layer.stride) > 1 or max(layer.kernel_size) > _FAST_KERNEL)
