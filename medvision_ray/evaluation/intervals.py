"""95 % percentile bootstrap over patients, all resamples of all metrics in one vectorised pass.

Images of one patient are not independent, so patients are drawn with replacement and all images of
a patient move together (cluster bootstrap; Davison and Hinkley, Bootstrap Methods, 1997, 3.8). A
resample is never built: it is a weight per image, how often its patient was drawn, and a metric
that takes weights gives what it would give on the repeated images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from medvision_ray.errors import MedVisionError

Key = tuple[str, str]
"""Class name (or `all`, `macro`) and metric name."""

Statistic = Callable[[NDArray[np.float64]], Mapping[Key, NDArray[np.float64]]]
"""From weights, shape `(resamples, n)`, to each metric's values, shape `(resamples,)`, NaN where undefined."""

LIMITS_PERCENT = (2.5, 97.5)
"""Percentiles of the resamples that bound an interval: 95 % lie inside."""

FEWEST_PATIENTS = 5
"""A metric that rests on fewer patients has no interval (see `carriers`)."""

_CHUNK_WEIGHTS = 1 << 17  # 1 MiB of float64 at a time: the passes over a chunk stay in the cache
_NO_SPREAD = 1e-12


def patient_weights(patients: NDArray[np.str_], *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Weights of the images in each resample, a chunk of resamples at a time.

    Args:
        patients: shape `(n,)`, whose image each is.
        resamples: how many resamples in all.
        seed: seed of the draw; the same patients and seed give the same weights.

    Yields:
        Shape `(chunk, n)`: how often the image's patient was drawn. A resample draws as many
        patients as there are.

    Examples:
        >>> weights = next(patient_weights(np.array(["a", "a", "b", "c"]), resamples=2, seed=0))
        >>> weights.shape
        (2, 4)
        >>> bool((weights[:, 0] == weights[:, 1]).all())
        True
    """
    index = np.unique(patients, return_inverse=True)[1].reshape(-1)
    count = int(index.max()) + 1
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_WEIGHTS // index.size)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        multiplicity = np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count)
        yield multiplicity.astype(np.float64)[:, index]


def bootstrap_intervals(
    statistic: Statistic,
    patients: NDArray[np.str_],
    *,
    resamples: int,
    seed: int,
    carriers: Mapping[Key, int] | None = None,
) -> dict[Key, tuple[float, float] | None]:
    """Percentile interval of each metric.

    Resamples in which a metric is undefined are left out. There is no interval (None) where
    `resamples` is 0, where there are fewer than `FEWEST_PATIENTS`, where more than half of the resamples leave
    the metric undefined, and where all of them give the same value: a perfect score would otherwise get an
    interval of width 0, which claims a certainty that the bootstrap can't know of.

    Args:
        statistic: the metrics as a function of weights.
        patients: shape `(n,)`, whose image each is.
        resamples: number of resamples.
        seed: seed of the draw.
        carriers: how many of the patients a metric rests on, where it is not all of them; of fewer than
            `FEWEST_PATIENTS` it has no interval.

    Returns:
        Lower and upper limit per metric; no entry for any metric where there are no resamples.

    Raises:
        MedVisionError: `resamples` is negative.
    """
    if resamples < 0:
        raise MedVisionError(f"Expected `resamples` to be 0 or more, but got {resamples}.")
    if np.unique(patients).size < FEWEST_PATIENTS:
        return {}
    few = {key for key, count in (carriers or {}).items() if count < FEWEST_PATIENTS}
    chunks: dict[Key, list[NDArray[np.float64]]] = {}
    for weights in patient_weights(patients, resamples=resamples, seed=seed):
        for key, values in statistic(weights).items():
            chunks.setdefault(key, []).append(values)
    return {key: None if key in few else percentile_interval(np.concatenate(values)) for key, values in chunks.items()}


def mean_interval(
    values: NDArray[np.float64], patients: NDArray[np.str_], *, resamples: int, seed: int
) -> tuple[float, float] | None:
    """`bootstrap_intervals` of a mean over images.

    Args:
        values: one an image, shape `(n,)`.
        patients: shape `(n,)`, whose image each is.
        resamples: number of resamples.
        seed: seed of the draw.
    """
    key = ("all", "mean")

    def statistic(weights: NDArray[np.float64]) -> dict[Key, NDArray[np.float64]]:
        return {key: divide(weights @ values, weights.sum(axis=1))}

    return bootstrap_intervals(statistic, patients, resamples=resamples, seed=seed).get(key)


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle 95 % of a metric's values over the resamples.

    Args:
        values: shape `(resamples,)`, NaN where undefined.

    Returns:
        Lower and upper limit; None where more than half of the values are NaN, or all are equal.

    Examples:
        >>> percentile_interval(np.arange(1001.0))
        (25.0, 975.0)
        >>> percentile_interval(np.array([0.5, np.nan, np.nan])) is None
        True
    """
    defined = values[~np.isnan(values)]
    if defined.size == 0 or 2 * defined.size < values.size or np.ptp(defined) <= _NO_SPREAD:
        return None
    low, high = np.percentile(defined, LIMITS_PERCENT)
    return float(low), float(high)


def divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element-wise quotient of arrays that broadcast; NaN, not an error or 0, where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    quotient = np.full(shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def weighted_means(
    weights: NDArray[np.float64], values: NDArray[np.float64], members: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Weighted mean of several per-image values, each over its own images.

    Args:
        weights: shape `(resamples, n)`.
        values: shape `(n, M)`; ignored, NaN included, where the image is no member.
        members: shape `(n, M)`, which images count for which value.

    Returns:
        Shape `(resamples, M)`, NaN where no member has weight.
    """
    return divide(weights @ np.where(members, values, 0.0), weights @ members.astype(np.float64))


def plain_means(values: NDArray[np.float64], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of several per-image values, each over its own images: `weighted_means` at unit weights.

    Args:
        values: shape `(n, M)`.
        members: shape `(n, M)`.

    Returns:
        Shape `(M,)`, NaN where there is no member.
    """
    columns = [column[member] for column, member in zip(values.T, members.T, strict=True)]
    return np.array([column.mean() if column.size else np.nan for column in columns])
