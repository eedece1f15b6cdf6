"""HybridCNN: heads, normalisation inside, channels, encoders by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import ConfigError
from medvision_ray.learning.model import HybridCNN, build_model

Build = Callable[..., HybridCNN]


def pixels(n: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, 64, 64), dtype=torch.uint8)


def test_both_heads_give_class_logits_and_a_mask_on_the_input_grid(small_model: Build) -> None:
    output = small_model()(pixels())
    assert output.logits is not None
    assert output.mask_logits is not None
    assert (output.logits.shape, output.mask_logits.shape) == ((2, 3), (2, 64, 64))


def test_without_segmentation_no_decoder_is_built(small_model: Build) -> None:
    model = small_model(segmentation=False)
    assert model(pixels()).mask_logits is None
    assert not [name for name in model.state_dict() if name.startswith(("decoder", "segmentation"))]


def test_without_classification_no_class_logits(small_model: Build) -> None:
    model = small_model(n_classes=0, classification=False)
    assert model(pixels()).logits is None
    assert not [name for name in model.state_dict() if name.startswith("classification")]


def test_uint8_and_float_pixels_are_the_same_input(small_model: Build) -> None:
    model, x = small_model().eval(), pixels()
    torch.testing.assert_close(model(x).logits, model(x.float()).logits, rtol=0, atol=0)


def test_normalisation_is_that_of_the_preprocessing() -> None:
    seen: list[torch.Tensor] = []
    preprocess = PreprocessConfig(size=(64, 64), color="rgb", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model = build_model(ModelConfig(encoder="tu-resnet10t", in_channels=3), preprocess, 2).eval()
    model.encoder.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = pixels(channels=3)
    model(x)
    for channel in range(3):
        expected = (x[:, channel] / 255 - preprocess.mean[channel]) / preprocess.std[channel]
        torch.testing.assert_close(seen[0][:, channel], expected)


def test_grey_is_repeated_for_an_encoder_of_three_channels(small_model: Build) -> None:
    model, x = small_model(in_channels=3).eval(), pixels()
    torch.testing.assert_close(model(x).logits, model(x.expand(-1, 3, -1, -1)).logits)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_050", "tu-convnext_atto"])
def test_encoders_of_both_libraries_build_by_name(encoder: str, small_model: Build) -> None:
    output = small_model(encoder=encoder).eval()(pixels(1))
    assert output.mask_logits is not None
    assert output.mask_logits.shape == (1, 64, 64)


@pytest.mark.parametrize("widths", [(16, 16, 8, 8, 8), (16, 16, 8)])
def test_every_parameter_that_asks_for_a_gradient_gets_one(widths: tuple[int, ...], small_model: Build) -> None:
    """DDP hangs or raises otherwise; EfficientNet has a layer that no output comes from."""
    model = small_model(encoder="efficientnet-b0", decoder_channels=widths)
    output = model(pixels())
    assert output.logits is not None
    assert output.mask_logits is not None
    (output.logits.sum() + output.mask_logits.sum()).backward()
    unused = {name for name, value in model.named_parameters() if value.grad is None}
    assert unused
    assert unused == {name for name, value in model.named_parameters() if not value.requires_grad}


def test_an_unknown_encoder_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="`mobilenet_v2`"):
        build_model(ModelConfig(encoder="mobilnet_v2"), PreprocessConfig(), 2)
    with pytest.raises(ConfigError, match="`tu-resnet10t`"):
        build_model(ModelConfig(encoder="tu-resnet10tt"), PreprocessConfig(), 2)


def test_more_decoder_widths_than_the_encoder_has_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 stages"):
        build_model(ModelConfig(encoder="resnet18", decoder_channels=(8,) * 6), PreprocessConfig(), 2)


def test_a_classification_head_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one class"):
        build_model(ModelConfig(), PreprocessConfig(), 0)
