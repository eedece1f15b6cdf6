"""The sections that several jobs' configurations share. Every option is documented here, once."""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from medvision_ray.config.since import parse_since

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of bundles, trainings and searches: folders are called by them."""


def _named(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a name has letters, digits, '.', '_' and '-', begins with a letter or digit and is at most 64 long; got {name!r}"
        )
    return name


Name = Annotated[str, AfterValidator(_named)]
_MOST_PARTS = 4096


class Section(BaseModel):
    """Base of every configuration model: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ArchiveConfig(Section):
    """Which objects there are."""

    uri: str
    """Folder or prefix that holds the images: a local path, file:// or s3:// URI. What other sources name outside it is excluded."""
    s3_inventory: str | None = None
    """Path or URI of the `manifest.json` of an S3 Inventory (CSV or Parquet) that is read instead of listing `uri`."""
    list_file: str | None = None
    """Path or URI of a list that is read instead of listing: an address or a path under `uri` a line, or CSV or Parquet (docs/runs.md)."""
    prefix: tuple[str, ...] = ()
    """Take only what lies below one of these paths under `uri`; listing starts there."""
    include: tuple[str, ...] = ("**",)
    """Glob patterns over the path relative to `uri` (`**` spans folders); an object must match one."""
    exclude: tuple[str, ...] = ("**/.*",)
    """Glob patterns that take objects out again; how many is in the run's summary."""
    since: str | None = None
    """Leave out what was modified before: `2026-11-24`, `2026-11-24T03:00:00+01:00` (UTC without a zone) or an age: `36h`, `7d`, `2w`."""
    limit: Positive | None = None
    """Take only the first N new objects in path order; for trials."""
    part: str | None = None
    """`3/16`: take the third of sixteen even parts, a run each, so that memory holds a part of a huge archive (docs/scaling.md)."""
    listing_threads: Annotated[int, Field(gt=0, le=32)] = 16
    """Threads that list folders and prefixes, ask for listed objects, or read their headers, at once."""
    volumes: bool = False
    """Take the single CT, MR and PET slices of a series as one volume and one row; reads the header of every listed object."""

    @model_validator(mode="after")
    def _consistent(self) -> ArchiveConfig:
        if self.s3_inventory and self.list_file:
            raise ValueError("`s3_inventory` and `list_file` are two sources of one listing; give one of them")
        if self.s3_inventory and not self.uri.startswith("s3://"):
            raise ValueError(
                f"`s3_inventory` lists a bucket, so `uri` must be s3://BUCKET or below, but it is {self.uri!r}"
            )
        for path in self.prefix:
            parts = path.rstrip("/").split("/")
            if "://" in path or not all(parts) or {".", ".."} & set(parts):
                raise ValueError(f"`prefix` must hold paths relative to `uri`, such as 2026/11, but one is {path!r}")
        if self.part is not None:
            self._check_part(self.part)
        if self.since is not None and self.volumes:
            raise ValueError(
                "`since` can't go with `volumes`: it would cut a series where slices came at several times"
            )
        if self.since is not None:
            try:
                parse_since(self.since, datetime.now(timezone.utc))
            except ValueError as error:
                raise ValueError(f"`since`: {error}") from None
        return self

    def _check_part(self, part: str) -> None:
        number, _, parts = part.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts) <= _MOST_PARTS):
            raise ValueError(
                f"`part` must be which of how many (at most {_MOST_PARTS}), such as 3/16, but it is {part!r}"
            )
        if self.volumes:
            raise ValueError("`part` can't go with `volumes`: it would cut series; use `prefix` and a run for each")


class DecodeConfig(Section):
    """Limits that hold before memory is allocated; each has its own error code."""

    max_bytes: Positive = 1 << 30
    """Largest object in bytes that is read (`too_large`)."""
    max_frame_pixels: Positive = 100_000_000
    """Largest rows times columns of one frame (`too_large`)."""
    max_frames: Positive = 4096
    """Most frames or slices in one object (`too_large`)."""
    max_decoded_bytes: Positive = 2 << 30
    """Most bytes that an object may decode or decompress to (`too_large`, `decompression_bomb`)."""
    max_tiles: Positive = 65_536
    """Most JPEG 2000 tiles in one frame (`decompression_bomb`)."""
    max_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Longest time for reading, decoding and preparing one object (`timeout`)."""
    max_memory_bytes: Positive = 8 << 30
    """Memory that one object may take above what its process had before (`out_of_memory`); never over half the node's."""
    isolation: Literal["worker", "process"] = "worker"
    """`process`: every object is read and decoded in a child process with limits, for hostile archives; `worker`: only suspects are."""
    reduced: bool = False
    """Scoring decodes JPEG and grey JPEG 2000 at a lower resolution, at least twice the model's: faster, nearly alike (docs/imaging.md)."""
    for_processing: Literal["take", "refuse"] = "take"
    """`refuse`: raw X-rays (Presentation Intent Type FOR PROCESSING) fail (`for_processing`); `take`: they are scored and marked."""
    volume_index: Annotated[int, Field(ge=0)] | None = None
    """Which volume of a four-dimensional NIfTI to take; null refuses such files (`unsupported_shape`)."""


class ClaheConfig(Section):
    """Contrast-limited adaptive histogram equalisation (OpenCV; Zuiderveld, Graphics Gems IV)."""

    clip_limit: Annotated[float, Field(gt=0)] = 2.0
    """Contrast limit in OpenCV's scale."""
    tiles: Positive = 8
    """Tiles along each side."""


class PreprocessConfig(Section):
    """From stored values to the model's input. Travels in the bundle; hashed into `preprocess_id`."""

    size: tuple[Positive, Positive] = (224, 224)
    """Rows and columns of the model's input in pixels; each a multiple of 32."""
    color: Literal["grey", "rgb"] = "grey"
    """`grey` takes Rec. 601 luma of colour images; `rgb` repeats grey images over three channels."""
    slices: Literal[1, 3, 5] = 1
    """Slices that the model sees at once as channels, the one that is scored in the middle (2.5D); edges repeat. Needs `color: grey`."""
    ct_window_hu: tuple[float, Annotated[float, Field(gt=0)]] | None = (40.0, 400.0)
    """Centre and width in HU for CT; null uses the file's own window, as for other modalities."""
    use_file_window: bool = True
    """Use the file's VOI LUT or window where it has one; else robust percentiles."""
    percentiles: tuple[Annotated[float, Field(ge=0, lt=50)], Annotated[float, Field(gt=50, le=100)]] = (0.5, 99.5)
    """Percentiles of the non-padding pixels of an object that become black and white where no window applies."""
    denoise: Literal["none", "median", "tv"] = "none"
    """`median` 3x3 (OpenCV) or `tv` total variation (scikit-image, Chambolle 2004), before resizing."""
    clahe: ClaheConfig | None = None
    """Equalise locally after the window and before resizing."""
    resize: Literal["pad", "stretch"] = "pad"
    """`pad` keeps the aspect and pads with black; `stretch` does not."""
    interpolation: Literal["area", "linear"] = "area"
    """`area` averages when shrinking (and is linear when enlarging)."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels in [0, 1]; one value, or one a channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Divides after `mean` is subtracted; as many values as `mean`."""

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessConfig:
        if any(side % 32 for side in self.size):
            raise ValueError("`size` must be multiples of 32 (the encoder halves five times)")
        if self.slices > 1 and self.color == "rgb":
            raise ValueError("`slices` above 1 takes the channels for neighbouring slices and needs `color: grey`")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, self.channels):
            raise ValueError(
                f"`mean` and `std` must have the same length, 1 or {self.channels} with color={self.color} "
                f"and slices={self.slices}"
            )
        return self

    @property
    def channels(self) -> int:
        """Channels of the prepared input: 3 for rgb, for grey as many as `slices`."""
        return 3 if self.color == "rgb" else self.slices


HeaderField = Literal[
    "manufacturer",
    "manufacturer_model",
    "software",
    "body_part",
    "laterality",
    "view",
    "presentation_intent",
    "patient_sex",
    "patient_age_band",
    "kvp",
    "slice_thickness_mm",
]
HEADER_FIELDS: tuple[HeaderField, ...] = get_args(HeaderField)
"""Header fields that may enter the tables, beside modality and spacing: the whole allow list."""


class PrivacyConfig(Section):
    """Keyed pseudonyms (HMAC-SHA256 under the site's secret), and what of a header may enter the tables (docs/privacy.md)."""

    key_env: str = "MEDVISION_PSEUDONYM_KEY"
    """Environment variable that holds the key: at least 32 random characters."""
    key_file: str | None = None
    """Local file that holds the key; wins over `key_env`."""
    demo_key: bool = False
    """Use the published demo key. Only for images of nobody."""
    header_fields: tuple[HeaderField, ...] = HEADER_FIELDS
    """Header fields that become columns; the others stay null. A small site leaves the first three, its devices, out."""
    study_date: Literal["omit", "year", "shift"] = "omit"
    """`omit`; `year`: 1 January of its year; `shift`: 1 to 365 days earlier, keyed, the same for all dates of a patient."""
    uri: Literal["keep", "hash"] = "keep"
    """`hash`: addresses become keyed pseudonyms in tables and evaluations, for archives whose object keys hold names."""


class RayConfig(Section):
    """Where Ray runs."""

    address: str | None = None
    """A running cluster (`auto`, `host:port`); null uses RAY_ADDRESS where set (as under `ray job submit`), else starts one here."""
    num_cpus: Positive | None = None
    """CPUs of the Ray that is started here; null takes all. Not allowed with `address`."""
    object_store_bytes: Positive | None = None
    """Object store of the Ray that is started here; null lets Ray choose (30 % of memory)."""

    @model_validator(mode="after")
    def _consistent(self) -> RayConfig:
        if self.address and (self.num_cpus or self.object_store_bytes):
            raise ValueError(
                "`num_cpus` and `object_store_bytes` belong to a Ray started here and can't go with `address`"
            )
        return self


class DriftConfig(Section):
    """How a scored run is held against the images that its model was trained on (docs/metrics.md)."""

    min_images: Positive = 50
    """Runs of fewer scored images are not judged: chance alone would shift them."""
    max_psi: Annotated[float, Field(gt=0)] | None = None
    """Largest PSI of any feature; above it the run ends over budget (exit code 3). Null: shifts are told, and nothing else."""


class LabelsConfig(Section):
    """The label table and how its patients are split."""

    table: str
    """CSV or Parquet with `image` and any of `label`, one column per finding, `mask`, `patient_id`, `split`."""
    root: str | None = None
    """Folder or prefix that relative `image` and `mask` paths start from; null is the table's own folder."""
    label_column: str = "label"
    """Column of the class name (single-label)."""
    findings: tuple[str, ...] = ()
    """Columns of 0, 1 or blank, one per finding (multi-label); excludes `label_column`."""
    classes: tuple[str, ...] = ()
    """Class order; empty takes the sorted names of the table."""
    patient_column: str = "patient_id"
    """Column that groups images of one patient; splits never divide a patient."""
    split_column: str = "split"
    """Column of `train`, `val`, `test`; missing splits are made by patient from `fractions` and `seed`."""
    fractions: tuple[Fraction, Fraction, Fraction] = (0.7, 0.15, 0.15)
    """Shares of train, val and test by patient, where the table does not say; they sum to 1."""
    seed: Seed = 0
    """Seed of the split."""
    near_duplicates: Literal["warn", "refuse", "off"] = "warn"
    """What training does about images of different splits that look nearly the same (docs/training.md)."""
    acquisition_columns: tuple[str, ...] = ()
    """Columns that say where and how an image was made, such as the site: the shortcut probe tries to tell the label from them."""

    @model_validator(mode="after")
    def _consistent(self) -> LabelsConfig:
        if not math.isclose(sum(self.fractions), 1.0, abs_tol=1e-6):
            raise ValueError(f"`fractions` must sum to 1, but they sum to {sum(self.fractions):g}")
        return self
