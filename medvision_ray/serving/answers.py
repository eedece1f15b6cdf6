"""What the API answers, each field with its unit and range."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0.0)]
Point = Annotated[list[float], Field(min_length=2, max_length=2)]


class AnswerPart(BaseModel):
    """Base of all answers: frozen, documented."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ImageFacts(AnswerPart):
    """What was sent, as it was decoded."""

    height: Count
    """Rows of a frame, in pixels."""
    width: Count
    """Columns of a frame, in pixels."""
    frames: Count
    """Frames, or slices of a volume."""
    modality: str
    """DICOM modality code (`CT`, `MR`, `DX`, ...); `OT` where the format names none."""
    spacing_mm: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    """Distance between rows and between columns in mm, over 0; null where the object names none."""
    spacing_source: str
    """Where the spacing comes from, and by that whether it holds in the patient: `pixel_spacing`, `calibrated`, `affine` do;
    `unverified`, `imager`, `nominal_scanned`, `none` do not."""
    format: Literal["dicom", "nifti", "png", "jpeg", "tiff", "bmp"]
    """The format, told by content."""


class OperatingPoint(AnswerPart):
    """A threshold with a name, and what it decides here."""

    name: str
    """Name that the bundle gives it; `default` is what `predicted_label` of a multi-label model goes by."""
    threshold: Probability
    """Positive from this raw `probability` on, in [0, 1]."""
    positive: bool
    """Whether the probability reaches the threshold."""


class ClassResult(AnswerPart):
    """What the model says of one class."""

    name: str
    """The class's name in the bundle."""
    probability: Probability
    """Probability by the network, in [0, 1]; of several frames their mean. Classes sum to 1 unless the model is multi-label."""
    calibrated_probability: Probability | None
    """Probability after the bundle's calibration, in [0, 1]; null where the bundle has none."""
    operating_points: list[OperatingPoint]
    """Thresholds of the bundle for this class; empty where it has none."""


class RunLengths(AnswerPart):
    """A mask as COCO's uncompressed run lengths, column by column."""

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    """Rows and columns."""
    counts: list[Count]
    """Lengths of runs in column-major order: pixels outside, inside, outside, ...; they sum to rows times columns."""


class MaskFacts(AnswerPart):
    """The lesion mask on the source's own pixel grid."""

    fraction: Probability
    """Share of the frame that the mask covers, in [0, 1]."""
    area_mm2: Annotated[float, Field(ge=0.0)] | None
    """Area in mm2; null where the spacing does not hold in the patient."""
    pixels: Count
    """Pixels in the mask."""
    box: Annotated[list[int], Field(min_length=4, max_length=4)] | None
    """Bounding box `[top, left, bottom, right]` in pixels, bottom and right exclusive; null for an empty mask."""
    contours: list[list[Point]]
    """Corners `[row, column]` of closed outlines along the edges of pixels, (0, 0) being the centre of the first one; parts
    turn clockwise, holes the other way."""
    rle: RunLengths | None = None
    """The mask as run lengths, with `mask=rle`."""
    png: str | None = None
    """The mask as PNG of 0 and 255 in base64, with `mask=png`."""


class FrameAnswer(AnswerPart):
    """What the model says of one frame."""

    frame: Count
    """Number of the frame, from 0."""
    predicted_label: str | None
    """As in the whole answer."""
    predicted_probability: Probability | None
    """Probability of the label, in [0, 1]."""
    classes: list[ClassResult]
    """Every class."""
    mask: MaskFacts | None
    """The frame's mask."""


class Explanation(AnswerPart):
    """Where the network looked."""

    kind: Literal["gradcam"]
    """The method."""
    class_name: str = Field(serialization_alias="class")
    """The class that is explained."""
    png: str
    """Grey PNG in base64 on the source's grid: 0 is none, 255 the most."""


class Timing(AnswerPart):
    """Where the time went, in milliseconds."""

    decode_ms: Milliseconds
    """Decoding."""
    preprocess_ms: Milliseconds
    """From stored values to the model's input."""
    predict_ms: Milliseconds
    """This request's share of its batch in the network, and the masks."""
    total_ms: Milliseconds
    """From the whole body to the answer, waiting included."""


class Answer(AnswerPart):
    """A prediction. Not a diagnosis: this is no medical device."""

    request_id: str
    """32 hexadecimal digits that the server's log has too."""
    model_id: str
    """Name and content hash of the model, as in the predictions table."""
    preprocess_id: str
    """12 hexadecimal digits that name the preprocessing."""
    image: ImageFacts
    """What was sent."""
    predicted_label: str | None
    """The likeliest class; of a multi-label model every finding over its threshold joined by `|`; null without classes."""
    predicted_probability: Probability | None
    """Its probability (multi-label: the highest of all findings), in [0, 1]."""
    classes: list[ClassResult]
    """Every class, in the bundle's order; empty for a model without a classification head."""
    key_frame: Count
    """The frame with the largest mask, from 0; `mask` is this frame's."""
    mask: MaskFacts | None
    """The key frame's mask; null for a model without a segmentation decoder."""
    frames: list[FrameAnswer]
    """Every frame, of an object with more than one; else empty."""
    explanation: Explanation | None
    """With `explain`; else null."""
    timing: Timing
    """Where the time went."""


class ModelFacts(AnswerPart):
    """A model that is served."""

    id: str
    """Name and content hash, as in the predictions table; a new version has another."""
    name: str
    """Given name; `model=NAME` is its version of the day."""
    default: bool
    """Whether it answers where a request names no model."""
    loaded: bool
    """Whether the replica that answers has it in memory."""
    classes: list[str]
    """Names in the order of answers."""
    multi_label: bool
    """Whether classes may occur together."""
    segmentation: bool
    """Whether it draws masks."""
    mask_threshold: Probability
    """A pixel is in the mask from this probability on."""
    input_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    """Rows and columns of the model's input in pixels."""
    preprocess_id: str
    """12 hexadecimal digits that name the preprocessing."""
    calibrated: bool
    """Whether answers have calibrated probabilities."""


class ModelList(AnswerPart):
    """The models that are served."""

    models: list[ModelFacts]
    """The first one is the default."""


class State(AnswerPart):
    """Whether the server is well."""

    status: Literal["ok", "starting"]
    """`ok`, or what it waits for."""
