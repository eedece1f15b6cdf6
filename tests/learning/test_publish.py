"""What a bundle says of the software that trained it."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

import medvision_ray
from medvision_ray.learning import publish


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
