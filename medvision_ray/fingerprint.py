"""What a model was trained on, as distributions that a night of scoring can be held against: PSI and KS.

A fingerprint holds counts in bins and order statistics of facts that a prediction row has too (brightness of the
prepared input, geometry, what the header says of the scanner, the model's scores). No pixel, no address, no key of a
patient is in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvision_ray.tables.schema import INPUT_STATISTICS

NUMBERS = (
    *(column.name for column in INPUT_STATISTICS),
    *("height", "width", "row_spacing_mm", "column_spacing_mm", "kvp", "slice_thickness_mm"),
)
CATEGORIES = ("modality", "manufacturer", "body_part", "view", "patient_sex", "patient_age_band")
MASK_FRACTION = "mask_fraction"

PSI_MODERATE, PSI_SHIFTED = 0.1, 0.25
"""Siddiqi, Credit Risk Scorecards (2006): below 0.1 no shift worth a look, from 0.25 a shift."""

_CHANCE = 1e-3  # how often sampling alone may reach a feature's bound
_BINS = 10
_QUANTILES = 501
_MOST_CATEGORIES = 20
_PSEUDO_COUNT = 0.5  # of each bin, so that an empty one is no infinite shift
_VERSION = 1
_TOLD = 5
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """One feature's distribution at training.

    Attributes:
        kind: `number` or `category`.
        split: the images it is of: `train`, or `val` for scores, since a model is too sure of what it was trained on.
        images: images that it was taken of, missing values included.
        patients: their patients: images of one patient are no independent draws.
        missing: images without a value.
        edges: numbers: bin i holds values over `edges[i - 1]` up to `edges[i]`; the first and last bin lie outside of
            all values seen at training.
        categories: the values, most frequent first.
        counts: images of each bin or category.
        quantiles: numbers: evenly spaced order statistics, at most 501, for KS.
    """

    kind: Literal["number", "category"]
    split: str
    images: int
    patients: int
    missing: int
    edges: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class FeatureDrift:
    """How one feature of a night lies against its reference.

    Attributes:
        psi: population stability index, 0 and up.
        ks: largest distance between the two cumulative distributions, 0 to 1; None for categories.
        shifted: `psi` is 0.25 or more, and more than samples of so few patients reach by chance.
    """

    feature: str
    psi: float
    ks: float | None
    shifted: bool
    n_images: int
    n_patients: int


@dataclass(frozen=True)
class Drift:
    """How a run's images lie against those of the training.

    Attributes:
        judged: false where it could not be told, and `reason` says why.
        shifted: features that lie elsewhere than at training, the largest PSI first.
        features: each one that could be compared, the largest PSI first.
        over_budget: the largest PSI is above `drift.max_psi`.
    """

    judged: bool
    reason: str = ""
    shifted: tuple[str, ...] = ()
    features: tuple[FeatureDrift, ...] = ()
    over_budget: bool = False

    def line(self) -> str:
        """For a person: the shift, or that there is none, or why it could not be told."""
        if not self.judged:
            return f"Drift not judged: {self.reason}."
        if not self.shifted:
            moderate = [item.feature for item in self.features if item.psi >= PSI_MODERATE]
            return f"No shift from the training images; PSI of {PSI_MODERATE} or more: {', '.join(moderate) or 'none'}."
        told = ", ".join(
            f"{item.feature} (PSI {item.psi:.2f}{'' if item.ks is None else f', KS {item.ks:.2f}'})"
            for item in [item for item in self.features if item.shifted][:_TOLD]
        )
        more = f" and {len(self.shifted) - _TOLD} more" if len(self.shifted) > _TOLD else ""
        return f"SHIFTED from the training images: {told}{more}. Look at this run's images before using its results."


@dataclass(frozen=True)
class Fingerprint:
    """References by feature; see `NUMBERS`, `CATEGORIES`, `p_<class>` and `mask_fraction`."""

    features: Mapping[str, Reference] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `fingerprint.json`; `from_json` is the way back."""
        return {"version": _VERSION, "features": {name: asdict(item) for name, item in self.features.items()}}

    @staticmethod
    def from_json(document: Any) -> Fingerprint:
        """Read what `as_json` gave.

        Raises:
            ValueError: it is something else, or of a later version.
        """
        try:
            if document["version"] != _VERSION:
                raise ValueError
            return Fingerprint({name: _reference(item) for name, item in document["features"].items()})
        except (KeyError, TypeError, AttributeError):
            raise ValueError from None


def _reference(item: dict[str, Any]) -> Reference:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
    return Reference(**fields)


def reference_of_numbers(values: Sequence[Any], patients: Sequence[str], split: str) -> Reference | None:
    """The distribution of a number, in bins of about a tenth of the images each; None where no image has a value.

    Args:
        values: one an image; None or NaN where missing.
        patients: patient of each image.
    """
    known = _numbers(values)
    found = np.sort(known[~np.isnan(known)])
    if not found.size:
        return None
    # Values that really occur: a bin's edge is then a value itself, and few different values get a bin each.
    inner = np.quantile(found, np.arange(1, _BINS) / _BINS, method="inverted_cdf")
    edges = np.unique([np.nextafter(found[0], -np.inf), *inner, found[-1]])
    places = np.linspace(0, found.size - 1, min(found.size, _QUANTILES)).round().astype(int)
    return Reference(
        kind="number",
        split=split,
        images=known.size,
        patients=len(set(patients)),
        missing=int(known.size - found.size),
        edges=tuple(edges.tolist()),
        counts=tuple(_binned(found, edges).tolist()),
        quantiles=tuple(found[places].tolist()),
    )


def reference_of_categories(values: Sequence[str | None], patients: Sequence[str], split: str) -> Reference | None:
    """The shares of a code's values, the 20 most frequent; None where no image has a value."""
    counts = Counter(value for value in values if value)
    if not counts:
        return None
    kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_CATEGORIES]
    return Reference(
        kind="category",
        split=split,
        images=len(values),
        patients=len(set(patients)),
        missing=sum(not value for value in values),
        categories=tuple(value for value, _ in kept),
        counts=tuple(count for _, count in kept),
    )


def drift_of(name: str, reference: Reference, values: Sequence[Any] | Floats, n_patients: int) -> FeatureDrift:
    """Hold a night's values against a reference.

    PSI is the sum over bins of (night - training) ln(night / training), of shares with half an image added to each bin.
    Missing values are a bin of their own, and so are values outside of the training's range and categories that it did
    not have. Where nothing has changed, PSI / (1/n + 1/m) follows chi-square with (bins - 1) degrees of freedom
    (Yurdakul, Statistical Properties of the Population Stability Index, 2018); n and m count patients here, and a
    feature is shifted only above the value that chance reaches once in a thousand.

    Args:
        values: one an image; at least one.
        n_patients: patients of the night.
    """
    from scipy.stats import chi2, ks_2samp  # a second to load: not for whoever only reads bundles

    ks = None
    if reference.kind == "number":
        known = _numbers(values)
        found = known[~np.isnan(known)]
        night = [*_binned(found, np.array(reference.edges)).tolist(), known.size - found.size]
        training = [*reference.counts, reference.missing]
        if found.size:
            ks = float(ks_2samp(np.array(reference.quantiles), found, method="asymp").statistic)
    else:
        counts = Counter(value for value in values if value)
        known_counts = [counts.pop(value, 0) for value in reference.categories]
        night = [*known_counts, counts.total(), len(values) - sum(known_counts) - counts.total()]
        rare = reference.images - reference.missing - sum(reference.counts)
        training = [*reference.counts, rare, reference.missing]
    used = [pair for pair in zip(night, training, strict=True) if any(pair)]
    psi = population_stability([a for a, _ in used], [b for _, b in used])
    chance = float(chi2.ppf(1 - _CHANCE, max(len(used) - 1, 1))) * (1 / n_patients + 1 / reference.patients)
    return FeatureDrift(name, psi, ks, psi >= max(PSI_SHIFTED, chance), len(values), n_patients)


def population_stability(counts: Sequence[float], expected: Sequence[float]) -> float:
    """PSI of counts against expected counts over the same bins.

    Examples:
        >>> population_stability([50, 50], [500, 500])
        0.0
        >>> round(population_stability([80, 20], [500, 500]), 2)
        0.41
    """
    shares, expected_shares = (
        (np.array(each, float) + _PSEUDO_COUNT) / (sum(each) + _PSEUDO_COUNT * len(each)) for each in (counts, expected)
    )
    return abs(float(((shares - expected_shares) * np.log(shares / expected_shares)).sum()))


def _numbers(values: Sequence[Any] | Floats) -> Floats:
    if isinstance(values, np.ndarray):
        return values.astype(np.float64, copy=False)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _binned(values: Floats, edges: Floats) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
