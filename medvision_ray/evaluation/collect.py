"""Truth and prediction of a split as samples: images without a prediction are scored first, then rows and labels are joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import Inventory, list_uris, only_new
from medvision_ray.bundle import Bundle, image_digest
from medvision_ray.config import EvaluateJob
from medvision_ray.errors import ConfigError, LabelError, MedVisionError
from medvision_ray.evaluation.mask_pairs import measure_masks
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.evaluation.segmentation import dice_per_image
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.logs import Reporter
from medvision_ray.privacy import Pseudonymiser, address_pseudonymiser
from medvision_ray.scoring.run import RunPlan, execute
from medvision_ray.scoring.summary import RunSummary

_COLUMNS = (
    "image_id",
    "height",
    "width",
    "frames",
    "key_frame",
    "mask_box",
    "mask",
    "predicted_label",
    "spacing_mm",
    "spacing_source",
    "modality",
    "manufacturer",
    "patient_sex",
    "patient_age_band",
)


@dataclass(frozen=True, eq=False)
class Collected:
    """A split with a bundle's predictions.

    Attributes:
        dataset: name in the metrics table.
        table: the labels of the split.
        images: images of the split.
        patients: patients of the split.
        failed: images without a prediction.
        scored: a row an image that has one: truth, prediction, what subgroups go by, `dice`.
        samples: the same images as arrays.
        run: the scoring of images that had no prediction.
        names: pseudonyms of addresses where the site wants them.
    """

    dataset: str
    table: LabelTable
    images: int
    patients: int
    failed: int
    scored: pd.DataFrame
    samples: EvaluationSamples
    run: RunSummary
    names: Pseudonymiser | None


@dataclass(frozen=True, eq=False)
class JoinedSplit:
    """A split's labels beside a bundle's prediction rows; `frame` has a row an image, nulls where it has none."""

    dataset: str
    table: LabelTable
    frame: pd.DataFrame
    failed: int
    run: RunSummary
    names: Pseudonymiser | None

    @property
    def scored(self) -> pd.DataFrame:
        """The images with a prediction.

        Raises:
            MedVisionError: there are none.
        """
        scored = self.frame[self.frame["height"].notna()].reset_index(drop=True)
        if scored.empty:
            raise MedVisionError("Expected predictions for the images of the split, but every one of them failed.")
        return scored


def collect(job: EvaluateJob, bundle: Bundle, say: Reporter) -> Collected:
    """Everything that a split's metrics are made of.

    Raises:
        LabelError: the split is empty, was trained on, or its classes are not the bundle's.
        MedVisionError: the images could not be scored.
    """
    found = join_split(job, bundle, say, masks=True)
    say(f"Measuring {len(found.frame) - found.failed} of {len(found.frame)} {job.split} images of {found.dataset}.")
    scored = found.scored
    samples = _samples(job, bundle, scored)
    scored["dice"] = _dice(samples)
    patients = int(found.frame["patient"].nunique())
    return Collected(
        *(found.dataset, found.table, len(found.frame), patients, found.failed, scored, samples, found.run, found.names)
    )


def join_split(job: EvaluateJob, bundle: Bundle, say: Reporter, *, masks: bool = False) -> JoinedSplit:
    """Labels and predictions of a split; images without a prediction are scored first.

    Args:
        masks: the predicted masks will be compared with true ones.

    Raises:
        LabelError: the split is empty, was trained on, or its classes are not the bundle's.
        ConfigError: masks are to be compared and not to be kept.
        MedVisionError: the images could not be scored.
    """
    whole = load_labels(job.labels, job.subgroup_columns)
    table = whole.select(job.split)
    _check(job, bundle, table)
    if masks and bundle.architecture.segmentation and not job.scoring.save_masks and any(table.masks):
        raise ConfigError(
            "Expected `scoring.save_masks: true` where masks are compared with true ones, but it is false."
        )
    dataset = job.dataset or storage.absolute(job.labels.table).rsplit("/", 2)[-2]
    names = address_pseudonymiser(job.privacy)
    listed = list_uris(table.uris, names)
    plan = RunPlan("evaluate", f"{storage.absolute(job.labels.table)}#{job.split}", job)
    run = execute(plan, lambda found: only_new(listed, job.output, found.model_id), say)
    frame = _join(job, bundle, table, listed).assign(row=np.flatnonzero(whole.splits == job.split))
    failed = int(frame["predicted_label"].isna().sum()) if bundle.classes else int(frame["height"].isna().sum())
    return JoinedSplit(dataset, table, frame, failed, run, names)


def _dice(samples: EvaluationSamples) -> np.ndarray[Any, Any]:
    """Dice of each image; NaN where both masks are empty or no true one is known."""
    if samples.overlap is None or samples.predicted_area is None or samples.true_area is None:
        return np.full(samples.n, np.nan)
    areas = (samples.overlap, samples.predicted_area, samples.true_area)
    return dice_per_image(*(area.astype(np.float64) for area in areas))


def _check(job: EvaluateJob, bundle: Bundle, table: LabelTable) -> None:
    if not len(table):
        raise LabelError(f"Expected images in the {job.split} split of {job.labels.table}, but it has none.")
    if bundle.classes and table.classes and set(table.classes) - set(bundle.classes):
        raise LabelError(
            f"Expected classes of the bundle ({', '.join(bundle.classes)}) in {job.labels.table}, but it has others too: "
            f"{', '.join(sorted(set(table.classes) - set(bundle.classes)))}."
        )
    if bundle.classes and table.classes and bundle.multi_label != table.multi_label:
        wanted = "findings, which may occur together" if bundle.multi_label else "one label an image"
        remedy = "Set `labels.findings` to its columns" if bundle.multi_label else "Leave `labels.findings` out"
        raise LabelError(
            f"Expected {wanted}, as {bundle.model_id} was trained on, but {job.labels.table} is read as the other. {remedy}."
        )
    trained = set(bundle.train_digest)
    names = address_pseudonymiser(job.privacy)
    if names is None and bundle.trained.get("image_digests") == "hashed":
        raise LabelError(
            f"Expected `privacy.uri: hash` and the key with which {bundle.model_id} was trained: without them nobody can "
            "tell which images it has seen."
        )
    leaked = _seen(table, names, trained)
    if leaked and job.split != "train":
        raise LabelError(
            f"Expected images that {bundle.model_id} has not seen, but {leaked} of {len(table)} in the {job.split} split "
            "were trained on. Use the label table and split settings of the training."
        )
    fitted = _seen(table, names, set(bundle.fitted_digest)) if job.split == "test" else 0
    if fitted:
        raise LabelError(
            f"Expected test images that nothing of {bundle.model_id} was fitted to, but {fitted} of {len(table)} were in the val "
            "split that chose its epoch and what it decides by, or in that of `medvision calibrate`. Measure on others."
        )


def _seen(table: LabelTable, names: Pseudonymiser | None, digests: set[str]) -> int:
    return sum(bool({image_digest(uri), image_digest(uri, names)} & digests) for uri in table.uris)


def _join(job: EvaluateJob, bundle: Bundle, table: LabelTable, listed: Inventory) -> pd.DataFrame:
    """One row an image of the split, in its order: truth, and the prediction row or nulls."""
    ids = listed.objects["image_id"]
    condition = (pads.field("model_id") == bundle.model_id) & pads.field("image_id").isin(ids.combine_chunks())
    columns = [*_COLUMNS, *tables.probability_columns(bundle.classes), *tables.calibrated_columns(bundle.classes)]
    rows = tables.read(job.output, "predictions", columns, condition)
    predictions = rows.to_pandas() if rows is not None else pd.DataFrame(columns=columns)
    frame = pd.DataFrame({"image_id": ids.to_numpy(), "uri": table.uris, "mask_uri": table.masks})
    frame["patient"] = [f"p:{name}" for name in table.patients]
    names_of = np.array([*table.classes, ""], dtype=object)
    frame["true_label"] = names_of[table.labels] if not table.multi_label else ""
    if table.targets is not None:
        for place, name in enumerate(table.classes):
            frame[f"t_{name}"] = table.targets[:, place]
    for name, cells in table.columns.items():
        frame[f"column:{name}"] = cells
    joined = frame.merge(predictions, on="image_id", how="left", validate="one_to_one")
    return joined


def _samples(job: EvaluateJob, bundle: Bundle, scored: pd.DataFrame) -> EvaluationSamples:
    """Truth and prediction as arrays; masks are compared on each image's own grid."""
    pairs = measure_masks(job, scored) if bundle.architecture.segmentation else None
    samples = EvaluationSamples(
        classes=bundle.classes or ("lesion",),
        multi_label=bundle.multi_label,
        patients=scored["patient"].to_numpy().astype(str),
        overlap=pairs.overlap if pairs else None,
        predicted_area=pairs.predicted_area if pairs else None,
        true_area=pairs.true_area if pairs else None,
        detail=pairs.detail if pairs else None,
        labels=None if bundle.multi_label else np.full(len(scored), -1),
        targets=np.full((len(scored), len(bundle.classes)), np.nan) if bundle.multi_label else None,
    )
    if not bundle.classes:
        return samples
    probabilities = scored[tables.probability_columns(bundle.classes)].to_numpy(np.float32)
    found: dict[str, Any] = {"probabilities": probabilities, "operating_points": bundle.operating_points}
    if bundle.calibration is not None:
        found["calibrated"] = scored[tables.calibrated_columns(bundle.classes)].to_numpy(np.float32)
    if bundle.multi_label:
        targets = np.stack([scored.get(f"t_{n}", pd.Series(np.nan, scored.index)) for n in bundle.classes], axis=1)
        thresholds = np.asarray(bundle.thresholds, np.float32)
        return replace(samples, targets=targets.astype(float), thresholds=thresholds, **found)
    index = {name: place for place, name in enumerate(bundle.classes)}
    labels = scored["true_label"].map(index).fillna(-1).to_numpy(np.int64)
    predicted = scored["predicted_label"].map(index).to_numpy(np.int64)
    return replace(samples, labels=labels, predicted=predicted, **found)
