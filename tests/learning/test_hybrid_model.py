"""HybridCNN: heads, normalisation inside, channels, encoders by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import ConfigError
from medvision_ray.learning.mask_pooling import mask_pool
from medvision_ray.learning.model import HybridCNN, build_model
from medvision_ray.scoring.folding import fold_batch_norms

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


def test_mask_pooling_is_the_weighted_average_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0], [3.0, 40.0]]]])
    lesion = torch.zeros(1, 1, 8, 8)
    torch.testing.assert_close(mask_pool(features, lesion), torch.tensor([[11.5]]))  # no lesion: the plain average
    lesion[..., 4:, 4:] = 1.0
    weights = torch.tensor([0.001, 0.001, 0.001, 1.001])
    torch.testing.assert_close(mask_pool(features, lesion), (features.flatten() @ weights / weights.sum()).view(1, 1))


def test_mask_guided_classes_look_at_the_mask_but_do_not_teach_it(small_model: Build) -> None:
    model = small_model(pooling="mask_guided").eval()
    assert model.segmentation_head is not None
    x = pixels()
    before = model(x)
    assert before.logits.shape == (2, 3)
    before.logits.sum().backward()
    assert all(value.grad is None for value in model.segmentation_head.parameters())
    with torch.no_grad():
        model.segmentation_head[0].weight.mul_(-3.0)
        after = model(x)
    assert not torch.allclose(before.logits, after.logits)


def test_mask_guided_pooling_needs_both_heads() -> None:
    with pytest.raises(ValidationError, match="needs both"):
        ModelConfig(pooling="mask_guided", segmentation=False)


@pytest.mark.parametrize("pooling", ["average", "mask_guided"])
def test_test_time_flips_average_the_logits_of_the_mirrored_images(pooling: str, small_model: Build) -> None:
    model = small_model(pooling=pooling, test_time_flips=("horizontal", "vertical")).eval()
    x = pixels()
    with torch.no_grad():
        got = model(x)
        model.flip_axes = ()
        views = [model(x), model(x.flip(-1)), model(x.flip(-2))]
    logits = torch.stack([view.logits for view in views]).mean(dim=0)
    masks = torch.stack([views[0].mask_logits, views[1].mask_logits.flip(-1), views[2].mask_logits.flip(-2)]).mean(0)
    torch.testing.assert_close(got.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mask_logits, masks, rtol=1e-4, atol=1e-5)


def test_a_model_with_flips_gives_the_same_for_an_image_and_its_mirror(small_model: Build) -> None:
    model, x = small_model(test_time_flips=("horizontal",)).eval(), pixels()
    with torch.no_grad():
        plain, mirrored = model(x), model(x.flip(-1))
    torch.testing.assert_close(plain.logits, mirrored.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.mask_logits, mirrored.mask_logits.flip(-1), rtol=1e-4, atol=1e-5)


def test_flips_are_for_evaluation_only(small_model: Build) -> None:
    model = small_model(test_time_flips=("horizontal",)).train()
    sizes: list[int] = []
    model.encoder.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    model(pixels())
    model.eval()(pixels())
    assert sizes == [2, 4]


def test_normalisations_of_a_model_with_flips_and_mask_guided_pooling_fold(small_model: Build) -> None:
    model = small_model(pooling="mask_guided", test_time_flips=("horizontal",)).eval()
    folded = fold_batch_norms(model, pixels(1)).network
    assert folded is not model
    norms = [sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules()) for net in (model, folded)]
    assert norms[1] < norms[0]
