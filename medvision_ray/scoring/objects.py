"""One object's way from its address to prepared frames, or to the reason why not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.config import DecodeConfig, PreprocessConfig
from medvision_ray.errors import StorageError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.geometry import SpacingSource
from medvision_ray.imaging.grid import GridTransform
from medvision_ray.imaging.header_fields import HeaderFields
from medvision_ray.imaging.image import SubjectKeys
from medvision_ray.imaging.preprocess import prepare, reducible_to
from medvision_ray.imaging.volume import decode_series
from medvision_ray.privacy import Pseudonymiser

_MEMBER_THREADS = 4  # of each thread that reads ahead


@dataclass
class Effort:
    """What one object cost: seconds of each stage in the thread that did it, and bytes read."""

    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    predict_seconds: float = 0.0
    bytes_read: int = 0

    @contextmanager
    def timing(self, stage: Literal["read", "decode", "preprocess"]) -> Iterator[None]:
        """Count the block's seconds, also those of one that fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = f"{stage}_seconds"
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class PreparedObject:
    """An object that is ready for the model.

    Attributes:
        pixels: shape `(frames, C, H, W)`.
        transform: the way of masks back to the source's grid.
        modality: DICOM modality code.
        spacing_mm: row and column spacing, or None.
        spacing_source: where that comes from, and by that whether areas may be computed with it.
        keys: keyed pseudonyms.
        header: what else of the header may enter tables.
    """

    pixels: NDArray[np.uint8]
    transform: GridTransform
    modality: str
    spacing_mm: tuple[float, float] | None
    spacing_source: SpacingSource
    keys: SubjectKeys
    header: HeaderFields = field(default_factory=HeaderFields)

    def facts(self) -> dict[str, Any]:
        """All but the pixels, as JSON can hold it; `from_facts` is the way back."""
        return {
            "shape": list(self.pixels.shape),
            "transform": asdict(self.transform),
            "modality": self.modality,
            "spacing_mm": self.spacing_mm,
            "spacing_source": self.spacing_source.value,
            "keys": asdict(self.keys),
            "header": asdict(self.header),
        }

    @staticmethod
    def from_facts(facts: dict[str, Any], pixels: bytes | memoryview) -> PreparedObject:
        """The object whose `facts` and raw pixels these are; the pixels are not copied."""
        grid: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["transform"].items()}
        spacing = facts["spacing_mm"]
        return PreparedObject(
            np.frombuffer(pixels, np.uint8).reshape(facts["shape"]),
            GridTransform(**grid),
            facts["modality"],
            (spacing[0], spacing[1]) if spacing else None,
            SpacingSource(facts["spacing_source"]),
            SubjectKeys(**facts["keys"]),
            HeaderFields(**facts["header"]),
        )


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

    def read(self, uri: str, etag: str, effort: Effort) -> bytes:
        """Read the listed version.

        Raises:
            DecodeError: with stage READ.
            StorageError: code `credentials`: no object of the run can be read.
        """
        try:
            with effort.timing("read"):
                data = storage.read_bytes(uri, max_bytes=self.decode.max_bytes, etag=etag or None)
            effort.bytes_read = len(data)
            return data
        except StorageError as error:
            if error.code == "credentials":
                raise
            known = {code.value for code in ErrorCode}
            code = ErrorCode(error.code) if error.code in known else ErrorCode.READ_ERROR
            raise DecodeError(code, Stage.READ) from None

    def read_entry(self, entry: dict[str, Any], effort: Effort) -> bytes | list[bytes]:
        """Read what an inventory row stands for: an object, or the members of a series at once.

        Raises:
            DecodeError: with stage READ; of a member its reason, with its number.
            StorageError: as `read`.
        """
        members = entry.get("members")
        if not members:
            return self.read(entry["uri"], entry["etag"], effort)
        if entry["size"] > self.decode.max_decoded_bytes:
            raise DecodeError(ErrorCode.TOO_LARGE, Stage.READ, bytes=entry["size"], limit=self.decode.max_decoded_bytes)
        with effort.timing("read"), ThreadPoolExecutor(_MEMBER_THREADS, thread_name_prefix="slices") as pool:
            parts = list(pool.map(self._read_member, range(len(members)), members))
        effort.bytes_read = sum(len(part) for part in parts)
        return parts

    def _read_member(self, number: int, member: dict[str, Any]) -> bytes:
        try:
            return self.read(member["uri"], member["etag"], Effort())
        except DecodeError as error:
            raise DecodeError(error.code, error.stage, **{**error.facts, "slice": number}) from None

    def prepare(self, data: bytes | list[bytes], effort: Effort) -> PreparedObject:
        """Decode and prepare an object, or the members of a series as a volume.

        Raises:
            DecodeError: the object cannot become a model input.
        """
        with effort.timing("decode"):
            if isinstance(data, list):
                image = decode_series(data, self.decode, self.pseudonymiser)
            else:
                reduced_to = reducible_to(self.preprocess) if self.decode.reduced else None
                image = decode(data, self.decode, self.pseudonymiser, reduced_to)
        with effort.timing("preprocess"):
            ready = prepare(image, self.preprocess)
        return PreparedObject(
            ready.pixels,
            ready.transform,
            image.modality,
            image.spacing_mm,
            image.spacing_source,
            image.keys,
            image.header,
        )
