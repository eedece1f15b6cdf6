"""The model card of a bundle: facts of the training and of evaluations, and headings that the owner fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import yaml

from medvision_ray.fingerprint import Fingerprint

_Told = Callable[[Mapping[str, Any]], list[str]]


class _Member(Protocol):
    @property
    def model_id(self) -> str: ...

    @property
    def trained(self) -> Mapping[str, Any]: ...


TO_FILL_IN = "**To be filled in by the owner:**"
"""How every part begins that no fact can answer."""

_INTENDED_USE = f"{TO_FILL_IN} purpose, users, modality and body part, population, and uses that are ruled out."
_KNOWN_LIMITS = f"{TO_FILL_IN} known failures, groups that were left out, and who answers for this model."
_OWNERS_MARK = re.compile(r"<!-- owner: ([a-z-]+) -->|<!-- /owner -->")
_OWNERS_PARTS = ("intended-use", "limits")

HEADLINE = (
    *("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "recall", "specificity", "cohen_kappa"),
    *("ece", "brier", "dice", "iou", "hd95_mm", "hd95_px", "lesion_sensitivity", "missed_masks", "failed_images"),
)
_COUNTS = ("missed_masks", "failed_images")
_OF_A_GROUP = ("accuracy", "auroc", "f1", "dice")
_OF_A_CLASS = ("auroc", "recall", "specificity", "f1")
_FEWEST_SHOWN = 5  # a card is passed on: a value of a single image could point at a person
_OUT_OF_FOLD = (
    "Of a cross-validation: each image by the model of its own fold, which had not seen its patient, and not by this ensemble, "
    "which has."
)
_SHOWN_APART = ("labels", "leakage", "shortcuts")


def model_card(
    document: Mapping[str, Any],
    metrics: Mapping[str, Any],
    n_train_images: int,
    *,
    fingerprint: Fingerprint | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    owners: Mapping[str, str] | None = None,
    members: Sequence[_Member] = (),
) -> str:
    """Write the card as Markdown (headings after Mitchell et al., Model Cards for Model Reporting, 2019).

    Args:
        document: content of `bundle.yaml`.
        metrics: validation metrics.
        n_train_images: images that were trained on.
        fingerprint: its categories tell who and what was trained on.
        evaluations: rows of the metrics table, of this model, one evaluation of a dataset and split each.
        owners: what the owner has filled in already, from `owners_texts`.
        members: of an ensemble, whose trainings looked for leaks and shortcuts.
    """
    owners = owners or {}
    trained = document["trained"]
    guarded = [(one.model_id, one.trained) for one in members] or [("", trained)]
    parts = [
        _title(document),
        ["## Intended use", *_of_owner("intended-use", _INTENDED_USE, owners)],
        _model(document),
        _data(trained, n_train_images, fingerprint),
        ["## Leakage guards", *_by_training(guarded, lambda facts: _leakage(facts.get("leakage")))],
        ["## Shortcuts", *_by_training(guarded, _shortcuts)],
        _validation({key: value for key, value in metrics.items() if not isinstance(value, Mapping)}),
        _tests(evaluations),
        _limits(owners),
        ["## Preprocessing", *_facts(document["preprocess"])],
        ["## Training facts", *_facts({key: value for key, value in trained.items() if key not in _SHOWN_APART})],
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts)


def _title(document: Mapping[str, Any]) -> list[str]:
    return [
        f"# Model card: {document['model_id']}",
        "",
        "**Not a medical device.** This model has no regulatory clearance. Its output is not a diagnosis and must not",
        "decide on a patient's care. Everything below is computed from the training and the metrics table, but what is",
        "marked as the owner's.",
    ]


def _by_training(trainings: Sequence[tuple[str, Mapping[str, Any]]], told: _Told) -> list[str]:
    """The same of each training of an ensemble, or of the one that there is."""
    lines: list[str] = []
    for model_id, facts in trainings:
        lines += [*(["", f"### {model_id}"] if model_id else []), *told(facts)]
    return lines


def owners_texts(card: str) -> dict[str, str]:
    """What stands in the owner's parts of a card, between their marks.

    Raises:
        ValueError: marks are not there, not in pairs, or there twice; says which.
    """
    text = card.replace("\r\n", "\n")
    found: dict[str, str] = {}
    marks = list(_OWNERS_MARK.finditer(text))
    for begin, end in zip(marks[::2], [*marks[1::2], None], strict=False):
        name = begin.group(1)
        if name is None or end is None or end.group(1) is not None or name in found:
            raise ValueError("each mark `<!-- owner: NAME -->` must be followed by its `<!-- /owner -->`, once a name")
        found[name] = text[begin.end() : end.start()].removeprefix("\n").removesuffix("\n")
    if absent := [name for name in _OWNERS_PARTS if name not in found]:
        raise ValueError(f"the marks of {', '.join(absent)} are not in it")
    return found


def _of_owner(name: str, asked: str, owners: Mapping[str, str]) -> list[str]:
    return [f"<!-- owner: {name} -->", owners.get(name, asked), "<!-- /owner -->"]


def _model(document: Mapping[str, Any]) -> list[str]:
    architecture, preprocess = document["architecture"], document["preprocess"]
    kind = "findings that may occur together" if document["multi_label"] else "one of these classes"
    outputs = []
    if architecture["classification"]:
        outputs.append(f"- Classification, {kind}: {_plain(', '.join(document['classes']))}.")
    if vote := document.get("vote"):
        outputs.append(f"- {len(document['members'])} networks, whose answers are one by a {vote} vote.")
    if offsets := document.get("class_offsets"):
        each = ", ".join(f"{name} {value:+g}" for name, value in zip(document["classes"], offsets, strict=True))
        outputs.append(f"- The class with the largest ln p + offset is named; offsets chosen on validation: {each}.")
    if architecture["segmentation"]:
        outputs.append(
            f"- Segmentation: a mask; pixels from probability {document['mask_threshold']:g} count as lesion."
        )
    rows, columns = preprocess["size"]
    return [
        "## Model",
        f"- Encoder `{architecture['encoder']}`, {architecture['in_channels']} input channel(s), "
        f"{rows} x {columns} pixels, {preprocess['color']}.",
        *outputs,
        f"- Weights: sha256 `{document['weights_sha256']}`.",
    ]


def _data(trained: Mapping[str, Any], n_train_images: int, fingerprint: Fingerprint | None) -> list[str]:
    lines = [
        "## Data",
        f"{n_train_images} images were trained on. No patient is in two splits; a table that says otherwise is refused.",
    ]
    splits: Mapping[str, Any] = trained.get("labels") or {}
    if splits:
        classes = list(dict.fromkeys(name for item in splits.values() for name in item["classes"]))
        header = ["split", "images", "patients", *classes, "with mask", "unlabelled"]
        rows = [
            [name, item["images"], item["patients"]]
            + [item["classes"].get(label, 0) for label in classes]
            + [item["with_mask"], item["unlabelled"]]
            for name, item in splits.items()
        ]
        lines += ["", *_table(header, rows)]
    known = fingerprint.features.items() if fingerprint is not None else ()
    composition = [
        [name, *_shares(item.categories, item.counts, item.images)]
        for name, item in known
        if item.kind == "category" and item.split == "train"
    ]
    if composition:
        lines += ["", "Of whom and what the training images are:", "", *_table(["", "share of images"], composition)]
    return lines


def _shares(values: Iterable[str], counts: Iterable[int], images: int) -> list[str]:
    kept = [(value, count) for value, count in zip(values, counts, strict=True) if count >= _FEWEST_SHOWN]
    shown = [f"{value} {count / images:.0%}" for value, count in kept]
    unknown = images - sum(count for _, count in kept)
    return [", ".join([*shown, *([f"not told or rare {unknown / images:.0%}"] if unknown else [])])]


def _leakage(leakage: Mapping[str, Any] | None) -> list[str]:
    if leakage is None:
        return ["Not recorded: the bundle is of an earlier version."]
    within = sum(leakage["exact_copies_within_a_split"].values())
    lines = [
        "- Patients in two splits: none. Exact copies of an image in two splits: none. Either would have been refused.",
        f"- Exact copies within a split: {within}.",
    ]
    near = leakage["near_duplicates"]
    if near is None:
        return [*lines, "- Near-duplicates across splits: not looked for (`labels.near_duplicates: off`)."]
    found = ", ".join(f"{count} of {name}" for name, count in near["images"].items() if count)
    return [
        *lines,
        f"- Near-duplicates across splits: {near['pairs']} pairs among {near['compared']} images"
        + (f" ({found}). **Metrics on these images are too good.**" if found else "."),
    ]


def _shortcuts(trained: Mapping[str, Any]) -> list[str]:
    found = trained.get("shortcuts")
    if not found:
        return ["Whether the acquisition alone tells the label was not looked at."]
    lines = [_plain(found["sentence"])]
    rows = [
        [family, name, _figure(item["auroc"], item["ci_low"], item["ci_high"])]
        for family, classes in found["classes"].items()
        for name, item in classes.items()
    ]
    return [*lines, "", *_table(["facts", "class", "AUROC without pixels"], rows)] if rows else lines


def _validation(metrics: Mapping[str, Any]) -> list[str]:
    return [
        "## Validation metrics",
        "On the split that chose this model, so they are better than on new patients.",
        *_facts(metrics),
    ]


def _tests(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## Evaluations"]
    if not evaluations:
        return [
            *lines,
            "None recorded here. `medvision bundle card BUNDLE --evaluations OUTPUT` adds those of the metrics table.",
        ]
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in evaluations):
        rows = [row for row in evaluations if (row["dataset"], row["split"]) == (dataset, split)]
        note = [_OUT_OF_FOLD] if split == "out_of_fold" else []
        lines += ["", f"### {split} split of {_plain(dataset)}", *note, *_measured(rows)]
    return lines


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One evaluation: the whole, each class, each subgroup; intervals are 95 %, over patients."""
    whole = [row for row in rows if row["subgroup"] == "all"]
    images = max((row["n_images"] or 0 for row in whole), default=0)
    patients = max((row["n_patients"] or 0 for row in whole), default=0)
    lines = [f"{images} images of {patients} patients. 95 % intervals over patients.", ""]
    of_all = [row for row in whole if row["class"] in ("all", "macro") and row["metric"] in HEADLINE]
    of_all.sort(key=lambda row: HEADLINE.index(row["metric"]))
    lines += _table(["metric", "over", "value"], [[row["metric"], row["class"], _of_row(row)] for row in of_all])
    names = list(dict.fromkeys(row["class"] for row in whole if row["class"] not in ("all", "macro")))
    if names:
        cells = [[name, *(_cell(whole, name, metric) for metric in _OF_A_CLASS)] for name in names]
        lines += ["", *_table(["class", *_OF_A_CLASS], cells)]
    groups = list(dict.fromkeys((row["subgroup"], row["subgroup_value"]) for row in rows if row["subgroup"] != "all"))
    if groups:
        lines += [
            "",
            *_table(["subgroup", "value", "images", *_OF_A_GROUP], [_group(rows, *group) for group in groups]),
        ]
    return lines


def _group(rows: Sequence[Mapping[str, Any]], subgroup: str, value: str | None) -> list[Any]:
    mine = [row for row in rows if (row["subgroup"], row["subgroup_value"]) == (subgroup, value)]
    found = []
    for metric in _OF_A_GROUP:
        cells = (_cell(mine, over, metric) for over in ("all", "macro"))
        found.append(next((cell for cell in cells if cell != "-"), "-"))
    return [subgroup, value or "unknown", max((row["n_images"] or 0 for row in mine), default=0), *found]


def _cell(rows: Sequence[Mapping[str, Any]], class_name: str, metric: str) -> str:
    return next((_of_row(row) for row in rows if (row["class"], row["metric"]) == (class_name, metric)), "-")


def _of_row(row: Mapping[str, Any]) -> str:
    if row["metric"] in _COUNTS and row["value"] is not None:
        return f"{row['value']:.0f}"
    return _figure(row["value"], row["ci_low"], row["ci_high"])


def _figure(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    shown = f"{value:g}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"
    return f"{shown} ({low:.3f} to {high:.3f})" if low is not None and high is not None else shown


def _limits(owners: Mapping[str, str]) -> list[str]:
    return [
        "## Limits",
        "Not tested on scanners, sites and patients beyond those above; scored runs say when images shift from these.",
        "",
        *_of_owner("limits", _KNOWN_LIMITS, owners),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines]


def _plain(cell: Any) -> str:
    """Text in which nothing is a mark of Markdown's tables or of HTML."""
    return str(cell).replace("|", "/").replace("&", "&amp;").replace("<", "&lt;")


def _facts(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return ["None recorded."]
    return ["```yaml", yaml.safe_dump(dict(facts), sort_keys=False, width=100).rstrip(), "```"]
