"""Splits by patient: made from fractions and a seed, and checked so that no patient is in two of them."""

from __future__ import annotations

import hashlib
import warnings
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


def folds_by_patient(
    patients: Sequence[str], classes: Sequence[int], digests: Sequence[str], *, folds: int, seed: int
) -> NDArray[np.int64]:
    """Share images out among folds: no patient in two of them, classes as even as that allows.

    Patients of whom one has an image with the very pixels of another's are kept together.

    Args:
        patients: patient of each image.
        classes: class index of each image; -1 where there is none.
        digests: content digest of each image; empty where it was not read.

    Returns:
        The fold of each image, from 0, shape `(n,)` (scikit-learn's StratifiedGroupKFold).

    Raises:
        LabelError: too few patients for so many folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = _linked(patients, digests)
    found = len(set(groups.tolist()))
    if found < folds:
        raise LabelError(
            f"Expected at least {folds} patients (without images in common) in train and val for `folds: {folds}`, but there "
            f"are {found}. Lower `folds`, or label more patients."
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    assigned = np.full(len(groups), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer images than folds
        try:
            for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(groups)), np.asarray(classes), groups)):
                assigned[rows] = fold
        except ValueError:
            raise LabelError(
                f"Expected a class with at least {folds} images in train and val for `folds: {folds}`, but there is none. "
                "Lower `folds`, or label more images."
            ) from None
    empty = folds - len(set(assigned.tolist()))
    if empty:
        raise LabelError(
            f"Expected images in each of {folds} folds, but {empty} would be empty: a few patients have most images. Lower "
            "`folds`."
        )
    return assigned


def _linked(patients: Sequence[str], digests: Sequence[str]) -> NDArray[np.int64]:
    """A number of each image that those of its patient share, and those with its pixels, and so on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[tuple[str, str], int] = {}
    links = [
        (row, first.setdefault(key, row))
        for row, (patient, digest) in enumerate(zip(patients, digests, strict=True))
        for key in [("patient", patient)] + ([("digest", digest)] if digest else [])
    ]
    rows, columns = np.array(links).T
    graph = coo_array((np.ones(len(links)), (rows, columns)), shape=(len(patients), len(patients)))
    _, groups = connected_components(graph, directed=False)
    return np.asarray(groups, dtype=np.int64)
