"""The closed list of error codes that a failure row carries, and the sentence for each.

A decoder raises `DecodeError(code, **facts)`. The sentence comes from this module; the facts are
harmless numbers or names of a format (bytes, rows, a transfer syntax), never text out of the file
or of another exception, either of which can hold a patient's name.
"""

from __future__ import annotations

import re
from enum import Enum

from medvision_ray.errors import MedVisionError


class Stage(str, Enum):
    """The step of an object's way at which it failed."""

    READ = "read"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    PREDICT = "predict"


class ErrorCode(str, Enum):
    """Why an object has no prediction. Codes are stable: tables and alerts are built on them."""

    EMPTY_FILE = "empty_file"
    TOO_LARGE = "too_large"
    UNSUPPORTED_FORMAT = "unsupported_format"
    NOT_AN_IMAGE = "not_an_image"
    NO_PIXELS = "no_pixels"
    FOR_PROCESSING = "for_processing"
    BAD_HEADER = "bad_header"
    BAD_DIMENSIONS = "bad_dimensions"
    DIMENSION_MISMATCH = "dimension_mismatch"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    UNSUPPORTED_SHAPE = "unsupported_shape"
    MISSING_POSITION = "missing_position"
    DUPLICATE_POSITION = "duplicate_position"
    SLICE_GAP = "slice_gap"
    GANTRY_TILT = "gantry_tilt"
    MIXED_ORIENTATION = "mixed_orientation"
    MIXED_SIZES = "mixed_sizes"
    MIXED_FRAMES_OF_REFERENCE = "mixed_frames_of_reference"
    DECOMPRESSION_BOMB = "decompression_bomb"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    WORKER_CRASH = "worker_crash"
    NOT_FOUND = "not_found"
    CHANGED_WHILE_READING = "changed_while_reading"
    ACCESS_DENIED = "access_denied"
    READ_ERROR = "read_error"
    INTERNAL_ERROR = "internal_error"


SENTENCES: dict[ErrorCode, str] = {
    ErrorCode.EMPTY_FILE: "The object holds no bytes.",
    ErrorCode.TOO_LARGE: "The object or its decoded pixels are over the configured limit.",
    ErrorCode.UNSUPPORTED_FORMAT: "The content is not DICOM, NIfTI, PNG, JPEG, TIFF or BMP.",
    ErrorCode.NOT_AN_IMAGE: "The DICOM object is of a class that holds no image (report, plan, waveform or the like).",
    ErrorCode.NO_PIXELS: "The DICOM object has no pixel data.",
    ErrorCode.FOR_PROCESSING: "The X-ray is raw (FOR PROCESSING), which the configuration refuses.",
    ErrorCode.BAD_HEADER: "A header field that is needed is missing or not usable.",
    ErrorCode.BAD_DIMENSIONS: "The image dimensions in the header are absurd.",
    ErrorCode.DIMENSION_MISMATCH: "The compressed image and the header disagree on dimensions.",
    ErrorCode.TRUNCATED: "The object ends before its pixels do.",
    ErrorCode.CORRUPT: "The object is damaged: its content could not be decoded.",
    ErrorCode.UNSUPPORTED_ENCODING: "The pixel encoding is not supported.",
    ErrorCode.UNSUPPORTED_SHAPE: "The image has more dimensions or other samples than the configuration accepts.",
    ErrorCode.MISSING_POSITION: "A slice of the series has no usable position, orientation or pixel spacing.",
    ErrorCode.DUPLICATE_POSITION: "Several slices of the series lie at the same place.",
    ErrorCode.SLICE_GAP: "The slices of the series are not evenly spaced: some are missing, or the step changes.",
    ErrorCode.GANTRY_TILT: "The slices of the series are shifted sideways against one another, as by a tilted gantry.",
    ErrorCode.MIXED_ORIENTATION: "The slices of the series are not parallel.",
    ErrorCode.MIXED_SIZES: "The slices of the series differ in rows, columns, colour or pixel spacing.",
    ErrorCode.MIXED_FRAMES_OF_REFERENCE: "The slices of the series do not share one frame of reference.",
    ErrorCode.DECOMPRESSION_BOMB: "The object would decompress to more than the configured limit.",
    ErrorCode.OUT_OF_MEMORY: "Decoding needed more memory than the configured limit.",
    ErrorCode.TIMEOUT: "The object took longer than the configured limit.",
    ErrorCode.WORKER_CRASH: "The worker died while it worked on this object, again when it was tried alone.",
    ErrorCode.NOT_FOUND: "The object was gone when it was read.",
    ErrorCode.CHANGED_WHILE_READING: "The object changed between listing and reading.",
    ErrorCode.ACCESS_DENIED: "The store refused access to the object.",
    ErrorCode.READ_ERROR: "The object could not be read.",
    ErrorCode.INTERNAL_ERROR: "A defect in medvision_ray: please report it with the error code and facts.",
}

_SAFE_FACT = re.compile(r"^[A-Za-z0-9_.:+-]{0,64}$")


class DecodeError(MedVisionError):
    """An object cannot become a model input.

    Args:
        code: the closed-list reason.
        stage: the step that failed.
        facts: harmless facts for the sentence, such as `rows=65535` or `limit_bytes=1000`. Values
            are numbers, booleans or short names of this package's own choosing.

    Raises:
        ValueError: a fact is a free text that could carry an identifier.
    """

    def __init__(self, code: ErrorCode, stage: Stage = Stage.DECODE, **facts: int | float | str) -> None:
        for key, value in facts.items():
            if isinstance(value, str) and not _SAFE_FACT.match(value):
                raise ValueError(f"Expected fact `{key}` to be a number or a short plain name, but got other text.")
        self.code = code
        self.stage = stage
        self.facts = facts
        detail = ", ".join(f"{key}={value}" for key, value in facts.items())
        super().__init__(SENTENCES[code] + (f" ({detail})" if detail else ""))
