"""The fingerprint of a training: what its images were like, and what the finished model says of those it validates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.fingerprint import (
    CATEGORIES,
    MASK_FRACTION,
    NUMBERS,
    Fingerprint,
    Reference,
    reference_of_categories,
    reference_of_numbers,
)
from medvision_ray.imaging.grid import fit
from medvision_ray.learning.feed import Examples, Integers
from medvision_ray.learning.loop import TrainPlan
from medvision_ray.scoring.predictor import Predictor

_MOST_SCORED = 2000  # images of val: more would not sharpen a distribution in ten bins
_BATCH = 32


@dataclass(frozen=True, eq=False)
class ImagesSeen:
    """The labelled images, one entry a row of the label table.

    Attributes:
        facts: `image_facts.FACTS`; None for images that failed.
        patients: never written: they are counted.
    """

    facts: Sequence[dict[str, Any] | None]
    patients: Sequence[str]


def training_fingerprint(bundle: Bundle, plan: TrainPlan, examples: Examples, images: ImagesSeen) -> Fingerprint:
    """Facts of the train split, and scores of the val split as a scoring run would write them.

    Args:
        bundle: written; its model is loaded once more and scores up to 2,000 val images.
        examples: the prepared images.
    """
    features: dict[str, Reference | None] = {}
    seen = [facts for row in plan.train if (facts := images.facts[row]) is not None]
    patients = [images.patients[row] for row in plan.train if images.facts[row] is not None]
    for name in NUMBERS:
        features[name] = reference_of_numbers([facts[name] for facts in seen], patients, "train")
    for name in CATEGORIES:
        features[name] = reference_of_categories([facts[name] for facts in seen], patients, "train")
    rows = _rows_to_score(plan, images)
    if len(rows):
        scored = [images.patients[row] for row in rows]
        for name, values in _scores(bundle, examples, images, rows).items():
            features[name] = reference_of_numbers(values.tolist(), scored, "val")
    return Fingerprint({name: reference for name, reference in features.items() if reference is not None})


def _rows_to_score(plan: TrainPlan, images: ImagesSeen) -> Integers:
    """Images of one frame: of others a scoring run averages over frames, and the training kept one."""
    single = [row for row in plan.val if (facts := images.facts[row]) is not None and facts["frames"] == 1]
    rows = np.array(single, dtype=np.int64)
    return np.sort(np.random.default_rng(0).permutation(rows)[:_MOST_SCORED])


def _scores(bundle: Bundle, examples: Examples, images: ImagesSeen, rows: Integers) -> dict[str, NDArray[np.float64]]:
    """Each `p_<class>` and `mask_fraction`, one value a row."""
    predictor = Predictor(bundle)
    preprocess = bundle.preprocess
    probabilities, fractions = [], []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        found = predictor.predict(examples.batch(part).images.numpy())
        if found.probabilities is not None:
            probabilities.append(found.probabilities)
        for row, mask in zip(part, found.masks if found.masks is not None else (), strict=False):
            facts = images.facts[row] or {}
            grid = fit((facts["height"], facts["width"]), preprocess.size, preprocess.resize == "pad")
            fractions.append(float(grid.mask_to_source(mask, bundle.mask_threshold).mean()))
    scores = {}
    if probabilities:
        columns = tables.probability_columns(bundle.classes)
        scores = dict(zip(columns, np.concatenate(probabilities).astype(np.float64).T, strict=True))
    if fractions:
        scores[MASK_FRACTION] = np.array(fractions)
    return scores
