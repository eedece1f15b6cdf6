"""What could make a model look better than it is, looked for before it is trained: near-duplicates and shortcuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from medvision_ray.config import LabelsConfig
from medvision_ray.errors import LabelError
from medvision_ray.learning.ingest import DecodedImages
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.near_duplicates import LARGEST_DISTANCE, NearPair, near_pairs
from medvision_ray.learning.shortcuts import ProbedImages, probe_shortcuts
from medvision_ray.learning.splits import SPLITS

_EXAMPLES = 20
Say = Callable[[str], None]


def look_for_leaks(table: LabelTable, decoded: DecodedImages, config: LabelsConfig, say: Say) -> dict[str, Any]:
    """Guards beyond those that refuse a table anyway (patients or exact copies in two splits).

    Args:
        say: is told in a sentence what was found.

    Returns:
        For the bundle's facts: `leakage` and `shortcuts`. Images are named by their row in the label table, row 1 being
        the first below the header; no address, patient or cell is in it.

    Raises:
        LabelError: near-duplicates across splits and `labels.near_duplicates: refuse`.
    """
    leakage: dict[str, Any] = {
        "patients_in_two_splits": 0,
        "exact_copies_across_splits": 0,
        "exact_copies_within_a_split": _copies_within(table, decoded),
        "near_duplicates": None,
    }
    if config.near_duplicates != "off":
        leakage["near_duplicates"] = _near_duplicates(table, decoded, config, say)
    shortcuts = probe_shortcuts(_probed(table, decoded, config)) if table.classes else None
    if shortcuts is not None and shortcuts["told"]:
        say(shortcuts["sentence"])
    return {"leakage": leakage, "shortcuts": shortcuts}


def _copies_within(table: LabelTable, decoded: DecodedImages) -> dict[str, int]:
    """Images that repeat the pixels of an earlier one of their split: they only weigh double."""
    counts = Counter(
        (digest, str(split)) for digest, split in zip(decoded.digests, table.splits, strict=True) if digest
    )
    return {name: sum(count - 1 for (_, split), count in counts.items() if split == name) for name in SPLITS}


def _near_duplicates(table: LabelTable, decoded: DecodedImages, config: LabelsConfig, say: Say) -> dict[str, Any]:
    pairs = near_pairs(decoded.hashes, table.splits)
    images = {name: len({row for pair in pairs for row in pair.rows if table.splits[row] == name}) for name in SPLITS}
    facts = {
        "largest_distance": LARGEST_DISTANCE,
        "compared": sum(bool(found) for found in decoded.hashes),
        "pairs": len(pairs),
        "images": images,
        "examples": [_named(pair, table) for pair in pairs[:_EXAMPLES]],
    }
    if not pairs:
        return facts
    counts = ", ".join(f"{count} of {name}" for name, count in images.items() if count)
    first = ", ".join(f"{pair.rows[0] + 1} and {pair.rows[1] + 1}" for pair in pairs[:3])
    found = (
        f"{len(pairs)} pairs of images in different splits look nearly the same ({counts}), the nearest in rows {first}, "
        "the first below the header being 1"
    )
    if config.near_duplicates == "refuse":
        raise LabelError(
            f"Expected no near-duplicates across splits (`labels.near_duplicates: refuse`), but {found}. Give them one "
            "split, or look at them and set `labels.near_duplicates: warn`."
        )
    say(f"LEAK? {found}. A model measured on copies of what it was trained on looks better than it is.")
    return facts


def _named(pair: NearPair, table: LabelTable) -> dict[str, Any]:
    return {
        "rows": [row + 1 for row in pair.rows],
        "splits": [str(table.splits[row]) for row in pair.rows],
        "distance": pair.distance,
    }


def _probed(table: LabelTable, decoded: DecodedImages, config: LabelsConfig) -> ProbedImages:
    rows = [row for row in np.flatnonzero(table.splits != "test").tolist() if decoded.facts[row] is not None]
    if table.targets is not None:
        truth = table.targets[rows].astype(np.float64)
    else:
        labels = table.labels[rows]
        truth = (labels[:, None] == np.arange(len(table.classes))).astype(np.float64)
        truth[labels < 0] = np.nan
    return ProbedImages(
        facts=[facts for row in rows if (facts := decoded.facts[row]) is not None],
        columns={name: [table.columns[name][row] for row in rows] for name in config.acquisition_columns},
        patients=[table.patients[row] for row in rows],
        truth=truth,
        classes=table.classes,
        multi_label=table.multi_label,
    )
