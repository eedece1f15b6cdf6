"""Cross-validation by patient: a model a fold, what each says of the fold it has not seen, and all of them as an ensemble."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.bundle import Bundle
from medvision_ray.cluster import cluster_cpus, cluster_gpus, ray_session, waiting_threads
from medvision_ray.config import TrainJob
from medvision_ray.ensemble import save_ensemble
from medvision_ray.errors import ConfigError, UsageError
from medvision_ray.learning.guards import look_for_leaks
from medvision_ray.learning.identity import config_hash_of
from medvision_ray.learning.ingest import DecodedImages, check_images, decode_images
from medvision_ray.learning.labels import LabelTable, load_labels, strata_classes
from medvision_ray.learning.out_of_fold import (
    fold_rows,
    identified,
    is_current,
    join_folds,
    parquet_bytes,
    predict_task,
)
from medvision_ray.learning.pooled import choose_pooled, commit_pooled
from medvision_ray.learning.splits import folds_by_patient
from medvision_ray.learning.train import (
    Progress,
    TrainResult,
    check_cluster,
    claim_training,
    finished_bundle,
    train_decoded,
    training_folder,
)
from medvision_ray.learning.validation import THRESHOLD
from medvision_ray.privacy import Pseudonymiser, address_pseudonymiser, load_pseudonymiser

OUT_OF_FOLD = "out_of_fold.parquet"
SUMMARY = "folds.json"
_LONGEST_NAME = 64 - len("-fold-32")


@dataclass(frozen=True, eq=False)
class _Study:
    """What all folds share."""

    job: TrainJob
    name: str
    config_hash: str
    table: LabelTable
    decoded: DecodedImages
    fold_of: NDArray[np.int64]  # of each row of the table; -1 for the test split
    use_gpu: bool
    at_once: int

    def fold_name(self, number: int) -> str:
        return f"{self.name}-fold-{number}"

    def place(self, number: int) -> str:
        return storage.join(training_folder(self.job, self.fold_name(number)), OUT_OF_FOLD)


def cross_validate(job: TrainJob, progress: Progress = lambda line: None) -> TrainResult:
    """Train `job.folds` models on the train and val patients, each without one fold's, and make them an ensemble.

    The test split is never looked at. Each fold is a training of its own, NAME-fold-N, and resumes as such; the same
    job again does what is missing. Under OUTPUT/training/NAME lie `out_of_fold.parquet` and `folds.json`; the metrics
    table gets the pooled out-of-fold metrics, `split` `out_of_fold`, under the ensemble's `model_id`.

    Args:
        job: with `folds` of at least 2.
        progress: is called with lines for people.

    Returns:
        The ensemble (soft vote); `summary` has a row a fold, and mean and standard deviation over folds.

    Raises:
        UsageError: the name belongs to another training; LabelError: too few patients, or copies in the test split.
        MedVisionError: as `train`.
    """
    config_hash = config_hash_of(job)
    name = job.name or f"hybrid-{config_hash[:8]}"
    if len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"Expected a `name` of at most {_LONGEST_NAME} characters with `folds`, but it has {len(name)}."
        )
    done = finished_bundle(job, name, config_hash)
    if done is not None:
        progress(f"{name} is trained already: {done.uri}")
        folder = training_folder(job, name)
        commit_pooled(job, done, config_hash, storage.join(folder, OUT_OF_FOLD), progress)  # if that was cut short
        summary = json.loads(storage.read_bytes(storage.join(folder, SUMMARY)))
        return TrainResult(done, [], {**summary, "already_done": True})
    claim_training(job, name, config_hash)
    table = load_labels(job.labels, job.labels.acquisition_columns)
    with ray_session(job.ray, dashboard=True):
        study = _prepare(job, name, config_hash, table, progress)
        bundles = _train_all(study, progress)
        return _conclude(study, bundles, progress)


def _prepare(job: TrainJob, name: str, config_hash: str, table: LabelTable, progress: Progress) -> _Study:
    use_gpu = check_cluster(job, name, progress)
    started = time.perf_counter()
    decoded = decode_images(table, job)
    pooled = replace(table, splits=np.where(table.splits == "test", "test", "train"))
    check_images(pooled, decoded, job.max_failure_fraction)
    fold_of = assign_folds(table, decoded.digests, folds=job.folds, seed=job.labels.seed)
    at_once = folds_at_once(job, cpus=cluster_cpus(), gpus=cluster_gpus() if use_gpu else None)
    patients = [len({table.patients[row] for row in np.flatnonzero(fold_of == fold)}) for fold in range(job.folds)]
    progress(
        f"{name}: {len(table)} images decoded in {time.perf_counter() - started:.1f} s; {job.folds} folds of "
        f"{min(patients)} to {max(patients)} patients, {at_once} at once"
    )
    return _Study(job, name, config_hash, table, decoded, fold_of, use_gpu, at_once)


def assign_folds(table: LabelTable, digests: tuple[str, ...], *, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row of the label table, from 0; -1 in the test split."""
    classes = strata_classes(table.labels, table.targets)
    rows = np.flatnonzero(table.splits != "test")
    fold_of = np.full(len(table), -1, dtype=np.int64)
    fold_of[rows] = folds_by_patient(
        [table.patients[row] for row in rows],
        [classes[row] for row in rows],
        [digests[row] for row in rows],
        folds=folds,
        seed=seed,
    )
    return fold_of


def folds_at_once(job: TrainJob, *, cpus: float, gpus: int | None) -> int:
    """How many folds train side by side: as many as the cluster has room for.

    Args:
        gpus: of the cluster; None where training is on CPUs.
    """
    room = int(cpus // (job.most_workers * job.cpus_per_worker))
    if gpus is not None:
        room = min(room, gpus // job.most_workers)
    return max(1, min(job.folds, room))


def fold_table(table: LabelTable, fold_of: NDArray[np.int64], fold: int) -> LabelTable:
    """The label table with one fold as its val split, the other folds as train, and test as it was."""
    splits = np.where(fold_of == fold, "val", "train")
    return replace(table, splits=np.where(fold_of < 0, "test", splits))


def _train_all(study: _Study, progress: Progress) -> list[Bundle]:
    with waiting_threads("medvision-fold", study.at_once) as threads:
        futures = [threads.submit(_train_fold, study, number, progress) for number in range(1, study.job.folds + 1)]
        return [future.result() for future in futures]


def _train_fold(study: _Study, number: int, progress: Progress) -> Bundle:
    """A fold's model and its out-of-fold predictions, each unless it is there already."""
    job = _fold_job(study.job)
    name = study.fold_name(number)
    table = fold_table(study.table, study.fold_of, number - 1)
    held = hashlib.sha256(study.fold_of.tobytes()).hexdigest()
    config_hash = hashlib.sha256(f"{study.config_hash} {number} {held}".encode()).hexdigest()
    bundle = finished_bundle(job, name, config_hash)
    if bundle is None:
        claim_training(job, name, config_hash)

        def named(line: str) -> None:
            progress(line if line.startswith(name) else f"{name}: {line}")

        guards = look_for_leaks(table, study.decoded, job.labels, named)
        bundle = train_decoded(
            job, name, config_hash, table, study.decoded, use_gpu=study.use_gpu, guards=guards, progress=named
        ).bundle
    if not is_current(study.place(number), study.table):
        storage.write_bytes(study.place(number), _predictions(study, bundle, number))
    return bundle


def _fold_job(job: TrainJob) -> TrainJob:
    """The training of one fold: what is decided on validation is left to the whole, so that no fold's rows are in their own favour."""
    points = job.operating_points.model_copy(update={"class_offsets": "none"})
    threshold = THRESHOLD if job.mask_threshold == "auto" else job.mask_threshold
    return job.model_copy(update={"folds": 0, "operating_points": points, "mask_threshold": threshold})


def _predictions(study: _Study, bundle: Bundle, number: int) -> bytes:
    import ray

    job = study.job
    rows = np.flatnonzero(study.fold_of == number - 1)
    names = address_pseudonymiser(job.privacy)
    fold = fold_rows(study.table, rows, number, study.decoded.error_codes, names, facts=study.decoded.facts)
    options = {"cpus": job.cpus_per_worker, "precision": job.precision, "batch_size": job.batch_size}
    task = ray.remote(num_cpus=job.cpus_per_worker, num_gpus=1 if study.use_gpu else 0)(predict_task)
    found: bytes = ray.get(task.remote(bundle.uri, study.decoded.dataset, fold, options))
    return found


def _conclude(study: _Study, bundles: list[Bundle], progress: Progress) -> TrainResult:
    """Join the predictions, sum the folds up, and write the ensemble, which says that all is done."""
    job = study.job
    folder = training_folder(job, study.name)
    numbers = range(1, job.folds + 1)
    joined = join_folds([study.place(number) for number in numbers], np.flatnonzero(study.fold_of >= 0))
    keys = _patient_keys(study, progress)
    joined = identified(joined, study.table, address_pseudonymiser(job.privacy), keys)
    storage.write_bytes(storage.join(folder, OUT_OF_FOLD), parquet_bytes(joined))
    rows = [_fold_row(study, number, bundle) for number, bundle in zip(numbers, bundles, strict=True)]
    spread = summarise([row["metrics"] for row in rows])
    summary = {
        "name": study.name,
        "labels": study.table.summary(),
        "failures": study.decoded.failures,
        "folds": rows,
        "mean": {key: mean for key, (mean, _) in spread.items()},
        "std": {key: std for key, (_, std) in spread.items()},
        "out_of_fold": storage.join(folder, OUT_OF_FOLD),
    }
    storage.write_bytes(storage.join(folder, SUMMARY), json.dumps(summary, indent=1).encode())
    for key, (mean, std) in spread.items():
        progress(f"{study.name}: {key} {mean:.4f} ± {std:.4f} over {job.folds} folds")
    metrics = {f"{key}_mean": mean for key, (mean, _) in spread.items()}
    metrics |= {f"{key}_std": std for key, (_, std) in spread.items()}
    facts = {"config_hash": study.config_hash, "seed": job.seed, "folds": job.folds, "labels": summary["labels"]}
    first = bundles[0]
    choices = choose_pooled(joined.to_pandas(), job, first.classes, first.multi_label)
    for option, found in choices.facts.items():
        progress(f"{study.name}: {_told_choice(option, found)}")
    ensemble = save_ensemble(
        storage.join(job.output, "bundles", study.name),
        study.name,
        "soft",
        bundles,
        facts={**facts, **choices.facts},
        metrics=metrics,
        class_offsets=choices.class_offsets,
        mask_threshold=choices.mask_threshold,
    )
    commit_pooled(job, ensemble, study.config_hash, storage.join(folder, OUT_OF_FOLD), progress)
    return TrainResult(ensemble, [], {**summary, "already_done": False})


def _told_choice(option: str, facts: Mapping[str, Any]) -> str:
    """`class_offsets` or `mask_threshold` of the ensemble, in words."""
    if "reason" in facts:
        return f"{option} left alone: {facts['reason']}"
    best = facts["best"]
    value = ", ".join(f"{name} {offset:g}" for name, offset in best.items()) if isinstance(best, dict) else f"{best:g}"
    gain, low, high = facts["gain"]
    metric = facts["measure"] if option == "class_offsets" else "Dice"
    return f"{option} {value}: {metric} {gain:+.4f} [{low:+.4f}, {high:+.4f}] on patients that it was not chosen on"


def _patient_keys(study: _Study, progress: Progress) -> Pseudonymiser | None:
    """The site's key where there is one: a training needs none, and then `patient_number` alone tells patients apart."""
    try:
        return load_pseudonymiser(study.job.privacy)
    except UsageError:
        progress(f"{study.name}: no pseudonym key (`privacy`), so `patient_key` of the out-of-fold rows is null")
        return None


def _fold_row(study: _Study, number: int, bundle: Bundle) -> dict[str, Any]:
    rows = np.flatnonzero(study.fold_of == number - 1)
    return {
        "fold": number,
        "bundle": bundle.uri,
        "model_id": bundle.model_id,
        "images": len(rows),
        "patients": len({study.table.patients[row] for row in rows}),
        "best_epoch": bundle.trained["best_epoch"],
        "metrics": {key: value for key, value in bundle.metrics.items() if isinstance(value, float | int | None)},
    }


def summarise(metrics: list[dict[str, float | None]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation over folds of each figure that every fold has.

    Args:
        metrics: of each fold, two or more; None where undefined.
    """
    found: dict[str, tuple[float, float]] = {}
    for key in metrics[0]:
        values = [value for one in metrics if (value := one.get(key)) is not None and math.isfinite(value)]
        if len(values) == len(metrics):
            found[key] = statistics.mean(values), statistics.stdev(values)
    return found
