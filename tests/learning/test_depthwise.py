"""Gradients of depthwise convolutions in float32 under bf16 autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from medvision_ray.learning import depthwise
from medvision_ray.learning.depthwise import DepthwiseConv2d, speed_up_depthwise

LAYERS = {
    "stride 2": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "5 x 5": {"kernel_size": 5, "padding": 2},
    "stride (1, 2)": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    "dilated": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "bias": False},
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def gradients(layer: nn.Module, images: Tensor, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the images and of each parameter, under autocast."""
    images = images.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    output.backward(direction.to(output.dtype))
    assert images.grad is not None
    return images.grad, {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cached_values", [1, 1000, 1 << 20])
def test_gradients_are_those_of_float64(name: str, cached_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or in parts, and nearer to it than PyTorch's own bf16 gradients."""
    monkeypatch.setattr(depthwise, "_CACHED_VALUES", cached_values)
    plain = nn.Conv2d(12, 12, groups=12, **LAYERS[name])
    with torch.no_grad():
        for value in plain.parameters():  # values that bf16 holds, so that it is the arithmetic that is compared
            value.copy_(value.bfloat16().float())
    images = torch.randn(5, 12, 14, 17).bfloat16().contiguous(memory_format=torch.channels_last)
    layer = copy.deepcopy(plain)
    speed_up_depthwise(layer)
    assert type(layer) is DepthwiseConv2d
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        direction = torch.randn_like(plain(images)).bfloat16()
        torch.testing.assert_close(layer(images), plain(images), rtol=0, atol=0)

    exact = copy.deepcopy(plain).double()
    wide = images.double().requires_grad_()
    exact(wide).backward(direction.double())
    assert wide.grad is not None
    of_images, of_parameters = gradients(layer, images, direction)
    _, bf16_parameters = gradients(plain, images, direction)

    torch.testing.assert_close(of_images.double(), wide.grad, rtol=2**-8, atol=1e-6)
    assert of_images.dtype == torch.bfloat16
    assert of_images.is_contiguous(memory_format=torch.channels_last)
    assert set(of_parameters) == set(bf16_parameters) == set(dict(exact.named_parameters()))
    for key, value in exact.named_parameters():
        torch.testing.assert_close(of_parameters[key].double(), value.grad, rtol=1e-5, atol=1e-4)
        assert (of_parameters[key] - value.grad).abs().max() <= (bf16_parameters[key] - value.grad).abs().max()


def test_without_autocast_nothing_differs() -> None:
    """A training in float32 is what it was, to the bit."""
    plain = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
    layer = copy.deepcopy(plain)
    speed_up_depthwise(layer)
    images = torch.randn(3, 8, 10, 10)
    found = []
    for kind in (plain, layer):
        inputs = images.clone().requires_grad_()
        kind(inputs).square().sum().backward()
        found.append((inputs.grad, kind.weight.grad, kind.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """A frozen layer, and the first layer of a network."""
    layer = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
    speed_up_depthwise(layer)
    layer.weight.requires_grad_(False)
    images = torch.randn(3, 8, 10, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).sum().backward()
    assert layer.weight.grad is None
    assert images.grad is not None
    assert images.grad.dtype == torch.float32

    layer.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(images.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_layers_that_gain_nothing_stay() -> None:
    """Dense, grouped and small depthwise convolutions, and those with a padding of their own."""
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, 2, 1, groups=4),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.Conv2d(8, 8, 5, 1, "same", groups=8),
        nn.Conv2d(8, 8, 5, 1, 2, groups=8, padding_mode="reflect"),
    )
    speed_up_depthwise(network)
    assert {type(layer) for layer in network} == {nn.Conv2d}


def test_a_copy_has_weights_of_its_own() -> None:
    """The moving average is a deep copy, and a bundle takes the names of `nn.Conv2d`."""
    layer = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4))
    names = set(layer.state_dict())
    speed_up_depthwise(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(torch.ones(1, 4, 6, 6)).abs().sum() == 0
        assert layer(torch.ones(1, 4, 6, 6)).abs().sum() > 0
    assert set(layer.state_dict()) == names
