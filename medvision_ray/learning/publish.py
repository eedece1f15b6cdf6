"""From the best checkpoint to a bundle: measured again from its own files before it takes its place."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import medvision_ray
from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.errors import MedVisionError
from medvision_ray.fingerprint import Fingerprint
from medvision_ray.learning.calibrate import ValidationScores, one_against_rest
from medvision_ray.learning.decisions import Decisions, fit_decisions
from medvision_ray.learning.feed import Examples
from medvision_ray.learning.history import read_history
from medvision_ray.learning.loop import TrainPlan, new_state
from medvision_ray.learning.mask_threshold import ChosenThreshold, choose_mask_threshold
from medvision_ray.learning.model import HybridCNN
from medvision_ray.learning.reference import ImagesSeen, training_fingerprint
from medvision_ray.learning.validation import THRESHOLD, figures_of, probabilities_of, score_rows

_TOLERANCE = 0.02
_CHECKED = ("val_accuracy", "val_dice")
_DISTRIBUTIONS = ("torch", "ray", "segmentation-models-pytorch", "timm")


@dataclass(frozen=True)
class Best:
    """The best epoch: its Ray Train checkpoint and the figures reported with it."""

    checkpoint: Any
    figures: dict[str, Any]


def publish_bundle(
    uri: str,
    name: str,
    plan: TrainPlan,
    best: Best,
    *,
    dataset: Any,
    facts: dict[str, Any],
    train_digest: Sequence[str],
    fitted_digest: Sequence[str],
    patients: Sequence[str],
    images: ImagesSeen | None = None,
) -> Bundle:
    """Write the best epoch as a bundle.

    It is written beside its training first, read back, and scored on the val split; only if accuracy and Dice are the
    recorded ones (within 0.02, or one image) does it go to its place, with what was fitted to these scores.

    Args:
        uri: where bundles are looked for.
        dataset: the materialised images.
        facts: of the training, for the bundle's `trained`.
        train_digest: of each training image.
        fitted_digest: of each val image, which choose the epoch and what the bundle decides by.
        patients: of each row of the label table.
        images: facts of all labelled images, for the bundle's fingerprint; None leaves it out.

    Raises:
        MedVisionError: what was written does not score as what was trained.
    """
    state = new_state(plan, torch.device("cpu"), with_weights=False)
    with best.checkpoint.as_directory() as folder:
        state.load(folder)
    metrics = {key: value for key, value in best.figures.items() if key.startswith("val_")}
    trained = {
        **facts,
        "epochs": len(read_history(storage.join(plan.folder, "metrics.jsonl"))),
        "best_epoch": int(best.figures["epoch"]),
        "best_score": float(best.figures["val_score"]),
        "versions": _versions(),
    }

    def save(
        place: str,
        model: HybridCNN,
        fitted: Decisions,
        mask_threshold: float = THRESHOLD,
        fingerprint: Fingerprint | None = None,
    ) -> Bundle:
        return save_bundle(
            place,
            name=name,
            architecture=plan.architecture,
            preprocess=plan.job.preprocess,
            classes=plan.classes,
            multi_label=bool(plan.classes) and plan.truth.targets is not None,
            thresholds=fitted.thresholds,
            class_offsets=fitted.class_offsets,
            mask_threshold=mask_threshold,
            trained={**trained, **fitted.facts},
            metrics={**metrics, **fitted.metrics},
            train_digest=train_digest,
            fitted_digest=fitted_digest,
            model=model,
            calibration=fitted.calibration,
            operating_points=fitted.operating_points,
            fingerprint=fingerprint,
        )

    candidate = storage.join(plan.folder, "candidate")
    multi_label = bool(plan.classes) and plan.truth.targets is not None
    save(candidate, state.measured, Decisions(None, (), [THRESHOLD] * len(plan.classes) * multi_label, {}, {}))
    written = load_bundle(candidate)
    model = written.build_model()
    examples = _examples(plan, dataset)
    probabilities = _check_again(plan, model, examples, best.figures)
    fitted = fit_decisions(_validation_scores(plan, probabilities, patients), plan.job)
    if plan.architecture.segmentation:
        names = np.array([patients[row] for row in plan.val], dtype=np.str_)
        chosen = _mask_threshold(plan, written, examples, names)
        written = replace(written, mask_threshold=chosen.value)  # the fingerprint is of masks as they will be drawn
        fitted = replace(fitted, facts={**fitted.facts, "mask_threshold": chosen.facts})
    fingerprint = training_fingerprint(written, plan, examples, images) if images else None
    bundle = save(uri, model, fitted, written.mask_threshold, fingerprint)
    storage.delete_tree(candidate)
    return bundle


def _examples(plan: TrainPlan, dataset: Any) -> Examples:
    preprocess = plan.job.preprocess
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return Examples(batches, plan.truth, preprocess.channels, preprocess.size)


def _mask_threshold(
    plan: TrainPlan, written: Bundle, examples: Examples, patients: NDArray[np.str_]
) -> ChosenThreshold:
    wanted = plan.job.mask_threshold
    if wanted == "auto":
        return choose_mask_threshold(written, examples, plan.val, patients)
    return ChosenThreshold(wanted, {"reason": "set before the training (`mask_threshold`)"})


def _validation_scores(
    plan: TrainPlan, probabilities: NDArray[np.float32], patients: Sequence[str]
) -> ValidationScores:
    truth, targets, rows = plan.truth, plan.truth.targets, plan.val
    one = one_against_rest(truth.labels[rows], len(plan.classes))
    known = one if targets is None else targets[rows].astype(np.float64)
    return ValidationScores(
        classes=plan.classes,
        multi_label=bool(plan.classes) and targets is not None,
        probabilities=probabilities,
        truth=known[:, : len(plan.classes)],
        patients=np.array([patients[row] for row in rows], dtype=np.str_),
    )


def _check_again(
    plan: TrainPlan, model: HybridCNN, examples: Examples, recorded: dict[str, Any]
) -> NDArray[np.float32]:
    """Score the val split with what was written; gives its probabilities, `(n, K)`."""
    table = score_rows(
        model.to(memory_format=torch.channels_last),
        examples,
        plan.val,
        plan.criterion(),
        batch_size=plan.job.batch_size,
        bf16=plan.bf16(torch.device("cpu")),
        classes=plan.classes,
    )
    figures = figures_of(table, plan.truth, plan.val, plan.classes)
    # Another device or batch rounds differently, and may turn one image over.
    allowed = max(_TOLERANCE, 1.5 / len(plan.val))
    for key in _CHECKED:
        before, after = float(recorded[key]), figures[key]
        if math.isnan(before) != math.isnan(after) or abs(before - after) > allowed:
            raise MedVisionError(
                f"Expected the written bundle to reach the {key} of its training, {before:.3f}, but it reaches "
                f"{after:.3f}. The checkpoint may be damaged: delete the training's folder and train again."
            )
    return probabilities_of(table)


def _versions() -> dict[str, str]:
    # Ours is not asked of the installation: a job's working directory can bring the package uninstalled.
    ours = {"python": platform.python_version(), "medvision_ray": medvision_ray.__version__}
    return ours | {name.replace("-", "_"): version(name) for name in _DISTRIBUTIONS}
