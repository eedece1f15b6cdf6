"""Initial weights: the real ImageNet file, grey against RGB, prefixes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import mobilenet_v2

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import BundleError, StorageError
from medvision_ray.learning.model import HybridCNN, batch_norm_eps, build_model
from medvision_ray.learning.weights import load_encoder_weights

Build = Callable[..., HybridCNN]
FILE = "weights/mobilenet_v2_imagenet.safetensors"


def mobilenet(in_channels: int, **preprocess: int) -> HybridCNN:
    config = ModelConfig.model_validate({"in_channels": in_channels})
    return build_model(config, PreprocessConfig.model_validate({"size": (64, 64), **preprocess}), 3).eval()


def test_all_tensors_of_the_imagenet_file_load_and_its_eps_is_applied(data_dir: Path) -> None:
    model = mobilenet(1)
    report = load_encoder_weights(model, str(data_dir / FILE))
    assert (len(report.loaded), report.missing, report.unexpected) == (312, (), ())
    assert batch_norm_eps(model.encoder) == 1e-3
    source = load_file(data_dir / FILE)
    name = "features.17.conv.2.weight"
    assert torch.equal(model.encoder.state_dict()[name], source[name])


def test_the_loaded_encoder_computes_what_torchvisions_mobilenet_computes(data_dir: Path) -> None:
    model = mobilenet(3)
    load_encoder_weights(model, str(data_dir / FILE))
    reference = mobilenet_v2(norm_layer=lambda width: torch.nn.BatchNorm2d(width, eps=1e-3)).eval()
    reference.load_state_dict(load_file(data_dir / FILE), strict=False)
    x = torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[-1]))
    with torch.no_grad():
        model(x)
        expected = reference.features(x.expand(-1, 3, -1, -1) / 127.5 - 1)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_a_grey_encoder_equals_an_rgb_encoder_on_repeated_grey(data_dir: Path) -> None:
    x = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    features = []
    for channels in (1, 3):
        model = mobilenet(channels)
        load_encoder_weights(model, str(data_dir / FILE))
        model.encoder.register_forward_hook(lambda _module, _inputs, output: features.append(output[-1]))
        with torch.no_grad():
            model(x)
    assert features[0].abs().max() > 0.1
    torch.testing.assert_close(features[0], features[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slices", [3, 5])
def test_slices_that_are_all_the_same_give_what_one_gives(data_dir: Path, slices: int) -> None:
    x = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    features: list[torch.Tensor] = []
    for model in (mobilenet(1), mobilenet(slices, slices=slices)):
        load_encoder_weights(model, str(data_dir / FILE))
        model.encoder.register_forward_hook(lambda _module, _inputs, output: features.append(output[-1]))
        with torch.no_grad():
            model(x.expand(-1, model.in_channels, -1, -1))
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "module.encoder.", "model."])
def test_common_prefixes_are_matched(prefix: str, tmp_path: Path, small_model: Build) -> None:
    source, target = small_model(), small_model(encoder="tu-resnet10t")
    state = {prefix + name.removeprefix("model."): value for name, value in source.encoder.state_dict().items()}
    save_file({**state, "fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    report = load_encoder_weights(target, str(tmp_path / "w.safetensors"))
    assert (report.missing, report.unexpected) == ((), ("fc.weight",))
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(target.encoder.state_dict()[name], value)


def test_another_encoders_weights_are_refused_with_counts_and_nothing_is_loaded(
    data_dir: Path, small_model: Build
) -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BundleError, match=r"only 0 of \d+ are there; the file has 312 such as features"):
        load_encoder_weights(model, str(data_dir / FILE))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_shapes_are_refused(tmp_path: Path, small_model: Build) -> None:
    model = small_model()
    state = dict(model.encoder.state_dict())
    name = next(name for name, value in state.items() if value.ndim == 4 and value.shape[1] > 3)
    state[name] = torch.zeros(5, 5, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match=r"1 differ.*against \(5, 5, 3, 3\)"):
        load_encoder_weights(model, str(tmp_path / "w.safetensors"))


def test_a_pickle_is_refused_and_a_missing_file_is_named(tmp_path: Path, small_model: Build) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="never loaded"):
        load_encoder_weights(small_model(), str(tmp_path / "w.pth"))
    with pytest.raises(StorageError, match="none"):
        load_encoder_weights(small_model(), str(tmp_path / "absent.safetensors"))


@pytest.mark.parametrize("text", ["0", "-1e-3", "large"])
def test_an_absurd_eps_in_the_metadata_is_refused(text: str, tmp_path: Path, small_model: Build) -> None:
    model = small_model()
    save_file(model.encoder.state_dict(), tmp_path / "w.safetensors", metadata={"batch_norm_eps": text})
    with pytest.raises(BundleError, match="batch_norm_eps"):
        load_encoder_weights(model, str(tmp_path / "w.safetensors"))
