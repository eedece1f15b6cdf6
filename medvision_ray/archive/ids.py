"""Sets of image_id as sorted arrays: a million of them in tenths of a second.

numpy's own `unique` and `isin` hash from 2.3 on, which takes 20 times as long for random 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def sorted_distinct(parts: Sequence[Ids]) -> Ids:
    """Every id of the parts once, ascending."""
    ids = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    return ids[np.concatenate([[True], ids[1:] != ids[:-1]])] if len(ids) else ids


def is_in(ids: Ids, known: Ids) -> NDArray[np.bool_]:
    """Which ids are among `known`, which is ascending."""
    if len(known) == 0:
        return np.zeros(len(ids), np.bool_)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.asarray(known[places] == ids)
