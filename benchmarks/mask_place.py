"""Does it help to name the class, to know where the mask lies? A second stage on the out-of-fold predictions of hybrids.

Reads what `training_ensemble.py` left below its output folders, one a seed: each fold's model draws the masks of its own fold again. A
logistic regression names the class from the logarithms of the class probabilities, with and without where the mask lies in the head, its
size and the head's shape; it is fitted to four folds and asked about the fifth, so no patient is in both. Differences are means over the
seeds, paired over patients. The test split is not read.

    python benchmarks/mask_place.py --output FOLDER [FOLDER ...] --seeds 0 [1 ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from facts import machine, print_table, write_results
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvision_ray import storage
from medvision_ray.bundle import load_bundle
from medvision_ray.config import DecodeConfig
from medvision_ray.evaluation.intervals import bootstrap_intervals
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.scoring.predictor import Predictor

Floats = NDArray[np.float64]

RECIPE, ALONE = "brain-hybrid-cpu", "brain-classification-cpu"
HEAD = ["aspect", "head"]
MASK = ["down", "aside", "high", "wide", "area", "depth"]
_AIR = 20  # of 255: what is brighter is head
_BATCH = 16
_SMALLEST = 1e-4
_RESAMPLES = 4000


def main() -> None:
    """Draw, fit, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, nargs="+", type=Path)
    parser.add_argument("--seeds", required=True, nargs="+", type=int)
    options = parser.parse_args()
    seeds, alone = [], []
    for folder, seed in zip(options.output, options.seeds, strict=True):
        seeds.append(right_or_wrong(with_places(folder, seed)))
        rows = out_of_fold(folder, f"{ALONE}-{seed}")
        alone.append(None if rows is None else right_or_wrong(rows))
    pairs = {
        f"{one} against {other}": compare([rows[one] - rows[other] for rows in seeds], seeds[0]["patient"])
        for one, other in (
            ("fitted", "likeliest"),
            ("fitted, head", "fitted"),
            ("fitted, head and mask", "fitted"),
            ("fitted, head and mask", "fitted, head"),
            ("fitted, head and mask", "likeliest"),
        )
    }
    for name in ("likeliest", "fitted"):
        told = [
            rows["fitted, head and mask"] - other[name]
            for rows, other in zip(seeds, alone, strict=True)
            if other is not None
        ]
        if told:
            pairs[f"fitted, head and mask against classification alone, {name}"] = compare(told, seeds[0]["patient"])
    accuracy = [{name: rows[name].mean() for name in rows if name != "patient"} for rows in seeds]
    result = {"machine": machine("torch", "scikit-learn"), "seeds": options.seeds, "accuracy": accuracy, "pairs": pairs}
    write_results("mask_place", result)
    print_table(
        ("accuracy", "seeds", "difference", "from", "to"),
        [(pair, row["seeds"], f"{row['difference']:+.4f}", *row["interval"]) for pair, row in pairs.items()],
    )


def out_of_fold(folder: Path, name: str) -> pd.DataFrame | None:
    """The out-of-fold rows of a training in the order of the label table; None where it was not trained."""
    place = folder / "runs" / name / "training" / name / "out_of_fold.parquet"
    if not place.exists():
        return None
    rows = pd.read_parquet(place)
    return rows[rows["error_code"].isna()].sort_values("row", ignore_index=True)


def with_places(folder: Path, seed: int) -> pd.DataFrame:
    """Out-of-fold rows of the hybrid, with what `place_of` says of each image."""
    rows = out_of_fold(folder, f"{RECIPE}-{seed}")
    assert rows is not None, f"Expected {RECIPE} of seed {seed} below {folder}: run training_ensemble.py"
    parts = []
    for fold, part in rows.groupby("fold"):
        bundle = load_bundle(str(folder / "runs" / f"{RECIPE}-{seed}" / "bundles" / f"{RECIPE}-{seed}-fold-{fold}"))
        predictor = Predictor(bundle, "auto", batch_frames=_BATCH)
        for start in range(0, len(part), _BATCH):
            batch = part.iloc[start : start + _BATCH]
            read = (decode(storage.read_bytes(uri), DecodeConfig()) for uri in batch["uri"])
            pixels = np.stack([prepare(image, bundle.preprocess).pixels[0] for image in read])
            masks = predictor.predict(pixels).masks
            assert masks is not None  # of a hybrid
            places = [place_of(mask.astype(np.float64), image[0]) for mask, image in zip(masks, pixels, strict=True)]
            parts.append(pd.DataFrame(places, index=batch.index))
    return rows.join(pd.concat(parts))


def place_of(mask: Floats, image: NDArray[np.uint8]) -> dict[str, float]:
    """Where a mask of probabilities `(H, W)` lies in the head's box, which leaves out 1 % at each side; lengths are shares of the box.

    `down` and `aside` (from the middle) are its centre, `high` and `wide` its standard deviations, `depth` its mean distance from the
    head's border, `area` the logarithm of its share of the head; `aspect` is the box's height by width, `head` the head's share.
    """
    head = image > _AIR
    (top, bottom), (left, right) = (np.percentile(places, [1, 99]) for places in np.nonzero(head))
    height, width = bottom - top + 1, right - left + 1
    total = mask.sum() + 1e-6
    rows, columns = np.indices(mask.shape)
    row, column = (mask * rows).sum() / total, (mask * columns).sum() / total
    border = cv2.distanceTransform(head.astype(np.uint8), cv2.DIST_L2, 5)
    return {
        "down": (row - top) / height,
        "aside": abs((column - left) / width - 0.5),
        "high": np.sqrt((mask * (rows - row) ** 2).sum() / total) / height,
        "wide": np.sqrt((mask * (columns - column) ** 2).sum() / total) / width,
        "area": np.log(total / head.sum() + _SMALLEST),
        "depth": (mask * border).sum() / total / height,
        "aspect": (bottom - top) / width,
        "head": head.mean(),
    }


def right_or_wrong(rows: pd.DataFrame) -> pd.DataFrame:
    """1.0 where each way to decide names the true class, with `patient`."""
    columns = [name for name in rows if name.startswith("p_")]
    classes = [name.removeprefix("p_") for name in columns]
    truth = np.array([classes.index(label) for label in rows["true_label"]])
    logits = np.log(rows[columns].to_numpy(np.float64).clip(_SMALLEST))
    told = {"likeliest": logits.argmax(axis=1), "fitted": cross_fitted(logits, truth, rows["fold"].to_numpy())}
    if "down" in rows:
        for name, more in (("fitted, head", HEAD), ("fitted, head and mask", [*HEAD, *MASK])):
            features = np.column_stack([logits, rows[more].to_numpy()])
            told[name] = cross_fitted(features, truth, rows["fold"].to_numpy())
    return pd.DataFrame({name: (named == truth).astype(float) for name, named in told.items()}).assign(
        patient=rows["patient_number"].to_numpy()
    )


def cross_fitted(features: Floats, truth: NDArray[np.intp], folds: NDArray[np.intp]) -> NDArray[np.intp]:
    """The class that a logistic regression fitted to the other folds names."""
    named = np.empty(len(truth), dtype=np.intp)
    for fold in np.unique(folds):
        own = folds == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features[~own], truth[~own])
        named[own] = model.predict(features[own])
    return named


def compare(differences: list[pd.Series], patients: pd.Series) -> dict[str, Any]:
    """Mean over seeds and images, with a 95 % percentile interval over patients."""
    each = np.mean([part.to_numpy() for part in differences], axis=0)

    def mean(weights: Floats) -> dict[tuple[str, str], Floats]:
        return {("all", "accuracy"): weights @ each / weights.sum(axis=1)}

    limits = bootstrap_intervals(mean, patients.to_numpy(str), resamples=_RESAMPLES, seed=0)
    interval = [round(float(limit), 4) for limit in limits["all", "accuracy"]]
    return {"seeds": len(differences), "difference": float(each.mean()), "interval": interval}


if __name__ == "__main__":
    main()
