"""Fixtures of the training tests: one torch thread, small models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.learning.model import HybridCNN, build_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def small_model() -> Callable[..., HybridCNN]:
    """Builds a small hybrid CNN; options go to `ModelConfig`."""

    def build(n_classes: int = 3, **options: object) -> HybridCNN:
        config = ModelConfig.model_validate(
            {"encoder": "tu-resnet10t", "decoder_channels": (16, 16, 8, 8, 8), **options}
        )
        return build_model(config, PreprocessConfig(size=(64, 64)), n_classes)

    return build
