"""Training state: going on from a checkpoint is the same, to the bit, as not stopping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medvision_ray.errors import MedVisionError
from medvision_ray.learning.checkpoint import load_state, save_state
from medvision_ray.learning.model import HybridCNN
from medvision_ray.learning.optim import Ema, learning_rate_factor, parameter_groups

Build = Callable[..., HybridCNN]
STEPS = 6


class Training:
    """A few AdamW steps whose data and dropout depend on the step's number alone."""

    def __init__(self, model: HybridCNN, ema: bool = True, channels_last: bool = False, fused: bool = False) -> None:
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]
        self.ema = Ema(self.model, 0.9) if ema else None
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 1e-2, 0.8, 0.01), fused=fused)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, STEPS, 2)
            output = self.model(torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8))
            assert output.logits is not None
            assert output.mask_logits is not None
            self.optimizer.zero_grad()
            (output.logits.square().mean() + output.mask_logits.square().mean()).backward()
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        averaged = {} if self.ema is None else {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
        return {**self.model.state_dict(), **averaged}


@pytest.mark.parametrize(
    ("ema", "channels_last", "fused"),
    [(True, False, False), (False, False, False), (True, True, False), (True, False, True), (True, True, True)],
)
def test_going_on_from_a_checkpoint_gives_the_same_weights_to_the_bit(
    tmp_path: Path, small_model: Build, ema: bool, channels_last: bool, fused: bool
) -> None:
    whole = Training(small_model(), ema, channels_last, fused)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.run(0, STEPS)
    stopped = Training(small_model(), ema, channels_last, fused)
    stopped.model.load_state_dict(start)
    if stopped.ema is not None:
        stopped.ema.module.load_state_dict(start)
    stopped.run(0, 3)
    save_state(tmp_path, stopped.model, stopped.ema, stopped.optimizer, {"step": 3, "best": 0.123456789012345})
    resumed = Training(small_model(), ema, channels_last, fused)
    progress = load_state(tmp_path, resumed.model, resumed.ema, resumed.optimizer)
    assert progress == {"step": 3, "best": 0.123456789012345}
    resumed.run(progress["step"], STEPS)
    expected = whole.weights()
    assert any(not torch.equal(value, start[name]) for name, value in whole.model.state_dict().items())
    for name, value in resumed.weights().items():
        assert torch.equal(value, expected[name]), name


def test_the_optimizers_state_comes_back_whole(tmp_path: Path, small_model: Build) -> None:
    training, other = Training(small_model()), Training(small_model())
    training.run(0, 2)
    save_state(tmp_path, training.model, training.ema, training.optimizer, {})
    load_state(tmp_path, other.model, other.ema, other.optimizer)
    saved, loaded = training.optimizer.state_dict(), other.optimizer.state_dict()
    assert saved["param_groups"] == loaded["param_groups"]
    assert saved["state"].keys() == loaded["state"].keys()
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, loaded["state"][index][key])
            assert value.dtype == loaded["state"][index][key].dtype


def test_there_is_no_pickle_in_a_checkpoint(tmp_path: Path, small_model: Build) -> None:
    training = Training(small_model())
    training.run(0, 1)
    save_state(tmp_path, training.model, training.ema, training.optimizer, {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_another_models_state_is_refused_and_changes_nothing(tmp_path: Path, small_model: Build) -> None:
    training, other = Training(small_model()), Training(small_model(n_classes=4))
    save_state(tmp_path, training.model, training.ema, training.optimizer, {})
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(MedVisionError, match="2 tensors differ, classification_head"):
        load_state(tmp_path, other.model, other.ema, other.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_a_state_with_an_average_is_refused_by_a_training_without_one(tmp_path: Path, small_model: Build) -> None:
    training, other = Training(small_model()), Training(small_model(), ema=False)
    save_state(tmp_path, training.model, training.ema, training.optimizer, {})
    with pytest.raises(MedVisionError, match="ema_decay"):
        load_state(tmp_path, other.model, other.ema, other.optimizer)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_an_incomplete_or_damaged_state_is_refused(tmp_path: Path, small_model: Build, name: str) -> None:
    training = Training(small_model())
    save_state(tmp_path, training.model, training.ema, training.optimizer, {})
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(MedVisionError, match=name):
        load_state(tmp_path, training.model, training.ema, training.optimizer)
    (tmp_path / name).unlink()
    with pytest.raises(MedVisionError, match=name):
        load_state(tmp_path, training.model, training.ema, training.optimizer)
