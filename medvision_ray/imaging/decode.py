"""Bytes to a MedicalImage: sniff by content, guard, dispatch; the only thing raised is DecodeError."""

from __future__ import annotations

from collections.abc import Callable

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.dicom import decode_dicom, looks_like_dicom
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.nifti import decode_nifti, looks_like_nifti
from medvision_ray.imaging.raster import decode_raster, raster_format
from medvision_ray.privacy import Pseudonymiser


def decode(
    data: bytes,
    config: DecodeConfig,
    pseudonymiser: Pseudonymiser | None = None,
    model_size: tuple[int, int] | None = None,
) -> MedicalImage:
    """Decode one object to stored values.

    The format is told by content, never by name: DICOM (with or without preamble), NIfTI-1 and -2
    (plain or gzip), PNG, JPEG, TIFF, BMP.

    Args:
        data: the whole object.
        config: limits that hold before memory is allocated.
        pseudonymiser: makes the keys of patient, study and series; None leaves them out.
        model_size: rows and columns of the model's input, where a lower resolution that is enough for it may
            stand for the whole image (`reduced.halvings`); None decodes all pixels.

    Raises:
        DecodeError: the only error this raises. Its text holds none of the object's content.
    """
    try:
        return _decoder(data, config, pseudonymiser, model_size)()
    except (DecodeError, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        code = ErrorCode.OUT_OF_MEMORY
    except BaseException:  # pylibjpeg-rle's PanicException is no Exception; any text may hold a name
        code = ErrorCode.CORRUPT
    raise DecodeError(code)


def _decoder(
    data: bytes, config: DecodeConfig, pseudonymiser: Pseudonymiser | None, model_size: tuple[int, int] | None
) -> Callable[[], MedicalImage]:
    if not data:
        raise DecodeError(ErrorCode.EMPTY_FILE)
    if len(data) > config.max_bytes:
        raise DecodeError(ErrorCode.TOO_LARGE, bytes=len(data), limit=config.max_bytes)
    if data[128:132] == b"DICM":
        return lambda: decode_dicom(data, config, pseudonymiser, model_size)
    kind = raster_format(data)
    if kind:
        return lambda: decode_raster(data, kind, config, model_size)
    if looks_like_nifti(data):
        return lambda: decode_nifti(data, config)
    if looks_like_dicom(data):
        return lambda: decode_dicom(data, config, pseudonymiser, model_size)
    raise DecodeError(ErrorCode.UNSUPPORTED_FORMAT)
