"""A small random bundle and a small phantom archive, once a session."""

from __future__ import annotations

import pytest

from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.demo.archive import PhantomArchive, make_archive

CLASSES = ("cavity", "consolidation", "nodule")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    import torch

    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    config = ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=(16, 16, 8, 8, 8))
    preprocess = PreprocessConfig(size=(64, 64))
    model = build_model(config, preprocess, len(CLASSES))
    return save_bundle(
        str(tmp_path_factory.mktemp("bundle") / "random"),
        name="random",
        architecture=config,
        preprocess=preprocess,
        classes=CLASSES,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=model,
    )


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> PhantomArchive:
    return make_archive(tmp_path_factory.mktemp("phantom"), patients=12)
