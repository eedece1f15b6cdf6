"""Training state on disk: safetensors and JSON, exact to the bit, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medvision_ray.errors import MedVisionError
from medvision_ray.learning.model import HybridCNN
from medvision_ray.learning.optim import Ema

_FORMAT = 1
_MODEL, _EMA, _OPTIMIZER, _STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
_NEW_NAME = "A training resumes only with the model and options it began with: give the new one another name."


def save_state(
    folder: str | Path, model: HybridCNN, ema: Ema | None, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write everything that a training needs to go on as if it had never stopped; `state.json` comes last.

    The random state is not in it: each worker has its own, and derives it anew from seed, epoch and rank.

    Args:
        folder: local folder; made where it is missing.
        model: the bare model, not its DDP wrapper.
        ema: moving average, None where it is off.
        optimizer: AdamW, or any whose state is tensors and numbers.
        progress: plain facts (epoch, step, best score, ...), as JSON can hold them.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entry in packed["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    _save(place / _MODEL, model.state_dict())
    if ema is not None:
        _save(place / _EMA, ema.module.state_dict())
    _save(place / _OPTIMIZER, tensors)
    state = {
        "format": _FORMAT,
        "progress": progress,
        "ema_updates": None if ema is None else ema.updates,
        "optimizer": {"groups": packed["param_groups"], "numbers": numbers},
    }
    (place / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_state(
    folder: str | Path, model: HybridCNN, ema: Ema | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a saved state into a model, its average and its optimizer, built as they were for `save_state`.

    Returns:
        The `progress` that was saved.

    Raises:
        MedVisionError: the state is incomplete, of another format, or of another model or optimizer.
    """
    place = Path(folder)
    state = _read_state(place)
    if (ema is None) != (state["ema_updates"] is None):
        raise MedVisionError(
            f"Expected the training state in {place} and this training to agree on a moving average, but one has none. "
            "`ema_decay` can't change from 0 or to 0 within a training: give the new training another name."
        )
    weights = _load(place / _MODEL)
    tensors = _load(place / _OPTIMIZER)
    averaged = {} if ema is None else _load(place / _EMA)
    _same_tensors(place, weights, model.state_dict())
    groups = state["optimizer"]["groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise MedVisionError(
            f"Expected the optimizer's parameter groups as in {place}, but they are others. {_NEW_NAME}"
        )
    model.load_state_dict(weights)
    if ema is not None:
        _same_tensors(place, averaged, ema.module.state_dict())
        ema.module.load_state_dict(averaged)
        ema.updates = int(state["ema_updates"])
    entries: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value
    for index, numbers in state["optimizer"]["numbers"].items():
        entries.setdefault(int(index), {}).update(numbers)
    for group, present in zip(groups, optimizer.param_groups, strict=True):
        for key, value in present.items():
            if isinstance(value, tuple):  # JSON made a list of AdamW's betas
                group[key] = tuple(group[key])
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in entries.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                # A fused optimizer walks through a parameter and its averages in the order of memory, so that they
                # have to have the same strides (it does not look on a CPU); in the file they are contiguous.
                entry[key] = torch.empty_like(parameters[number], device=value.device, dtype=value.dtype).copy_(value)
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    progress: dict[str, Any] = state["progress"]
    return progress


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    # safetensors wants contiguous tensors; weights in channels_last are not.
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError):
        raise MedVisionError(
            f"Expected a safetensors file at {path}, but it is missing or damaged. Delete this checkpoint to resume from "
            "the one before."
        ) from None
    return tensors


def _read_state(place: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((place / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MedVisionError(
            f"Expected a training state in {place}, but {_STATE} is missing or damaged. Delete this checkpoint to resume "
            "from the one before."
        ) from None
    if state.get("format") != _FORMAT:
        raise MedVisionError(
            f"Expected a training state of format {_FORMAT} in {place}, but it is {state.get('format')!r}. Resume it with "
            "the version of medvision_ray that wrote it."
        )
    return state


def _same_tensors(place: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    if wrong:
        raise MedVisionError(
            f"Expected the model whose training state is in {place}, but {len(wrong)} tensors differ, {wrong[0]} first. {_NEW_NAME}"
        )
