"""From the object store to batches: views of all images on every worker, and the order of each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
_View = NDArray[np.uint8]
_RESIDENT_SHARE = 0.25


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits from whole numbers such as seed, epoch and rank; equal parts give equal seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def epoch_batches(
    rows: Integers,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    batch_size: int,
    weights: NDArray[np.float64] | None = None,
) -> list[Integers]:
    """The batches of one worker in one epoch.

    All workers shuffle the same rows by seed and epoch and take every `world`-th, so together they see each row once;
    where the rows do not divide, the first of the order (fewer than `world`) come twice. Every worker gets the same
    number of batches of the same sizes, or DDP would wait for ever.

    Args:
        rows: rows to train on; at least one.
        batch_size: largest batch; sizes of an epoch's batches differ by at most one.
        weights: how much oftener than others each row is to be seen, `(n,)`, above 0. Then as many rows are drawn as there
            are, by the same draw on all workers, and each comes as often as its weight says, up to one more or less.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(rows if weights is None else _weighted_draw(rows, weights, generator))
    share = math.ceil(len(order) / world)
    mine = np.resize(order, share * world)[rank::world]  # resize repeats from the start
    return np.array_split(mine, math.ceil(share / batch_size))


def _weighted_draw(rows: Integers, weights: NDArray[np.float64], generator: np.random.Generator) -> Integers:
    """As many rows as there are, by systematic sampling (Cochran 1977, 8.1): one random start, then equal steps.

    Rows of equal weight stand together, so that each such group comes as often as it weighs, up to one; within a group
    they are shuffled, so that which come once more differs by epoch.
    """
    places = generator.permutation(len(rows))
    places = places[np.argsort(weights[places], kind="stable")]
    edges = np.cumsum(weights[places])
    steps = (np.arange(len(rows)) + generator.random()) * edges[-1] / len(rows)
    found = np.searchsorted(edges, steps, side="right").clip(max=len(rows) - 1)
    return np.asarray(rows[places[found]])


def balancing_weights(truth: Truth, rows: Integers) -> NDArray[np.float64]:
    """Weights by which an epoch sees every class as often.

    Single-label: images of each class weigh as much in sum. Multi-label: an image weighs as its rarest positive finding,
    one over the images that have it; those where none is known to be there are one more group. Images without any label,
    which have a mask only, keep their share of the epoch.

    Args:
        truth: of the whole table.
        rows: train rows.

    Returns:
        Shape `(n,)`, above 0, with mean 1.
    """
    if truth.targets is None:
        known = np.asarray(truth.labels[rows] >= 0)
        members = truth.labels[rows][:, None] == np.unique(truth.labels[rows][known])
    else:
        targets = truth.targets[rows]
        known = np.asarray(~np.isnan(targets).all(axis=1))
        members = np.concatenate([targets == 1, (known & ~(targets == 1).any(axis=1))[:, None]], axis=1)
    weights = np.ones(len(rows))
    if known.any():
        counts = members.sum(axis=0)
        weights = np.where(members, 1.0 / np.maximum(counts, 1), 0.0).max(axis=1)
        weights[known] *= known.sum() / weights[known].sum()
        weights[~known] = 1.0
    return weights


def steps_per_epoch(n_rows: int, world: int, batch_size: int) -> int:
    """How many batches `epoch_batches` gives."""
    return math.ceil(math.ceil(n_rows / world) / batch_size)


def plain_batches(rows: Integers, *, rank: int = 0, world: int = 1, batch_size: int) -> list[Integers]:
    """Rows of one worker in their order, each row on exactly one worker; workers may differ in number of batches."""
    mine = rows[rank::world]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


@dataclass(frozen=True, eq=False)
class Truth:
    """Labels of the whole table.

    Attributes:
        labels: class index, `(n,)`; -1 for none.
        targets: 0, 1 or NaN a finding, `(n, K)`; None for single-label tables.
    """

    labels: Integers
    targets: NDArray[np.float32] | None


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch; see `losses.MultiTaskLoss.forward` for shapes."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    masks: Tensor
    has_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, images in channels_last; the host does not wait for a GPU."""

        def moved(values: Tensor) -> Tensor:
            source = values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values
            return source.to(device, non_blocking=True)

        images = moved(self.images).contiguous(memory_format=torch.channels_last)
        targets = None if self.targets is None else moved(self.targets)
        return Batch(images, moved(self.labels), targets, moved(self.masks), moved(self.has_mask))


@dataclass(frozen=True)
class _Resident:
    """All images on one device, and at which place each row is."""

    places: dict[int, int]
    everything: Batch

    def batch(self, rows: Integers) -> Batch:
        device = self.everything.images.device
        index = torch.tensor([self.places[int(row)] for row in rows])
        if device.type == "cuda":
            index = index.pin_memory().to(device, non_blocking=True)
        found = self.everything
        targets = None if found.targets is None else found.targets[index]
        return Batch(found.images[index], found.labels[index], targets, found.masks[index], found.has_mask[index])


class Examples:
    """All decoded images of a worker's node, as views into the object store: nothing is copied until a batch is made.

    `keep_on` copies them to a GPU once, where they fit, so that a batch costs no copy from the host.

    Args:
        tables: Arrow tables of `ingest.SCHEMA`; rows without pixels are left out.
        truth: labels of the whole label table.
        channels: of the prepared pixels.
        size: rows and columns of the prepared pixels.
    """

    def __init__(self, tables: Iterable[pa.Table], truth: Truth, channels: int, size: tuple[int, int]) -> None:
        self.truth = truth
        self.size = size
        self._pixels: dict[int, _View] = {}
        self._masks: dict[int, _View] = {}
        self._resident: _Resident | None = None
        for table in tables:
            for row, index in enumerate(table["index"].to_pylist()):
                pixels, mask = table["pixels"][row].as_buffer(), table["mask"][row].as_buffer()
                if pixels is not None:
                    self._pixels[index] = np.frombuffer(pixels, np.uint8).reshape(channels, *size)
                if mask is not None:
                    self._masks[index] = np.frombuffer(mask, np.uint8).reshape(size)

    def has_mask(self, rows: Integers) -> NDArray[np.bool_]:
        """Which rows have a mask, `(n,)`."""
        return np.array([int(row) in self._masks for row in rows], dtype=bool)

    def keep_on(self, device: torch.device) -> bool:
        """Copy all images to a GPU if they take at most a quarter of its free memory; says whether it did."""
        if device.type != "cuda":
            return False
        rows = np.array(sorted(self._pixels), dtype=np.int64)
        pixel_bytes = sum(view.nbytes for view in self._pixels.values())
        needed = pixel_bytes + len(rows) * self.size[0] * self.size[1]
        if not len(rows) or needed > _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return False
        self._resident = _Resident({int(row): place for place, row in enumerate(rows)}, self.batch(rows).to(device))
        return True

    def batch(self, rows: Integers) -> Batch:
        """Some rows as tensors, on the CPU or where `keep_on` put them; missing masks are zero."""
        if self._resident is not None:
            return self._resident.batch(rows)
        masks = np.zeros((len(rows), *self.size), dtype=np.uint8)
        for place, row in enumerate(rows):
            if int(row) in self._masks:
                masks[place] = self._masks[int(row)]
        targets = self.truth.targets
        return Batch(
            images=torch.from_numpy(np.stack([self._pixels[int(row)] for row in rows])),
            labels=torch.from_numpy(self.truth.labels[rows]),
            targets=None if targets is None else torch.from_numpy(targets[rows]),
            masks=torch.from_numpy(masks),
            has_mask=torch.from_numpy(self.has_mask(rows)),
        )
