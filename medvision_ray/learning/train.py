"""The Ray Train job: decode once, train with DDP, resume, keep the best epoch, write it as a bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from medvision_ray import storage
from medvision_ray.bundle import Bundle, image_digest, load_bundle
from medvision_ray.cluster import cluster_cpus, cluster_gpus, interruptible, ray_session, worker_runtime_env
from medvision_ray.config import TrainJob
from medvision_ray.errors import ConfigError, LabelError, MedVisionError, UsageError
from medvision_ray.learning.feed import Truth
from medvision_ray.learning.guards import look_for_leaks
from medvision_ray.learning.history import describe, following, read_history
from medvision_ray.learning.identity import config_hash_of
from medvision_ray.learning.ingest import DecodedImages, check_images, decode_images
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.learning.loop import TrainPlan, new_state, train_worker, usable_truth
from medvision_ray.learning.losses import balanced_class_weights
from medvision_ray.learning.operating import check_positive_class
from medvision_ray.learning.publish import Best, publish_bundle
from medvision_ray.learning.reference import ImagesSeen
from medvision_ray.privacy import address_pseudonymiser

Progress = Callable[[str], None]
_KEPT_CHECKPOINTS = 2
RESIZE_SECONDS = 60.0
"""How often an elastic training looks for room to grow: to grow it starts again from the last checkpoint."""
_CONTROLLER_FAILURES = 20  # Ray's default is without end: a node that never comes back would hang the job


@dataclass(frozen=True)
class TrainResult:
    """What a training gives.

    Attributes:
        bundle: the best epoch, written under OUTPUT/bundles/NAME.
        history: one entry an epoch, as in metrics.jsonl.
        summary: `name`, `already_done`, `labels` (counts a split), `heads`, `failures` (images per error code),
            `epochs`, `best_epoch`, `best_score`, `seconds` of each step, and `leakage` and `shortcuts` (`guards`).
    """

    bundle: Bundle
    history: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, Any]


def train(job: TrainJob, progress: Progress = lambda line: None) -> TrainResult:
    """Train a hybrid CNN and write it as a bundle; the same job again resumes, or finds it done.

    A training is known by its name. Its configuration (all but `ray`, `privacy` and `output`) and label table are
    fixed by the first run under that name. TensorBoard files are written beside metrics.jsonl where `output` is local.

    Args:
        job: what to do.
        progress: is called with lines for people: one a step and one an epoch.

    Raises:
        UsageError: the name belongs to another training; LabelError: the labels can't be used, lack a val split, or leak.
        MedVisionError: too many images fail, the cluster is too small, or the workers fail again and again.
    """
    if job.folds:
        raise UsageError(
            "Expected a training without `folds`, which `learning.folds.cross_validate` does. Set `folds: 0`."
        )
    config_hash = config_hash_of(job)
    name = job.name or f"hybrid-{config_hash[:8]}"
    table = load_labels(job.labels, job.labels.acquisition_columns)
    done = finished_bundle(job, name, config_hash)
    if done is not None:
        progress(f"{name} is trained already: {done.uri}")
        return _result(job, done, {"already_done": True, "labels": table.summary()})
    claim_training(job, name, config_hash)
    with ray_session(job.ray, dashboard=True):
        use_gpu = check_cluster(job, name, progress)
        clock = time.perf_counter()
        decoded = decode_images(table, job)
        check_images(table, decoded, job.max_failure_fraction)
        guards = look_for_leaks(table, decoded, job.labels, lambda line: progress(f"{name}: {line}"))
        seconds = time.perf_counter() - clock
        progress(
            f"{name}: {len(table)} images decoded in {seconds:.1f} s"
            + (f", {sum(decoded.failures.values())} failed" if decoded.failures else "")
        )
        found = train_decoded(job, name, config_hash, table, decoded, use_gpu=use_gpu, guards=guards, progress=progress)
    found.summary["seconds"] = {"decode": seconds, **found.summary["seconds"]}
    return found


def train_decoded(
    job: TrainJob,
    name: str,
    config_hash: str,
    table: LabelTable,
    decoded: DecodedImages,
    *,
    use_gpu: bool,
    guards: Mapping[str, Any],
    progress: Progress,
) -> TrainResult:
    """Train on images that are in the object store, from the last checkpoint where there is one. Ray must be connected.

    Args:
        name: of the training, which `claim_training` has claimed for `config_hash`.
        table: the labels; its splits say what is trained on and what chooses the epoch.
        guards: what `look_for_leaks` found, for the bundle's facts.

    Raises:
        LabelError: train or val has nothing to learn from or to measure on.
        MedVisionError: the workers fail again and again.
    """
    names = address_pseudonymiser(job.privacy)
    seconds: dict[str, float] = {}
    plan = training_plan(job, training_folder(job, name), table, decoded)
    new_state(plan, torch.device("cpu"), with_weights=True)  # what can't be built is said here, not by a worker
    progress(f"{name}: {len(plan.train)} train and {len(plan.val)} val images")
    for finding in one_sided(plan):
        progress(
            f"{name}: `{finding}` is 0 in no train image, or 1 in none, so it cannot be learned; a blank cell is neither"
        )
    clock = time.perf_counter()
    with following(storage.join(plan.folder, "metrics.jsonl"), lambda epoch: progress(describe(epoch, job.epochs))):
        best = _fit(plan, name, decoded, use_gpu)
    seconds["train"] = time.perf_counter() - clock
    clock = time.perf_counter()
    labels = table.summary()
    facts = {"labels": labels, "failures": decoded.failures, "config_hash": config_hash, "seed": job.seed}
    facts.update(guards)
    facts["image_digests"] = "hashed" if names else "plain"
    digests = {
        part: [image_digest(table.uris[row], names) for row in rows]
        for part, rows in (("train", plan.train), ("val", plan.val))
    }
    bundle = publish_bundle(
        _bundle_uri(job, name),
        name,
        plan,
        best,
        dataset=decoded.dataset,
        facts=facts,
        train_digest=digests["train"],
        fitted_digest=digests["val"],
        patients=table.patients,
        images=ImagesSeen(decoded.facts, table.patients),
    )
    seconds["publish"] = time.perf_counter() - clock
    return _result(job, bundle, {"already_done": False, "labels": labels, "seconds": seconds})


def _bundle_uri(job: TrainJob, name: str) -> str:
    return storage.join(job.output, "bundles", name)


def training_folder(job: TrainJob, name: str) -> str:
    """OUTPUT/training/NAME: what is known of a training beside its bundle."""
    return storage.join(job.output, "training", name)


def _result(job: TrainJob, bundle: Bundle, facts: dict[str, Any]) -> TrainResult:
    trained = bundle.trained
    kept = {key: trained[key] for key in ("epochs", "best_epoch", "best_score", "failures")}
    heads = {
        "classification": bundle.architecture.classification,
        "segmentation": bundle.architecture.segmentation,
    }
    kept.update({key: trained.get(key) for key in ("leakage", "shortcuts")})
    summary = {"name": bundle.name, "heads": heads, **kept, **facts}
    history = read_history(storage.join(training_folder(job, bundle.name), "metrics.jsonl"))
    return TrainResult(bundle, history, summary)


def finished_bundle(job: TrainJob, name: str, config_hash: str) -> Bundle | None:
    """The bundle of a training that has ended; None while there is none.

    Raises:
        UsageError: the name belongs to another training.
    """
    uri = _bundle_uri(job, name)
    if not storage.exists(storage.join(uri, "bundle.yaml")):
        return None
    bundle = load_bundle(uri)
    if bundle.trained.get("config_hash") != config_hash:
        raise _other_training(name)
    return bundle


def claim_training(job: TrainJob, name: str, config_hash: str) -> None:
    """Write whose training this is.

    Raises:
        UsageError: it is another's.
    """
    place = storage.join(training_folder(job, name), "training.json")
    if storage.create_exclusive(place, json.dumps({"config_hash": config_hash}).encode()):
        return
    if json.loads(storage.read_bytes(place)).get("config_hash") != config_hash:
        raise _other_training(name)


def _other_training(name: str) -> UsageError:
    return UsageError(
        f"Expected the configuration and label table that training `{name}` began with, but they changed. A new training "
        "needs a new name: set `name`, or leave it out to have one derived."
    )


def check_cluster(job: TrainJob, name: str, progress: Progress) -> bool:
    """Whether to use GPUs.

    Raises:
        MedVisionError: the workers do not fit the cluster, where they would wait for ever.
    """
    gpus, cpus = cluster_gpus(), cluster_cpus()
    workers = job.fewest_workers
    if job.use_gpu is True and gpus < workers:
        raise MedVisionError(
            f"Expected a GPU for each of {workers} workers (`use_gpu: true`), but the cluster has {gpus}. Lower "
            "`workers`, or set `use_gpu: auto` to train on CPUs."
        )
    needed = workers * job.cpus_per_worker
    if needed > cpus:
        raise MedVisionError(
            f"Expected {needed:g} CPUs for {workers} workers of {job.cpus_per_worker:g} each, but the cluster has "
            f"{cpus:g}. Lower `workers` or `cpus_per_worker`, or give Ray more (`ray.num_cpus`)."
        )
    if job.use_gpu and 0 < gpus < workers:
        progress(
            f"{name}: {workers} workers and {gpus} GPUs, so they train on CPUs. Set `workers` to {gpus} or less to "
            "train on GPUs."
        )
    return bool(job.use_gpu) and gpus >= workers


def training_plan(job: TrainJob, folder: str, table: LabelTable, decoded: DecodedImages) -> TrainPlan:
    """Rows, heads and class weights from what could be decoded.

    Raises:
        LabelError: train or val has nothing to learn from or to measure on.
    """
    truth = Truth(table.labels, table.targets)
    masked = np.array([mask is not None for mask in table.masks], dtype=bool)
    rows = {split: np.flatnonzero((table.splits == split) & decoded.usable) for split in ("train", "val")}
    heads = {
        "classification": job.model.classification and len(usable_truth(truth, rows["train"])) > 0,
        "segmentation": job.model.segmentation and bool(masked[rows["train"]].any()),
    }
    if not any(heads.values()):
        raise LabelError(
            "Expected labels or masks in the train split for a head of the model, but there are none that could be read."
        )
    for split, found in rows.items():  # images that no head can use would only cost time
        seen = masked[found] if heads["segmentation"] else np.zeros(len(found), dtype=bool)
        if heads["classification"]:
            seen = seen | np.isin(found, usable_truth(truth, found))
        rows[split] = found[seen]
    if not len(rows["val"]):
        raise LabelError(
            "Expected a val split with labels or masks, which chooses the epoch that is kept, but it is empty. Mark some "
            "patients `val` in the split column, or clear the column to have splits made by patient."
        )
    # Without a mask or a label to learn from there is nothing to guide, or nobody to be guided.
    pooling = job.model.pooling if all(heads.values()) else "average"
    if heads["classification"] and truth.targets is None and len(table.classes) < 2:
        raise LabelError(
            f"Expected two or more classes to tell apart, but all labels say {table.classes[0]}. Name the others in "
            "`labels.classes`, or set `model.classification: false` to train on masks alone."
        )
    architecture = job.model.model_copy(update={**heads, "pooling": pooling})
    classes = table.classes if heads["classification"] else ()
    check_positive_class(job.operating_points, classes)
    weights = _class_weights(job, truth, rows["train"], len(classes))
    return TrainPlan(job, folder, architecture, classes, truth, rows["train"], rows["val"], weights)


def one_sided(plan: TrainPlan) -> list[str]:
    """Findings that every train image has of which it is known, or none has; the other kind is blank or not there."""
    if plan.truth.targets is None:
        return []
    known = plan.truth.targets[plan.train]
    return [
        name
        for name, column in zip(plan.classes, known.T, strict=True)
        if not ((column == 0).any() and (column == 1).any())
    ]


def _class_weights(
    job: TrainJob, truth: Truth, train: np.ndarray[Any, np.dtype[np.int64]], n_classes: int
) -> tuple[float, ...] | None:
    chosen = job.loss.class_weights
    if chosen == "none" or n_classes == 0:
        return None
    if chosen == "balanced":
        found = truth.labels if truth.targets is None else truth.targets
        return tuple(balanced_class_weights(torch.from_numpy(found[train]), n_classes).tolist())
    if len(chosen) != n_classes:
        raise ConfigError(
            f"Expected one weight for each of {n_classes} classes in `loss.class_weights`, but got {len(chosen)}."
        )
    return tuple(float(weight) for weight in chosen)


def _fit(plan: TrainPlan, name: str, decoded: DecodedImages, use_gpu: bool) -> Best:
    """Run Ray Train to its end, from the last checkpoint where there is one; the best epoch and its figures."""
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    job = plan.job
    filesystem, path = storage.filesystem(storage.join(job.output, "training"))
    resources = {"CPU": job.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env=worker_runtime_env(),
            failure_config=FailureConfig(max_failures=job.max_restarts, controller_failure_limit=_CONTROLLER_FAILURES),
            # Ray keeps the latest checkpoint as well as the best ones.
            checkpoint_config=CheckpointConfig(
                num_to_keep=_KEPT_CHECKPOINTS,
                checkpoint_score_attribute="val_score",
                checkpoint_score_order="max",
            ),
        ),
        datasets={"images": decoded.dataset},
        dataset_config=DataConfig(datasets_to_split=[]),  # every worker sees every row and takes its share itself
    )
    try:
        result = interruptible(trainer.fit)
    except TrainingFailedError as error:
        raise _explain(error, job) from error
    if not result.best_checkpoints:
        raise MedVisionError(f"Expected training `{name}` to leave a checkpoint, but there is none. Run it again.")
    checkpoint, figures = max(result.best_checkpoints, key=lambda pair: float(pair[1]["val_score"]))
    return Best(checkpoint, figures)


def _explain(error: Exception, job: TrainJob) -> MedVisionError:
    """Our own message where a worker raised one; else what can be done about workers that are lost."""
    for failure in getattr(error, "worker_failures", {}).values():
        found: BaseException | None = failure
        while found is not None:
            if isinstance(found, MedVisionError):
                return MedVisionError(str(found))
            found = getattr(found, "cause", None) or found.__cause__
    kinds = sorted({type(item).__name__ for item in getattr(error, "worker_failures", {}).values()})
    return MedVisionError(
        f"Expected the {job.most_workers} training workers to finish, but they failed more than {job.max_restarts} times"
        + (f" ({', '.join(kinds)})" if kinds else "")
        + ". The workers' logs have the reason; out of memory is the usual one: lower `batch_size` or `workers`. The same "
        "command resumes from the last checkpoint."
    )
