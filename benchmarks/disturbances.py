"""What a network ranks chest X-rays by that is no finding: AUROC of val images disturbed as by another machine or export.

The copy of the data set at hand has all images squeezed to squares, so that pictures of other shapes are distorted differently, which a
network can tell. Three trainings of the same budget, with and without `augment.aspect` and `augment.erase`, are held against each other on
the val split, as it is and disturbed, paired over patients. The test split is not read. The same command goes on where it was stopped.

    python benchmarks/disturbances.py --output FOLDER [--size 160] [--epochs 3] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from facts import machine, print_table, write_results
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from training import PACKAGES, ROOT, Campaign, say
from training_ensemble import settings_of
from training_recipes import CHEST_AUGMENT
from training_tables import chest_labels

RECIPE = "chest_cpu"
VARIANTS: dict[str, dict[str, float]] = {
    "plain": {},
    "aspect": {"aspect": 0.35},
    "aspect and erase": {"aspect": 0.35, "erase": 0.5},
}
RESAMPLES = 500
BATCH = 64
Frame = NDArray[np.uint8]


def _stretched(frame: Frame, across: float, down: float) -> Frame:
    """About the centre; what leaves the frame is cut off."""
    rows, columns = frame.shape
    move = np.array([[across, 0, (1 - across) * columns / 2], [0, down, (1 - down) * rows / 2]])
    return np.asarray(cv2.warpAffine(frame, move, (columns, rows), flags=cv2.INTER_LINEAR), np.uint8)


def _gamma(frame: Frame, exponent: float) -> Frame:
    return np.round(255 * (frame / 255.0) ** exponent).astype(np.uint8)


def _noisy(frame: Frame) -> Frame:
    pattern = np.random.default_rng(int(frame.sum())).normal(0, 12, frame.shape)
    return np.clip(np.round(frame + pattern), 0, 255).astype(np.uint8)


def _jpeg(frame: Frame) -> Frame:
    encoded = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 25])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE), np.uint8)


DISTURBANCES: dict[str, Callable[[Frame], Frame]] = {
    "as it is": lambda frame: frame,
    "a quarter taller": lambda frame: _stretched(frame, 1.0, 1.25),
    "a fifth wider": lambda frame: _stretched(frame, 1.2, 1.0),
    "gamma 0.55": lambda frame: _gamma(frame, 0.55),
    "gamma 1.8": lambda frame: _gamma(frame, 1.8),
    "CLAHE": lambda frame: np.asarray(cv2.createCLAHE(3.0, (4, 4)).apply(frame), np.uint8),
    "blur, 1 pixel": lambda frame: np.asarray(cv2.GaussianBlur(frame, (0, 0), 1.0), np.uint8),
    "noise, 5 %": _noisy,
    "JPEG, quality 25": _jpeg,
}


def main() -> None:
    """Train, disturb, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="to try the script")
    options = parser.parse_args()
    plan = Campaign(
        output=options.output.resolve(),
        data=Path(os.environ.get("MEDVISION_DATA", ROOT / "../shared/data")).resolve(),
        lite_weights=ROOT,
        recipes=(RECIPE,),
        seeds=(options.seed,),
        deadline=0.0,
        cpus=os.cpu_count() or 2,
        quick=options.quick,
        test=False,
    )
    labels = plan.output / "labels" / "chest_xray.csv"
    chest_labels(plan.data / "chest_xray", labels, 96 if plan.quick else None, None)
    with labels.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "val"]
    truth = np.array([row["label"] == "pneumonia" for row in rows])
    patients = np.array([row["patient_id"] for row in rows])
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    trained: dict[str, Any] = {}
    for variant, amounts in VARIANTS.items():
        trained[variant], scores[variant] = _scored(plan, variant, amounts, options, rows)
    found = {name: _compared(truth, patients, {v: scores[v][name] for v in VARIANTS}) for name in DISTURBANCES}
    facts = {
        "size": options.size,
        "epochs": options.epochs,
        "seed": options.seed,
        "quick": plan.quick,
        "images": len(rows),
        "patients": len(set(patients)),
        "variants": VARIANTS,
        "validation": trained,
        "auroc": found,
        "machine": machine(*PACKAGES),
    }
    if not plan.quick:
        write_results("disturbances", facts)
    lines: list[tuple[object, ...]] = []
    for name, by_variant in found.items():
        for variant, row in by_variant.items():
            change = [f"{value:+.4f}" for value in (row["difference"], *row["interval"])] if "interval" in row else []
            lines.append((name, variant, f"{row['auroc']:.4f}", *(change or ["", "", ""])))
    print_table(("val images", "trained with", "AUROC", "against plain", "from", "to"), lines)


def _scored(
    plan: Campaign, variant: str, amounts: dict[str, float], options: argparse.Namespace, rows: list[dict[str, str]]
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Validation figures of a variant, and the probability of pneumonia of each val image under each disturbance."""
    from medvision_ray.config import DecodeConfig, TrainJob, build_job
    from medvision_ray.imaging.decode import decode
    from medvision_ray.imaging.preprocess import prepare
    from medvision_ray.learning.train import train
    from medvision_ray.scoring.predictor import Predictor

    settings = {
        **settings_of(plan, RECIPE, folds=0),
        "name": f"{variant.replace(' ', '-')}-{options.seed}",
        "preprocess": {"size": [options.size, options.size]},
        "augment": {**CHEST_AUGMENT, **amounts},
        "epochs": options.epochs,
    }
    bundle = train(build_job(TrainJob, settings, "the benchmark"), say).bundle
    predictor = Predictor(bundle)
    column = bundle.classes.index("pneumonia")
    images = [
        prepare(
            decode((plan.data / "chest_xray" / row["image"]).read_bytes(), DecodeConfig()), bundle.preprocess
        ).pixels
        for row in rows
    ]
    pixels = np.concatenate(images)
    scores = {}
    for name, disturb in DISTURBANCES.items():
        changed = np.stack([disturb(frame[0])[None] for frame in pixels])
        parts = [predictor.predict(changed[at : at + BATCH]).probabilities for at in range(0, len(changed), BATCH)]
        scores[name] = np.concatenate([part[:, column] for part in parts if part is not None]).astype(np.float64)
        say(f"{variant}: {name}")
    figures = {key: value for key, value in bundle.metrics.items() if isinstance(value, float)}
    return figures, scores


def _compared(
    truth: NDArray[np.bool_], patients: NDArray[np.str_], scores: Mapping[str, NDArray[np.float64]]
) -> dict[str, dict[str, Any]]:
    """AUROC of each variant, and its difference from the plain one with a 95 % interval over patients."""
    from medvision_ray.evaluation.intervals import bootstrap_intervals

    def statistic(weights: NDArray[np.float64]) -> dict[tuple[str, str], NDArray[np.float64]]:
        each = {
            name: np.array([roc_auc_score(truth, values, sample_weight=row) for row in weights])
            for name, values in scores.items()
        }
        return {("all", name): values - each["plain"] for name, values in each.items() if name != "plain"}

    limits = bootstrap_intervals(statistic, patients, resamples=RESAMPLES, seed=0)
    whole = {name: float(roc_auc_score(truth, values)) for name, values in scores.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, value in whole.items():
        found[name] = {"auroc": round(value, 4)}
        if name != "plain":
            interval = limits.get(("all", name))
            found[name]["difference"] = round(value - whole["plain"], 4)
            if interval is not None:
                found[name]["interval"] = [round(limit, 4) for limit in interval]
    return found


if __name__ == "__main__":
    main()
