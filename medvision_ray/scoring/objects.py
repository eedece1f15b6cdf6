"""One object's way from its address to prepared frames, or to the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.config import DecodeConfig, PreprocessConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.grid import GridTransform
from medvision_ray.imaging.image import SubjectKeys
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.privacy import Pseudonymiser


@dataclass(frozen=True)
class PreparedObject:
    """An object that is ready for the model.

    Attributes:
        pixels: shape `(frames, C, H, W)`.
        transform: the way of masks back to the source's grid.
        modality: DICOM modality code.
        spacing_mm: row and column spacing, or None.
        keys: keyed pseudonyms.
    """

    pixels: NDArray[np.uint8]
    transform: GridTransform
    modality: str
    spacing_mm: tuple[float, float] | None
    keys: SubjectKeys


@dataclass(frozen=True)
class Failure:
    """Why an object has no prediction; `error` is this package's own sentence."""

    stage: str
    error_code: str
    error: str

    @staticmethod
    def of(error: DecodeError) -> Failure:
        """The failure that an error stands for."""
        return Failure(error.stage.value, error.code.value, str(error))


@dataclass(frozen=True)
class ObjectReader:
    """Everything that is needed to prepare an object; the same for a whole run."""

    decode: DecodeConfig
    preprocess: PreprocessConfig
    pseudonymiser: Pseudonymiser | None

    def read(self, uri: str, etag: str) -> bytes:
        """Read the listed version.

        Raises:
            DecodeError: with stage READ.
        """
        try:
            return storage.read_bytes(uri, max_bytes=self.decode.max_bytes, etag=etag or None)
        except StorageError as error:
            known = {code.value for code in ErrorCode}
            code = ErrorCode(error.code) if error.code in known else ErrorCode.READ_ERROR
            raise DecodeError(code, Stage.READ) from None

    def prepare(self, data: bytes) -> PreparedObject:
        """Decode and prepare.

        Raises:
            DecodeError: the object cannot become a model input.
        """
        image = decode(data, self.decode, self.pseudonymiser)
        ready = prepare(image, self.preprocess)
        return PreparedObject(ready.pixels, ready.transform, image.modality, image.spacing_mm, image.keys)
