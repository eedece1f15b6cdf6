"""Validation of one epoch: every image exactly once over all workers, the same figures on each of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from medvision_ray.evaluation.classification import OneVsRest, plain_metrics
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.feed import Batch, Examples, Integers, Truth, plain_batches
from medvision_ray.learning.losses import MultiTaskLoss
from medvision_ray.learning.model import HybridCNN

THRESHOLD = 0.5
"""Probability from which a finding, or a pixel, counts as present during training."""

_FACTS = 4  # loss, overlap, predicted area, true area
_MACRO = ("precision", "recall", "f1", "auroc")


def validate(
    model: HybridCNN,
    examples: Examples,
    rows: Integers,
    criterion: MultiTaskLoss,
    *,
    batch_size: int,
    bf16: bool,
    classes: tuple[str, ...],
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Measure a model on some rows; with several workers a collective call.

    Args:
        model: in evaluation mode, the same weights on every worker.
        rows: of the label table; each is scored by one worker.
        bf16: score under autocast.
        classes: empty without a classification head.

    Returns:
        `val_loss`; `val_accuracy`, macro `val_precision`, `val_recall`, `val_f1` and `val_auroc` (as `evaluation`
        defines them); `val_dice`, the mean over images with a non-empty true mask, on the model's grid. NaN where
        undefined. `val_score`, the mean of F1, AUROC and Dice as far as they are defined, or minus the loss where none is.
    """
    table = score_rows(
        model, examples, rows, criterion, batch_size=batch_size, bf16=bf16, classes=classes, rank=rank, world=world
    )
    return figures_of(table, examples.truth, rows, classes)


def score_rows(
    model: HybridCNN,
    examples: Examples,
    rows: Integers,
    criterion: MultiTaskLoss,
    *,
    batch_size: int,
    bf16: bool,
    classes: tuple[str, ...],
    rank: int = 0,
    world: int = 1,
) -> NDArray[np.float64]:
    """What `validate` measures: loss, overlap, predicted and true area, and the K probabilities, `(n, 4 + K)`."""
    device = next(model.parameters()).device
    table = torch.zeros(len(rows), _FACTS + len(classes), dtype=torch.float64, device=device)
    place = {int(row): number for number, row in enumerate(rows)}
    for part in plain_batches(rows, rank=rank, world=world, batch_size=batch_size):
        scored = _score(model, examples.batch(part).to(device), criterion, bf16)
        table[[place[int(row)] for row in part]] = scored
    if world > 1:
        dist.all_reduce(table)  # each row was filled by one worker and is zero on the others
    scores: NDArray[np.float64] = table.cpu().numpy()
    return scores


def probabilities_of(table: NDArray[np.float64]) -> NDArray[np.float32]:
    """The probabilities out of `score_rows`, in the precision of prediction rows, `(n, K)`."""
    return table[:, _FACTS:].astype(np.float32)


@torch.inference_mode()
def _score(model: HybridCNN, batch: Batch, criterion: MultiTaskLoss, bf16: bool) -> Tensor:
    """Loss (of the batch), overlap, predicted and true area in pixels, probabilities: `(N, 4 + K)`."""
    with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=bf16):
        output = model(batch.images)
    masks = None if output.mask_logits is None else batch.masks
    loss = criterion(output, batch.labels, batch.targets, masks, batch.has_mask).total
    columns = [loss.double().expand(len(batch.images), 1)]
    if output.mask_logits is None:
        columns.append(torch.full((len(batch.images), 3), math.nan, dtype=torch.float64, device=loss.device))
    else:
        found = output.mask_logits.float().sigmoid() >= THRESHOLD
        true = batch.masks > 0
        areas = torch.stack([(found & true).sum((1, 2)), found.sum((1, 2)), true.sum((1, 2))], dim=1).double()
        columns.append(torch.where(batch.has_mask[:, None], areas, math.nan))
    if output.logits is not None:
        logits = output.logits.double()
        columns.append(logits.sigmoid() if criterion.multi_label else logits.softmax(dim=1))
    return torch.cat(columns, dim=1)


def figures_of(table: NDArray[np.float64], truth: Truth, rows: Integers, classes: tuple[str, ...]) -> dict[str, float]:
    """The figures of `validate` from what `score_rows` gave."""
    figures = {"val_loss": float(table[:, 0].mean())}
    measured = _classification(table[:, _FACTS:], truth, rows, classes)
    figures["val_accuracy"] = measured.get(("all" if truth.targets is None else "macro", "accuracy"), math.nan)
    figures.update({f"val_{name}": measured.get(("macro", name), math.nan) for name in _MACRO})
    overlap, predicted, true = table[:, 1:_FACTS].T
    marked = true > 0
    dice = dice_per_image(overlap[marked], predicted[marked], true[marked])
    figures["val_dice"] = float(dice.mean()) if marked.any() else math.nan
    defined = [figures[name] for name in ("val_f1", "val_auroc", "val_dice") if not math.isnan(figures[name])]
    figures["val_score"] = sum(defined) / len(defined) if defined else -figures["val_loss"]
    return figures


def _classification(
    scores: NDArray[np.float64], truth: Truth, rows: Integers, classes: tuple[str, ...]
) -> dict[tuple[str, str], float]:
    labels, exclusive = truth.labels[rows], truth.targets is None
    if truth.targets is not None:
        known, positive = ~np.isnan(truth.targets[rows]), truth.targets[rows] == 1
    else:
        positive = labels[:, None] == np.arange(len(classes))
        known = np.broadcast_to(labels[:, None] >= 0, positive.shape)
    kept = known.any(axis=1) if classes else np.zeros(len(rows), dtype=bool)
    if not kept.any():
        return {}
    decided = scores.argmax(axis=1)[:, None] == np.arange(len(classes)) if exclusive else scores >= THRESHOLD
    patients = rows[kept].astype(np.str_)  # only intervals look at patients
    view = OneVsRest(classes, exclusive, patients, known[kept], positive[kept], decided[kept], scores[kept])
    return plain_metrics(view)
