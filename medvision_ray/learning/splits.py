"""Splits by patient: made from fractions and a seed, and checked so that no patient is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import LabelError

SPLITS = ("train", "val", "test")
_ROWS_SHOWN = 5


@dataclass(frozen=True)
class SplitAssignment:
    """One split a row; cannot exist with a patient in two splits.

    Attributes:
        patients: patient of each row, `n` texts.
        splits: `train`, `val` or `test` of each row, `n` texts.

    Raises:
        LabelError: a patient is in two splits. The message gives counts and row numbers only.
    """

    patients: tuple[str, ...]
    splits: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: dict[str, set[str]] = defaultdict(set)
        for patient, split in zip(self.patients, self.splits, strict=True):
            seen[patient].add(split)
        divided = {patient for patient, found in seen.items() if len(found) > 1}
        if divided:
            rows = [row for row, patient in enumerate(self.patients) if patient in divided]
            raise LabelError(
                f"Expected each patient in one split, but {len(divided)} of {len(seen)} patients are in two or more "
                f"({row_numbers(rows)}). Give all rows of a patient the same split, or drop the split column and let "
                "the splits be made by patient."
            )


def row_numbers(rows: Sequence[int]) -> str:
    """Row numbers for a message: row 1 is the first below the header; the first few and how many more."""
    shown = ", ".join(str(row + 1) for row in rows[:_ROWS_SHOWN])
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}, the first below the header being 1"


def split_by_patient(strata: Mapping[str, int], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Share patients out among splits, stratum by stratum.

    Within a stratum patients come in the order of a seeded hash of their text, and each goes to the split that is
    furthest behind its share so far. So shares hold overall and in each stratum to about one patient, and neither
    row order nor machine matters.

    Args:
        strata: stratum (the most common class) of each patient.
        fractions: share of each split, summing to 1.
        seed: another seed gives another split.

    Returns:
        The split of each patient.

    Raises:
        LabelError: too few patients: a split with a share above 0 stays empty.
    """
    ordered = sorted(strata, key=lambda patient: (strata[patient], _rank(patient, seed), patient))
    counts = dict.fromkeys(fractions, 0)
    assigned: dict[str, str] = {}
    for number, patient in enumerate(ordered, start=1):
        split = max(fractions, key=lambda name: fractions[name] * number - counts[name])
        counts[split] += 1
        assigned[patient] = split
    empty = [name for name, share in fractions.items() if share > 0 and counts[name] == 0]
    if empty:
        raise LabelError(
            f"Expected enough patients for the splits {', '.join(fractions)}, but with {len(strata)} patients "
            f"{', '.join(empty)} stays empty. Label more patients, change `labels.fractions`, or give a split column."
        )
    return assigned


def _rank(patient: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{patient}".encode()).digest()


def patient_strata(patients: Sequence[str], classes: Iterable[int]) -> dict[str, int]:
    """The most common class index of each patient; of equally common ones the lowest.

    Args:
        patients: patient of each row.
        classes: class index of each row; -1 where there is none.
    """
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for patient, index in zip(patients, classes, strict=True):
        counts[patient][index] += 1
    return {
        patient: min(found, key=lambda index: (index < 0, -found[index], index)) for patient, found in counts.items()
    }


def duplicate_groups(digests: Sequence[str], splits: Sequence[str] | NDArray[np.str_]) -> list[list[int]]:
    """Groups of rows with equal content that lie in more than one split.

    Args:
        digests: content digest of each image; an empty text (an image that was not read) matches nothing.
        splits: split of each image.

    Returns:
        Row indices (from 0) of each group, ascending, in the order of their first rows.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        if digest:
            groups[digest].append(row)
    return [rows for rows in groups.values() if len({str(splits[row]) for row in rows}) > 1]
