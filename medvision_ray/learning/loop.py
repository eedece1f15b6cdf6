"""What every Ray Train worker runs: epochs of DDP training with validation, checkpoints and resuming."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist

from medvision_ray import storage
from medvision_ray.config import ModelConfig, TrainJob
from medvision_ray.errors import MedVisionError
from medvision_ray.learning.augment import build_augment
from medvision_ray.learning.checkpoint import load_state, save_state
from medvision_ray.learning.depthwise import speed_up_depthwise
from medvision_ray.learning.feed import (
    Batch,
    Examples,
    Integers,
    Truth,
    balancing_weights,
    derived_seed,
    epoch_batches,
    steps_per_epoch,
)
from medvision_ray.learning.history import append_epoch
from medvision_ray.learning.losses import MultiTaskLoss
from medvision_ray.learning.model import HybridCNN, batch_norm_eps, build_model, set_batch_norm_eps
from medvision_ray.learning.optim import Ema, freeze_encoder, learning_rate_factor, parameter_groups
from medvision_ray.learning.validation import validate
from medvision_ray.learning.weights import load_encoder_weights
from medvision_ray.native import reuse_freed_memory
from medvision_ray.precision import exact_float32, runs_in_bf16


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """What the driver tells every worker.

    Attributes:
        job: the configuration.
        folder: OUTPUT/training/NAME.
        architecture: the network; heads without any truth to learn from are off.
        classes: empty without a classification head.
        truth: labels of the whole table.
        train: rows to train on.
        val: rows to validate on.
        class_weights: `(K,)`; None where all weigh the same.
    """

    job: TrainJob
    folder: str
    architecture: ModelConfig
    classes: tuple[str, ...]
    truth: Truth
    train: Integers
    val: Integers
    class_weights: tuple[float, ...] | None

    def criterion(self) -> MultiTaskLoss:
        """The loss."""
        weights = None if self.class_weights is None else torch.tensor(self.class_weights)
        return MultiTaskLoss(self.job.loss, weights, self.truth.targets is not None)

    def bf16(self, device: torch.device) -> bool:
        """Whether the forward pass runs under autocast."""
        return runs_in_bf16(self.job.precision, device.type)


@dataclass
class TrainingState:
    """What an epoch changes.

    Attributes:
        model: the bare network.
        ema: None where it is off.
        optimizer: AdamW over `parameter_groups`.
        epoch: last finished epoch, from 1.
        best_epoch: the one with the best score.
        best_score: its `val_score`.
    """

    model: HybridCNN
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf

    @property
    def measured(self) -> HybridCNN:
        """The network that is validated and kept."""
        return self.model if self.ema is None else self.ema.module

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        progress = {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "batch_norm_eps": batch_norm_eps(self.model.encoder),
        }
        save_state(folder, self.model, self.ema, self.optimizer, progress)

    def load(self, folder: str) -> None:
        """Go on from a checkpoint."""
        progress = load_state(folder, self.model, self.ema, self.optimizer)
        self.epoch, self.best_epoch = int(progress["epoch"]), int(progress["best_epoch"])
        self.best_score = float(progress["best_score"])
        if progress["batch_norm_eps"] is not None:  # an option of the layers, not part of their state
            for network in (self.model, self.measured):
                set_batch_norm_eps(network.encoder, float(progress["batch_norm_eps"]))


def new_state(plan: TrainPlan, device: torch.device, *, with_weights: bool) -> TrainingState:
    """The state before the first epoch, the same on every worker.

    Args:
        with_weights: load the initial encoder weights; not needed where a checkpoint is loaded next.
    """
    job = plan.job
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        architecture = plan.architecture
        if not with_weights:
            architecture = architecture.model_copy(update={"weights": None, "allow_download": False})
        model = build_model(architecture, job.preprocess, len(plan.classes))
    if architecture.weights is not None and architecture.weights != "imagenet":
        load_encoder_weights(model, architecture.weights)
    model = model.to(device).to(memory_format=torch.channels_last)
    speed_up_depthwise(model)
    groups = parameter_groups(model, job.learning_rate, job.layer_decay, job.weight_decay)
    fused = device.type in ("cuda", "cpu")  # one call a group in place of a dozen
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, weight_decay=job.weight_decay, fused=fused)
    return TrainingState(model, Ema(model, job.ema_decay) if job.ema_decay else None, optimizer)


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker; `config["plan"]` is a `TrainPlan`."""
    plan: TrainPlan = config["plan"]
    torch.set_num_threads(max(1, int(plan.job.cpus_per_worker)))
    reuse_freed_memory()
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    tables = ray.train.get_dataset_shard("images").iter_batches(batch_size=None, batch_format="pyarrow")
    examples = Examples(tables, plan.truth, plan.job.preprocess.channels, plan.job.preprocess.size)
    examples.keep_on(device)
    checkpoint = ray.train.get_checkpoint()
    state = new_state(plan, device, with_weights=checkpoint is None)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.load(folder)
    worker = Worker(plan, examples, state, device=device, rank=context.get_world_rank(), world=context.get_world_size())
    with ExitStack() as stack:
        board = stack.enter_context(_tensorboard(plan, state.epoch)) if worker.rank == 0 and _local(plan) else None
        while not worker.finished:
            figures = worker.run_epoch()
            _report(worker, figures, board)


def _local(plan: TrainPlan) -> bool:
    return storage.scheme_of(plan.folder) == "file"  # TensorBoard's writer knows local folders only


def _tensorboard(plan: TrainPlan, epoch: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(storage.join(plan.folder, "tensorboard"), purge_step=epoch + 1)


def _report(worker: Worker, figures: dict[str, Any], board: Any) -> None:
    """Rank 0 writes the epoch's line and checkpoint; then all ranks meet in Ray's report."""
    if worker.rank != 0:
        ray.train.report(figures, checkpoint=None)
        return
    with tempfile.TemporaryDirectory() as folder:
        worker.state.save(folder)
        # Before the report: a line without its checkpoint is dropped on resuming, the reverse would leave a gap.
        append_epoch(storage.join(worker.plan.folder, "metrics.jsonl"), figures)
        if board is not None:
            for key, value in figures.items():
                if key != "epoch" and math.isfinite(value):
                    board.add_scalar(key, value, figures["epoch"])
            board.flush()
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Worker:
    """One rank of a training."""

    def __init__(
        self, plan: TrainPlan, examples: Examples, state: TrainingState, *, device: torch.device, rank: int, world: int
    ) -> None:
        self.plan, self.examples, self.state, self.device = plan, examples, state, device
        self.rank, self.world = rank, world
        self.criterion = plan.criterion().to(device)
        self.augment = build_augment(plan.job.augment, plan.job.preprocess.size)
        self.steps = steps_per_epoch(len(plan.train), world, plan.job.batch_size)
        self.weights = balancing_weights(plan.truth, plan.train) if plan.job.sampling == "balanced" else None
        self.wrapped: nn.Module | None = None

    @property
    def finished(self) -> bool:
        """All epochs done, or no better score for `patience` epochs; the same on every rank."""
        job, state = self.plan.job, self.state
        stale = job.patience > 0 and state.epoch - state.best_epoch >= job.patience
        return state.epoch >= job.epochs or stale

    def run_epoch(self) -> dict[str, Any]:
        """Train and validate one epoch; gives its line of metrics.jsonl."""
        started = time.perf_counter()
        job, state = self.plan.job, self.state
        epoch = state.epoch + 1
        torch.manual_seed(derived_seed(job.seed, epoch, self.rank))  # dropout
        network = self._network(frozen=epoch <= job.freeze_epochs)
        batches = epoch_batches(
            self.plan.train,
            seed=job.seed,
            epoch=epoch,
            rank=self.rank,
            world=self.world,
            batch_size=job.batch_size,
            weights=self.weights,
        )
        losses, waited = [], 0.0
        for step, rows in enumerate(batches):
            before = time.perf_counter()
            batch = self.examples.batch(rows).to(self.device)  # uint8 crosses, and the device augments
            waited += time.perf_counter() - before
            batch = self._augmented(batch, epoch, step)
            losses.append(self._step(network, batch, (epoch - 1) * self.steps + step))
        train_loss, images = self._total(torch.stack(losses), sum(map(len, batches)))
        trained = time.perf_counter() - started
        figures = self._validate()
        state.epoch = epoch
        if figures["val_score"] > state.best_score:
            state.best_epoch, state.best_score = epoch, figures["val_score"]
        rate = max(group["lr"] for group in state.optimizer.param_groups)
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            **figures,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
            "images_per_second": images / trained,
            "wait_seconds": waited,
            "workers": self.world,
        }

    def _network(self, *, frozen: bool) -> nn.Module:
        """The network to call.

        For DDP it is wrapped anew each epoch: after its first step DDP sums gradients in another order, which with three
        workers and more changes the last digits, and a training that goes on from a checkpoint would differ.
        """
        model = self.state.model
        if self.wrapped is None or model.encoder_frozen != frozen:
            freeze_encoder(model, frozen)
            self.wrapped = model
        if self.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        return self.wrapped.train()

    def _augmented(self, batch: Batch, epoch: int, step: int) -> Batch:
        images, masks = self.augment(
            batch.images, batch.masks, derived_seed(self.plan.job.seed, epoch, self.rank, step)
        )
        assert masks is not None  # masks went in
        images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, batch.labels, batch.targets, masks, batch.has_mask)

    def _step(self, network: nn.Module, batch: Batch, number: int) -> Tensor:
        job, state = self.plan.job, self.state
        factor = learning_rate_factor(number, job.epochs * self.steps, round(job.warmup_epochs * self.steps))
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.plan.bf16(self.device))
        with autocast, exact_float32(self.device.type):
            output = network(batch.images)
        masks = batch.masks if self.plan.architecture.segmentation else None
        loss: Tensor = self.criterion(output, batch.labels, batch.targets, masks, batch.has_mask).total
        state.optimizer.zero_grad(set_to_none=True)
        with exact_float32(self.device.type):
            torch.autograd.backward(loss)
        if job.gradient_clip:
            nn.utils.clip_grad_norm_(state.model.parameters(), job.gradient_clip)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.model)
        return loss.detach()

    def _total(self, losses: Tensor, images: int) -> tuple[float, int]:
        """Mean loss over the steps of all workers, and their images."""
        sums = torch.stack([losses.double().sum(), torch.tensor(float(images), device=self.device).double()])
        if self.world > 1:
            dist.all_reduce(sums)
        mean = sums[0].item() / (len(losses) * self.world)
        if not math.isfinite(mean):
            raise MedVisionError(
                f"Expected a finite training loss, but it is {mean} in epoch {self.state.epoch + 1}. Lower "
                "`learning_rate`, turn `gradient_clip` on, or use `precision: float32`."
            )
        return mean, int(sums[1].item())

    def _validate(self) -> dict[str, float]:
        model = self.state.measured.eval()
        if self.world > 1:
            # Each rank's normalisation statistics follow its own last batch; rank 0's are the ones that are kept.
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        return validate(
            model,
            self.examples,
            self.plan.val,
            self.criterion,
            batch_size=self.plan.job.batch_size,
            bf16=self.plan.bf16(self.device),
            classes=self.plan.classes,
            rank=self.rank,
            world=self.world,
        )


def usable_truth(truth: Truth, rows: Integers) -> Integers:
    """The rows that have a class label or a finding."""
    if truth.targets is not None:
        return rows[~np.isnan(truth.targets[rows]).all(axis=1)]
    return rows[truth.labels[rows] >= 0]
