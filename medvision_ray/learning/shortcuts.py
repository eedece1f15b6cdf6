"""Can the way an image was made tell its label? A model that sees no pixel is tried on it, with patients kept apart.

Where it succeeds, a network can score well by recognising the scanner or the site, and fail at the next one (Zech et
al., PLOS Medicine 2018; DeGrave et al., Nature Machine Intelligence 2021).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision_ray.evaluation.intervals import bootstrap_intervals
from medvision_ray.evaluation.ranking import weighted_ranking

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "size": ("height", "width", "aspect"),
    "spacing": ("row_spacing_mm", "column_spacing_mm"),
    "device": ("manufacturer", "manufacturer_model"),
    "exposure": ("kvp", "slice_thickness_mm"),
    "format": ("source_format", "modality"),
}
"""Facts of `image_facts`, by what they tell; `columns` are the label table's own (`labels.acquisition_columns`)."""

TELLS_FROM = 0.6
"""The label is told where the interval of AUROC lies above 0.5 and AUROC itself is at least this."""

_FOLDS = 5
_LEAST_PATIENTS = 10  # of each class and of all others
_MOST_IMAGES = 10_000
_MOST_VALUES = 20
_TREES = 50
_RESAMPLES = 500
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ProbedImages:
    """The images that the probe may see: those of train and val, never of test.

    Attributes:
        facts: `image_facts.FACTS` of each.
        columns: the label table's acquisition columns, one text an image.
        patients: whose each is.
        truth: 1, 0 or NaN a class, shape `(n, K)`.
        classes: names of the K classes.
        multi_label: they are findings that may occur together; of two labels one says all, of two findings none does.
    """

    facts: Sequence[Mapping[str, Any]]
    columns: Mapping[str, Sequence[str]]
    patients: Sequence[str]
    truth: Floats
    classes: Sequence[str]
    multi_label: bool = False


def probe_shortcuts(images: ProbedImages, seed: int = 0) -> dict[str, Any]:
    """Train a small forest on acquisition facts alone and say how well it tells each class.

    Five folds by patient, stratified by class; AUROC of the out-of-fold probabilities with a 95 % bootstrap interval
    over patients. At most 10,000 images are taken.

    Returns:
        `told` and `sentence`; `classes`: `auroc`, `ci_low`, `ci_high` by family (`all`: everything together) and class;
        `alike`: families in which all images are the same.
    """
    tables = {name: table for name, table in _tables(images).items() if table.shape[1]}
    alike = [name for name in (*FAMILIES, *(["columns"] if images.columns else [])) if name not in tables]
    if not tables:
        return _verdict(
            {}, alike, "Nothing of the acquisition differs between the images, so it cannot tell the label."
        )
    if len(tables) > 1:
        tables = {"all": np.concatenate(list(tables.values()), axis=1), **tables}
    places = [1] if len(images.classes) == 2 and not images.multi_label else range(len(images.classes))
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for place in places:
        rows = _rows(images, place, seed)
        if rows is None:
            continue
        for family, table in tables.items():
            measured = _auroc(table[rows], images.truth[rows, place] > 0, np.array(images.patients)[rows], seed)
            found.setdefault(family, {})[images.classes[place]] = measured
    if not found:
        return _verdict({}, alike, f"Not probed: every class needs {_LEAST_PATIENTS} patients with and without it.")
    return _verdict(found, alike, "")


def _verdict(found: dict[str, Any], alike: list[str], sentence: str) -> dict[str, Any]:
    each = [(item["auroc"], family, name, item) for family, by in found.items() for name, item in by.items()]
    telling = [entry for entry in each if _tells(entry[3])]
    if telling:
        auroc, family, name, item = max(telling, key=lambda entry: entry[0])
        families = " and ".join(sorted({entry[1] for entry in telling} - {"all"}) or [family])
        # Without limits all draws agree: the classes are told apart without an error.
        limits = "" if item["ci_low"] is None else f"{item['ci_low']:.2f} to {item['ci_high']:.2f}; "
        sentence = (
            f"SHORTCUT: `{name}` can be told without a look at the pixels, from the acquisition alone ({families}): "
            f"AUROC {auroc:.2f} ({limits}chance is 0.50). A model can learn this in place of the disease: balance the "
            "acquisition over the classes, or measure each group by itself."
        )
    elif each:
        auroc, _, name, _ = max(each, key=lambda entry: entry[0])
        sentence = (
            f"No shortcut found: acquisition facts tell no class above chance (best: `{name}`, AUROC {auroc:.2f})."
        )
    return {"told": bool(telling), "sentence": sentence, "classes": found, "alike": alike}


def _tells(item: Mapping[str, float | None]) -> bool:
    low = item["ci_low"]
    return (item["auroc"] or 0.0) >= TELLS_FROM and (low is None or low > 0.5)


def _rows(images: ProbedImages, place: int, seed: int) -> NDArray[np.int64] | None:
    """Images of which the class is known; None where too few patients have it, or do not."""
    known = np.flatnonzero(~np.isnan(images.truth[:, place]))
    patients = np.array(images.patients)
    with_it = set(patients[known[images.truth[known, place] > 0]])
    without = set(patients[known[images.truth[known, place] == 0]])
    if min(len(with_it), len(without)) < _LEAST_PATIENTS:
        return None
    return np.sort(np.random.default_rng(seed).permutation(known)[:_MOST_IMAGES])


def _tables(images: ProbedImages) -> dict[str, Floats]:
    """Families as numbers, `(n, features)`; features in which all images are alike are left out."""
    found = {}
    for family, names in FAMILIES.items():
        values = [
            [facts["width"] / facts["height"] if n == "aspect" else facts[n] for facts in images.facts] for n in names
        ]
        found[family] = values
    found["columns"] = [list(cells) for cells in images.columns.values()]
    return {family: _encoded(values, len(images.facts)) for family, values in found.items()}


def _encoded(values: Sequence[Sequence[Any]], n: int) -> Floats:
    columns: list[Floats] = []
    for each in values:
        if any(isinstance(value, str) for value in each):
            common = [value for value, _ in Counter(each).most_common(_MOST_VALUES)]
            columns += [np.array([other == value for other in each], dtype=np.float64) for value in common]
        else:
            columns.append(np.array([-1.0 if value is None else value for value in each], dtype=np.float64))
    varied = [column for column in columns if np.ptp(column) > 0]
    return np.stack(varied, axis=1) if varied else np.zeros((n, 0))


def _auroc(table: Floats, positive: NDArray[np.bool_], patients: NDArray[Any], seed: int) -> dict[str, float | None]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    scores = np.full(len(table), np.nan)
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    for train, held_out in folds.split(table, positive, patients):
        forest = RandomForestClassifier(
            _TREES, min_samples_leaf=3, max_depth=8, class_weight="balanced", random_state=seed
        )
        chances = forest.fit(table[train], positive[train]).predict_proba(table[held_out])
        scores[held_out] = chances[:, list(forest.classes_).index(True)] if True in forest.classes_ else 0.0
    ranking = weighted_ranking(scores, positive)
    key = ("all", "auroc")
    value = float(ranking(np.ones((1, len(table))))["auroc"][0])
    limits = bootstrap_intervals(
        lambda weights: {key: ranking(weights)["auroc"]}, patients.astype(np.str_), resamples=_RESAMPLES, seed=seed
    ).get(key)
    low, high = limits or (None, None)
    return {"auroc": value, "ci_low": low, "ci_high": high}
