"""The same metrics over groups of images: by sex, age band, manufacturer, modality, site or size of the true mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medvision_ray.errors import LabelError
from medvision_ray.evaluation.measure import MetricRow, measurable, measure
from medvision_ray.evaluation.samples import EvaluationSamples

UNKNOWN = "unknown"
"""Value of images of which a variable is not known: a group of its own, so that groups add up to the whole."""

_MOST_VALUES = 50  # more are identifiers or measurements, not groups
_MASK_SIZES = ((0.0, "empty"), (0.005, "under 0.5 %"), (0.02, "0.5 to 2 %"), (1.0, "over 2 %"))


def subgroup_values(
    scored: pd.DataFrame, samples: EvaluationSamples, variables: Sequence[str], columns: Sequence[str]
) -> dict[str, NDArray[np.str_]]:
    """Which group each image is in.

    Args:
        scored: a row an image, with the predictions' columns and `column:NAME` for each of `columns`.
        samples: the same images.
        variables: columns of the predictions, or `mask_size`: the true mask's share of the image.
        columns: columns of the label table.

    Returns:
        Shape `(n,)` a variable. A variable that has one value throughout is left out: its only group is
        the whole.

    Raises:
        LabelError: a column of the label table has more than 50 values.
    """
    found: dict[str, NDArray[np.str_]] = {}
    for name in variables:
        if name == "mask_size":
            found[name] = _mask_sizes(scored, samples)
        else:
            found[name] = _texts(scored[name])
    for name in columns:
        found[name] = _texts(scored[f"column:{name}"])
        if (count := np.unique(found[name]).size) > _MOST_VALUES:
            raise LabelError(
                f"Expected at most {_MOST_VALUES} values in column `{name}` of `subgroup_columns`, but it has {count}."
            )
    return {name: values for name, values in found.items() if np.unique(values).size > 1}


def measure_subgroups(
    samples: EvaluationSamples,
    values: Mapping[str, NDArray[np.str_]],
    *,
    min_patients: int,
    resamples: int,
    seed: int,
) -> Iterator[MetricRow]:
    """`measure` over each group.

    Args:
        samples: all images.
        values: `subgroup_values`.
        min_patients: a group of fewer is counted and not measured.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Yields:
        For each group the count `images`, then its metrics; `subgroup` is the variable's name.
    """
    for variable, groups in values.items():
        for value in np.unique(groups):
            inside = samples.take(groups == value)
            patients = int(np.unique(inside.patients).size)
            yield MetricRow(
                variable, "all", "images", float(inside.n), None, None, inside.n, patients, subgroup_value=str(value)
            )
            if patients >= min_patients and measurable(inside):
                for row in measure(inside, resamples=resamples, seed=seed):
                    yield replace(row, subgroup=variable, subgroup_value=str(value))


def _texts(column: pd.Series) -> NDArray[np.str_]:
    texts = column.fillna("").astype(str).str.strip().replace("", UNKNOWN)
    return texts.to_numpy().astype(np.str_)


def _mask_sizes(scored: pd.DataFrame, samples: EvaluationSamples) -> NDArray[np.str_]:
    if samples.true_area is None:
        return np.full(samples.n, UNKNOWN)
    share = samples.true_area / (scored["height"] * scored["width"]).to_numpy(np.float64)
    sizes = np.full(samples.n, UNKNOWN, dtype="<U16")
    for limit, name in reversed(_MASK_SIZES):
        sizes[share <= limit] = name
    return sizes
