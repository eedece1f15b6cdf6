"""A mask as a DICOM Segmentation object in its source's geometry (PS3.3 A.51), written by highdicom."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from medvision_ray import __version__
from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.dicom import parse
from medvision_ray.imaging.errors import DecodeError, ErrorCode

_SERIES_NUMBER = 9000


def segmentation(data: bytes, masks: NDArray[np.bool_], model_id: str, limits: DecodeConfig) -> bytes:
    """Write a SEG object: binary, one segment, frames without lesion left out.

    It goes back to where its source came from and names its patient, unlike anything else that this package writes.

    Args:
        data: the source, a DICOM image.
        masks: shape `(frames, rows, columns)` on the source's grid.
        model_id: becomes the algorithm's name.

    Raises:
        DecodeError: BAD_HEADER, the source lacks what a derived object must repeat of it; or as `decode`.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    parse(data, limits)  # refuses what inflates to more than the limit
    source = pydicom.dcmread(BytesIO(data), force=True, stop_before_pixels=True)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model_id, version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lesion",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    try:
        made: Any = hd.seg.Segmentation(
            source_images=[source],
            pixel_array=masks,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=hd.UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medvision_ray",
            manufacturer_model_name=model_id,
            software_versions=__version__,
            device_serial_number=model_id[-12:],
            content_label="LESION",
        )
    except (AttributeError, ValueError, TypeError, KeyError):  # its text can quote a header
        raise DecodeError(ErrorCode.BAD_HEADER, derived="SEG") from None
    out = BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def masks_of(run_lengths: list[list[int]], rows: int, columns: int) -> NDArray[np.bool_]:
    """Masks of `RunLengths.counts`, shape `(frames, rows, columns)`."""
    frames = [np.repeat(np.arange(len(counts)) % 2 == 1, counts) for counts in run_lengths]
    return np.stack([frame.reshape((rows, columns), order="F") for frame in frames])
