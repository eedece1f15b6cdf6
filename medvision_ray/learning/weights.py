"""Initial encoder weights from a safetensors file: names matched, grey input handled, nothing half loaded."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from itertools import product

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from medvision_ray import storage
from medvision_ray.errors import BundleError
from medvision_ray.learning.model import HybridCNN, set_batch_norm_eps

_LEAST_SHARE = 0.9
_PREFIXES = ("", "encoder.", "backbone.", "model.", "module.", "features.", "module.encoder.", "model.encoder.")
_ADDED = ("", "model.", "features.")
_SHOWN = 3


@dataclass(frozen=True)
class WeightReport:
    """Names of tensors after loading.

    Attributes:
        loaded: of the encoder, taken from the file.
        missing: of the encoder, not in the file; they keep their values.
        unexpected: of the file, without a place in the encoder (a classifier, a decoder).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_encoder_weights(model: HybridCNN, uri: str) -> WeightReport:
    """Load initial encoder weights, all or nothing.

    Common prefixes (`encoder.`, `backbone.`, `features.`, ...) and timm's `stages_0` for `stages.0` are matched. For a
    grey model the first convolution's weights are summed over RGB, which is the same as repeating grey over three
    channels. Metadata `batch_norm_eps` is applied to every batch normalisation of the encoder.

    Args:
        model: gets the weights.
        uri: path or URI of a safetensors file.

    Raises:
        BundleError: not a safetensors file, less than 90 % of the encoder's tensors in it, or other shapes.
        StorageError: the file cannot be read.
    """
    data = storage.read_bytes(uri)
    try:
        source = safetensors.torch.load(data)
    except SafetensorError:
        raise BundleError(
            f"Expected a safetensors file at {uri}, but it cannot be parsed as one. Convert other formats first; pickled "
            "weights (.pt, .pth) are never loaded, because loading one runs its code."
        ) from None
    target = model.encoder.state_dict()
    names = _match(source, target)
    # Counters of batches are left out by some exporters and change nothing at a fixed momentum.
    needed = [name for name in target if not name.endswith("num_batches_tracked")]
    missing = tuple(name for name in target if name not in names)
    if len([name for name in needed if name in names]) < _LEAST_SHARE * len(needed):
        raise BundleError(
            f"Expected weights of encoder tensors such as {_examples(list(missing))} in {uri}, but only {len(names)} of "
            f"{len(target)} are there; the file has {len(source)} such as {_examples(list(source))}. Give weights of the "
            "encoder that `model.encoder` names."
        )
    state = {name: _fit(source[found], target[name]) for name, found in names.items()}
    wrong = [name for name in state if state[name].shape != target[name].shape]
    if wrong:
        shapes = [f"{name} {tuple(target[name].shape)} against {tuple(state[name].shape)}" for name in wrong]
        raise BundleError(
            f"Expected tensors of the encoder's shapes in {uri}, but {len(wrong)} differ (encoder against file): "
            f"{_examples(shapes)}. Give weights of the encoder that `model.encoder` names."
        )
    eps = _metadata_eps(data, uri)
    model.encoder.load_state_dict({**target, **state})
    if eps is not None:
        set_batch_norm_eps(model.encoder, eps)
    used = set(names.values())
    return WeightReport(tuple(names), missing, tuple(name for name in source if name not in used))


def _match(source: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, str]:
    """For each encoder tensor the file's name, under the pair of prefixes that matches most."""
    # timm flattens `stages.0` to `stages_0` when it builds a feature extractor; compare without the difference.
    places = {name.replace(".", "_"): name for name in target}
    best: dict[str, str] = {}
    for stripped, added in product(_PREFIXES, _ADDED):
        found = {}
        for name in source:
            place = places.get((added + name.removeprefix(stripped)).replace(".", "_"))
            if place is not None and name.startswith(stripped):
                found[place] = name
        if len(found) > len(best):
            best = found
    return best


def _fit(value: Tensor, place: Tensor) -> Tensor:
    """Spread a first convolution `(out, 3, kh, kw)` evenly where the encoder takes one channel or five.

    Channels that are all the same then give what grey repeated over RGB gives.
    """
    if value.ndim == 4 and place.ndim == 4 and value.shape[1] == 3 and place.shape[1] in (1, 5):
        return (value.sum(dim=1, keepdim=True) / place.shape[1]).repeat(1, place.shape[1], 1, 1)
    return value


def _metadata_eps(data: bytes, uri: str) -> float | None:
    """`batch_norm_eps` of the file's header (safetensors: 8 bytes little-endian length, then JSON)."""
    (length,) = struct.unpack("<Q", data[:8])
    text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("batch_norm_eps")
    if text is None:
        return None
    try:
        eps = float(text)
    except ValueError:
        eps = math.nan
    if not 0 < eps < 1:
        raise BundleError(
            f"Expected metadata `batch_norm_eps` of {uri} between 0 and 1, but it is not. Correct the file."
        )
    return eps


def _examples(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
