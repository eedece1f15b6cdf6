"""Folded networks predict what the trained ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.learning.model import build_model
from medvision_ray.scoring.folding import fold_batch_norms

_PREPROCESS = PreprocessConfig(size=(64, 64))


def _trained(encoder: str) -> nn.Module:
    """A network whose normalisations are not what they were initialised with."""
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, decoder_channels=(16, 16, 8, 8, 8))
    model = build_model(config, _PREPROCESS, 3, for_training=False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low, high in (
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 1.5),
            ):
                assert value is not None
                nn.init.uniform_(value, low, high)
    return model.eval()


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv3_small_050", "resnet18", "tu-convnext_atto"])
@torch.inference_mode()
def test_folded_network_gives_the_same_outputs(encoder: str) -> None:
    model = _trained(encoder)
    images = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    ready = fold_batch_norms(model, images[:1])
    assert ready.network is not model
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in ready.network.modules())
    for before, after in zip(model(images), ready.network(images), strict=True):
        torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)


def test_the_trained_network_is_not_changed() -> None:
    model = _trained("resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold_batch_norms(model, torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class _Reused(nn.Module):
    """Its convolution's output goes to the normalisation and past it: folding would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y = self.conv(x.float())
        return self.norm(y) + y, None


def test_network_that_folding_would_change_is_left_as_it_is() -> None:
    model = _Reused().eval()
    assert fold_batch_norms(model, torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)).network is model


def test_largest_activation_is_of_one_frame() -> None:
    ready = fold_batch_norms(_trained("resnet18"), torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
    assert ready.activation_bytes == 64 * 32 * 32 * 4  # the stem's 64 channels at half size
