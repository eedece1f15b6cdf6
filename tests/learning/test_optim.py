"""Layer-wise rates, freezing, the schedule and the moving average."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from medvision_ray.learning.model import HybridCNN
from medvision_ray.learning.optim import Ema, encoder_stages, freeze_encoder, learning_rate_factor, parameter_groups

Build = Callable[..., HybridCNN]


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)


def test_rates_fall_towards_the_input_by_the_given_factor(small_model: Build) -> None:
    model = small_model(encoder="resnet18")
    rates = {id(p): g["lr"] for g in parameter_groups(model, 1e-3, 0.5, 0.01) for p in g["params"]}
    encoder = model.encoder
    layers = [encoder.conv1, encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
    found = [{rates[id(p)] for p in layer.parameters()} for layer in layers]
    assert found == [{1e-3 * 0.5**n} for n in (5, 4, 3, 2, 1)]
    assert isinstance(model.classification_head, nn.Module)
    assert {rates[id(p)] for p in model.classification_head.parameters()} == {1e-3}


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv3_small_050", "tu-resnet10t"])
def test_stages_never_fall_in_the_order_of_the_encoders_layers(encoder: str, small_model: Build) -> None:
    stages = list(encoder_stages(small_model(encoder=encoder)).values())
    assert stages == sorted(stages)
    assert set(stages) == {1, 2, 3, 4, 5}


def test_every_parameter_is_in_one_group_and_biases_and_norms_do_not_decay(small_model: Build) -> None:
    model = small_model()
    groups = parameter_groups(model, 1e-3, 0.8, 0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    spared = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.01)
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.0) == (id(parameter) in spared)


def test_finding_the_stages_leaves_statistics_and_mode_alone(small_model: Build) -> None:
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder_stages(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def train_step(model: HybridCNN) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.8, 0.01))
    output = model(pixels())
    assert output.logits is not None
    assert output.mask_logits is not None
    (output.logits.square().mean() + output.mask_logits.square().mean()).backward()
    optimizer.step()


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_a_frozen_encoder_keeps_weights_and_statistics_through_train_mode(small_model: Build) -> None:
    model = small_model()
    freeze_encoder(model, True)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model)
    assert changed(before, model) == {"decoder", "segmentation_head", "classification_head"}


def test_an_unfrozen_encoder_learns_again(small_model: Build) -> None:
    model = small_model()
    freeze_encoder(model, True)
    freeze_encoder(model, False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model)
    assert "encoder" in changed(before, model)
    assert all(layer.training for layer in model.modules())


def test_unfreezing_leaves_layers_that_reach_no_output_alone(small_model: Build) -> None:
    model = small_model(encoder="efficientnet-b0")
    before = {name for name, value in model.named_parameters() if value.requires_grad}
    freeze_encoder(model, True)
    freeze_encoder(model, False)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == before


def test_the_schedule_warms_up_to_one_and_falls_as_torchs_cosine() -> None:
    assert [learning_rate_factor(step, 20, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    for step in range(4, 20):
        assert learning_rate_factor(step, 20, 4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert learning_rate_factor(20, 20, 4) == 0.0


@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 10), (10, 15), (1, 0)])
def test_the_schedule_stays_between_zero_and_one_for_any_lengths(total: int, warmup: int) -> None:
    factors = [learning_rate_factor(step, total, warmup) for step in range(total + 1)]
    assert all(math.isfinite(factor) and 0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] > 0.0


def test_the_moving_average_is_the_recurrence_and_covers_statistics(small_model: Build) -> None:
    model = small_model()
    ema = Ema(model, decay=0.15)
    name, statistic, counter = "classification_head.3.weight", "encoder.model.bn1.running_mean", "num_batches_tracked"
    expected = {key: model.state_dict()[key].clone() for key in (name, statistic)}
    for decay in (0.1, 0.15, 0.15):  # min(0.15, (1 + n) / (10 + n))
        train_step(model)
        ema.update(model)
        expected = {key: decay * value + (1 - decay) * model.state_dict()[key] for key, value in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(ema.module.state_dict()[key], value)
    assert ema.updates == 3
    assert ema.module.state_dict()[f"encoder.model.bn1.{counter}"] == 3


def test_the_moving_average_is_a_copy_in_evaluation_mode(small_model: Build) -> None:
    model = small_model()
    ema = Ema(model, decay=0.99)
    before = {name: value.clone() for name, value in ema.module.state_dict().items()}
    train_step(model)
    assert not ema.module.training
    assert not changed(before, ema.module)
    assert not any(value.requires_grad for value in ema.module.parameters())
