"""What a bundle says of the software that trained it."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import medvision_ray
from medvision_ray.learning import publish
from medvision_ray.learning.mask_threshold import ChosenThreshold


def test_a_package_that_is_not_installed_can_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    # Brought by a job's working directory, say: hours of training must not end in PackageNotFoundError.
    def version(name: str) -> str:
        if name == "medvision-ray":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(publish, "version", version)
    found = publish._versions()
    assert found["medvision_ray"] == medvision_ray.__version__
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(found) == {"python", "medvision_ray", "torch", "ray", "segmentation_models_pytorch", "timm"}


def test_a_threshold_that_was_asked_for_is_taken_and_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ChosenThreshold(0.3, {"best": 0.3})
    monkeypatch.setattr(publish, "choose_mask_threshold", lambda *_: found)

    def chosen(wanted: float | str) -> ChosenThreshold:
        plan: Any = SimpleNamespace(job=SimpleNamespace(mask_threshold=wanted), val=np.arange(3))
        written: Any = None
        examples: Any = None
        return publish._mask_threshold(plan, written, examples, np.array(["a", "b", "c"]))

    assert chosen("auto") is found
    assert chosen(0.35).value == 0.35
    assert "before the training" in chosen(0.35).facts["reason"]
