"""One frozen model per job: what each verb of `medvision` is configured by, but for `ServeJob`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from medvision_ray.config.decisions import CalibrationConfig, OperatingPointsConfig, SitePointsConfig
from medvision_ray.config.network import AugmentConfig, LossConfig, ModelConfig
from medvision_ray.config.operations import LoggingConfig, OnFinishConfig
from medvision_ray.config.sections import (
    ArchiveConfig,
    DecodeConfig,
    DriftConfig,
    Fraction,
    LabelsConfig,
    Name,
    NonNegative,
    Positive,
    PreprocessConfig,
    PrivacyConfig,
    RayConfig,
    Section,
    Seed,
)

Subgroup = Literal["patient_sex", "patient_age_band", "manufacturer", "modality", "mask_size"]
SUBGROUPS: tuple[Subgroup, ...] = get_args(Subgroup)
_DATASET = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]{1,128}")


class TrainJob(Section):
    """Train a hybrid CNN with Ray Train (DDP) and write it as a bundle."""

    output: str
    """Folder or prefix for everything that is written: bundles/, training/, tables/."""
    name: Name | None = None
    """Name of the training; null derives one from the configuration. The same name resumes, a new training needs a new one."""
    labels: LabelsConfig
    """The label table."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """Preprocessing; travels in the bundle."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder limits."""
    model: ModelConfig = ModelConfig()
    """Architecture and initial weights."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the train split."""
    loss: LossConfig = LossConfig()
    """Loss."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """`shuffle`: each train image once an epoch; `balanced`: as many draws, rare classes and findings oftener (docs/training.md)."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Calibrated probabilities beside the raw ones."""
    operating_points: OperatingPointsConfig = OperatingPointsConfig()
    """Thresholds that the bundle carries."""
    mask_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """Probability from which a pixel counts as lesion; `auto`: that of the best Dice on val if it is shown to be better than 0.5."""
    epochs: Positive = 20
    """Most epochs."""
    batch_size: Positive = 16
    """Images per worker and step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the heads (AdamW, cosine schedule)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Each encoder stage towards the input learns at this factor of the next one's rate; 1 is the same rate everywhere."""
    weight_decay: NonNegative = 1e-2
    """AdamW weight decay (not on biases and norms)."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear warm-up."""
    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """First epochs with the encoder frozen, its normalisation statistics included."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay a step of the moving average of the weights, which is what is validated and kept; 0 turns it off."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many epochs without a better validation score; 0 never stops early."""
    gradient_clip: NonNegative = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision of training; `auto` is bf16 autocast where the GPU or CPU computes in it, else float32."""
    workers: Positive | tuple[Positive, Positive] = 2
    """DDP workers; `[1, 2]` goes on with fewer where nodes are lost and grows again when they are back (docs/training.md)."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU a worker; `auto` where the cluster has that many."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of each worker."""
    max_failure_fraction: Fraction = 0.0
    """Share of labelled images that may fail to decode before training is refused."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a lost worker group is started again from the last checkpoint."""
    seed: Seed = 0
    """Seed of initial weights, order and augmentation."""
    folds: Annotated[int, Field(ge=0, le=32)] = 0
    """Cross-validation: so many models, each trained on all train and val patients but one fold's, become an ensemble; 0 trains one."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Pseudonym key."""
    ray: RayConfig = RayConfig()
    """Where Ray runs."""
    on_finish: OnFinishConfig = OnFinishConfig()
    """Whom to tell how the job ended."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""

    @property
    def fewest_workers(self) -> int:
        """Without so many there is no training."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """As many as are asked for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _workers(self) -> TrainJob:
        if self.fewest_workers > self.most_workers:
            raise ValueError("`workers` must be a number, or the fewest and the most, in this order")
        if self.folds and not isinstance(self.workers, int):
            raise ValueError("`folds` train side by side and need a fixed number of `workers`")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainJob:
        if self.folds == 1:
            raise ValueError("`folds` must be 0 (one training) or at least 2")
        if self.freeze_epochs >= self.epochs:
            raise ValueError(f"`freeze_epochs` ({self.freeze_epochs}) must be below `epochs` ({self.epochs})")
        if self.freeze_epochs and self.model.weights is None:
            raise ValueError(
                "`freeze_epochs` freezes a randomly initialised encoder: give `model.weights`, or set it to 0"
            )
        if self.preprocess.color == "rgb" and self.model.in_channels == 1:
            raise ValueError("`preprocess.color: rgb` needs `model.in_channels: 3`")
        if self.preprocess.slices > 1 and self.model.in_channels != self.preprocess.slices:
            slices = self.preprocess.slices
            raise ValueError(f"`preprocess.slices: {slices}` needs `model.in_channels: {slices}`")
        if self.operating_points.decide_at is not None and not self.labels.findings:
            raise ValueError("`operating_points.decide_at` is for findings; single-label rows name the likeliest class")
        if self.operating_points.positive_class is not None and self.labels.findings:
            raise ValueError(
                "`operating_points.positive_class` is for single-label training: every finding has a threshold"
            )
        if self.loss.classification == "asymmetric" and not self.labels.findings:
            raise ValueError(
                "`loss.classification: asymmetric` is for multi-label training and needs `labels.findings`"
            )
        if self.sampling == "balanced" and self.loss.class_weights == "balanced":
            raise ValueError(
                "`sampling: balanced` would balance twice: set `loss.class_weights` to none, or to weights"
            )
        if self.labels.findings and self.loss.label_smoothing:
            raise ValueError("`loss.label_smoothing` is for single-label training and can't go with `labels.findings`")
        return self


class ScoringConfig(Section):
    """How objects are scored; shared by the score and evaluate jobs."""

    placement: Literal["auto", "fused", "staged"] = "auto"
    """`fused`: an actor does an object's whole way; `staged`: CPU actors decode, GPU actors predict; `auto`: staged with GPUs."""
    batch_size: Positive | None = None
    """Frames per forward pass; null is 16 on CPUs (small ones are faster there), 128 on GPUs, halved where memory ends."""
    block_rows: Positive = 256
    """Objects per Ray Data block: the unit of progress that a killed run keeps."""
    read_threads: Positive = 8
    """Threads per actor that read ahead: at 50 ms a read, 8 keep up with 160 objects a second."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision of the forward pass; `auto` is bf16 where the GPU or CPU computes in it, else float32. Set it where nodes differ."""
    actors: Positive | None = None
    """Actors with a model; null is one a CPU or GPU (fused), or one to four a GPU by its CPUs (staged)."""
    save_masks: bool = True
    """Keep each mask, compressed, in its row."""
    max_attempts: Positive = 3
    """How often a batch whose worker died is tried, each object in a process of its own, before its objects are given up."""


class FailureBudget(Section):
    """When a finished run counts as over budget (exit code 3)."""

    max_failure_fraction: Fraction = 0.05
    """Largest share of the run's objects that may fail."""
    by_code: dict[str, Fraction] = Field(default_factory=dict)
    """Largest share for single error codes, such as `{corrupt: 0.01, worker_crash: 0}`."""


class ScoreJob(Section):
    """Score what an archive holds and this model has not scored yet; publish to the tables."""

    archive: ArchiveConfig
    """The archive."""
    bundle: str
    """The trained model: folder or URI of a bundle, or of a pointer called `current` (docs/operations.md)."""
    output: str
    """Folder or prefix for everything that is written: tables/, runs/."""
    run_key: str | None = None
    """Names the run; null derives it. A run that is published is never done again."""
    retry_failed: bool | tuple[str, ...] = False
    """Score again what failed before: true for all, or a list of error codes. The new rows replace the old failures."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop beginning objects after this time, publish what is done; the next run goes on with the rest."""
    scoring: ScoringConfig = ScoringConfig()
    """How."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder limits."""
    budget: FailureBudget = FailureBudget()
    """Failure budget."""
    drift: DriftConfig = DriftConfig()
    """Comparison with the training images."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Pseudonym key."""
    ray: RayConfig = RayConfig()
    """Where Ray runs."""
    on_finish: OnFinishConfig = OnFinishConfig()
    """Whom to tell how the job ended."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""


class EvaluateJob(Section):
    """Metrics of a bundle on one split of a label table, from prediction rows."""

    labels: LabelsConfig
    """The label table; the split is the one the bundle was trained with."""
    bundle: str
    """The trained model."""
    output: str
    """Folder or prefix for everything that is written; labelled images without a prediction there are scored first."""
    split: Literal["train", "val", "test"] = "test"
    """The split to measure."""
    dataset: str | None = None
    """Name in the metrics table; null is the name of the label table's folder."""
    resamples: Annotated[int, Field(ge=0)] = 1000
    """Bootstrap resamples over patients; 0 leaves intervals out."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    surface_tolerance_mm: NonNegative = 2.0
    """Surface Dice counts outlines this near as equal, where an image's spacing is true in the patient."""
    surface_tolerance_px: NonNegative = 2.0
    """The same in pixels, for images without such a spacing."""
    lesion_iou: Fraction = 0.0
    """A lesion is detected by a drawn region with at least this intersection over union; 0 is any overlap."""
    subgroups: tuple[Subgroup, ...] = SUBGROUPS
    """Measure groups of images apart, by columns of the predictions and by the size of the true mask."""
    subgroup_columns: tuple[str, ...] = ()
    """Columns of the label table to group by too, such as the site."""
    subgroup_min_patients: Positive = 10
    """Groups of fewer patients are counted and not measured."""
    scoring: ScoringConfig = ScoringConfig()
    """How missing predictions are made."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder limits."""
    budget: FailureBudget = FailureBudget()
    """Failure budget."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Pseudonym key."""
    ray: RayConfig = RayConfig()
    """Where Ray runs."""
    on_finish: OnFinishConfig = OnFinishConfig()
    """Whom to tell how the job ended."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""

    @model_validator(mode="after")
    def _names(self) -> EvaluateJob:
        if self.dataset is not None and not _DATASET.fullmatch(self.dataset):
            raise ValueError(
                "`dataset` must be a name of 1 to 128 characters without slashes and control characters, since files are called "
                f"by it, not {self.dataset!r}"
            )
        taken = {*self.subgroups, "all", "drift"}
        for name in self.subgroup_columns:
            if name in taken:
                raise ValueError(
                    f"`subgroup_columns` must not name a group that is there already, but has {name!r}; rename the column of the "
                    "label table, or take the name out of `subgroups`"
                )
            taken.add(name)
        return self


class CalibrateJob(Section):
    """Fit a calibration and operating points to a bundle's predictions of the val split: an ensemble's, or a site's own patients."""

    labels: LabelsConfig
    """The label table; its val split is scored and fitted to, and nothing else of it is looked at."""
    bundle: str
    """The model: folder or URI of a bundle, which stays as it is."""
    output: str
    """Folder or prefix for everything that is written; labelled images without a prediction there are scored first."""
    to: str | None = None
    """Where the new bundle is written; null is OUTPUT/bundles/NAME."""
    name: Name | None = None
    """Name of the new bundle; null is the old one's with `-calibrated` behind it."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Calibrated probabilities beside the raw ones."""
    operating_points: SitePointsConfig = SitePointsConfig()
    """Thresholds that the bundle carries. `decide_at` null keeps the thresholds that name findings."""
    scoring: ScoringConfig = ScoringConfig()
    """How missing predictions are made."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder limits."""
    budget: FailureBudget = FailureBudget()
    """Failure budget; over it nothing is fitted."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Pseudonym key."""
    ray: RayConfig = RayConfig()
    """Where Ray runs."""
    on_finish: OnFinishConfig = OnFinishConfig()
    """Whom to tell how the job ended."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""


class CompareJob(EvaluateJob):
    """Two bundles on the same images of a split, paired: differences with intervals and tests."""

    baseline: str
    """The bundle that `bundle` is compared with."""


class InventoryJob(Section):
    """List an archive: how many objects, how large, and what a bundle has not scored yet."""

    archive: ArchiveConfig
    """The archive."""
    bundle: str | None = None
    """Count as new what this model has not committed."""
    output: str | None = None
    """Where the tables are; needed with `bundle`."""
    privacy: PrivacyConfig = PrivacyConfig()
    """The score job's: with `uri: hash`, what is new can only be told with the key."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""

    @model_validator(mode="after")
    def _consistent(self) -> InventoryJob:
        if (self.bundle is None) != (self.output is None):
            raise ValueError("`bundle` and `output` go together: one names the model, the other its tables")
        return self


class ExplainJob(Section):
    """Why a bundle says what it says of single images: Grad-CAM of a class and outlines of the mask, as pictures and JSON."""

    bundle: str
    """The trained model."""
    images: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or URIs of images."""
    output: str
    """Folder or prefix for the pictures and a JSON file an image, named by `image_id`."""
    class_name: str | None = None
    """The class to explain; null takes each image's likeliest."""
    frame: Annotated[int, Field(ge=0)] | None = None
    """Frame of a multi-frame image, from 0; null takes the one with the largest mask, else with the largest probability."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder limits."""
    privacy: PrivacyConfig = PrivacyConfig()
    """The score job's: with `uri: hash`, `image_id` can only be told with the key."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""


class ReportJob(Section):
    """One self-contained HTML file about a training, an evaluation, a comparison of two models, or a night."""

    output: str
    """The folder or prefix that holds tables/ and training/."""
    bundle: str
    """The model to report on."""
    kind: Literal["training", "evaluation", "comparison", "night"] | None = None
    """Null takes a comparison with `baseline`, a night with `run_key`, else the first there is: evaluation, training, night."""
    baseline: str | None = None
    """Comparison: the bundle that `medvision compare` compared with."""
    run_key: str | None = None
    """Night: the scoring run; null takes the one that finished last."""
    file: str | None = None
    """Where to write; null is OUTPUT/reports/MODEL-KIND.html."""
    examples: Annotated[int, Field(ge=0, le=64)] = 12
    """Overlays to show of an evaluation, and as many of its worst cases."""
    explanations: Annotated[int, Field(ge=0, le=64)] = 6
    """Grad-CAM pictures to show of an evaluation."""
    max_megabytes: Annotated[float, Field(gt=0)] = 8.0
    """Pictures that would make the page larger are left out and counted."""
    title: str = "medvision_ray report"
    """Title of the page."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""

    @model_validator(mode="after")
    def _consistent(self) -> ReportJob:
        if self.baseline is not None and self.kind not in (None, "comparison"):
            raise ValueError("`baseline` is for `kind: comparison`")
        if self.kind == "comparison" and self.baseline is None:
            raise ValueError("`kind: comparison` needs `baseline`, the bundle that is compared with")
        if self.run_key is not None and (self.kind not in (None, "night") or self.baseline is not None):
            raise ValueError("`run_key` is for `kind: night`")
        return self
