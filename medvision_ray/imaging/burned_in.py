"""Whether letters may be burned into the pixels: what the header says, and what kind of picture it is."""

from __future__ import annotations

from pydicom.dataset import Dataset

from medvision_ray.imaging.dicom_header import element, text

_MODALITIES = frozenset(("US", "IVUS", "BDUS", "XC", "ES", "GM", "OT", "SC", "DG", "DMS", "DOC", "RG"))
"""Ultrasound, photographs and endoscopy, other, secondary capture, scanned film and paper."""
_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture, its multi-frame kinds
    "1.2.840.10008.5.1.4.1.1.3.1",  # ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.3",  # the same, retired
    "1.2.840.10008.5.1.4.1.1.6",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.77.1",  # visible light
)


def may_contain_text(dataset: Dataset, modality: str, sop_class: str, *, colour: bool) -> bool:
    """Whether viewers and exports should take the picture for one with text in it.

    BurnedInAnnotation (0028,0301) of YES says so (DICOM PS3.3 C.7.6.1). Its NO does not acquit a suspect kind, and its absence
    says nothing (93 % of real objects lack it). Suspect are ultrasound, photographs, scans, captures and
    other, an ImageType of SECONDARY or of a screen, a ConversionType, a missing SOP class, and colour of a
    modality that measures grey.
    """
    kinds = _values(dataset, "ImageType")
    return (
        text(dataset, "BurnedInAnnotation").upper() not in ("", "NO")
        or modality in _MODALITIES
        or not sop_class
        or any(sop_class == known or sop_class.startswith(f"{known}.") for known in _SOP_CLASSES)
        or any("SECONDARY" in kind or "SCREEN" in kind for kind in kinds)
        or bool(text(dataset, "ConversionType"))
        or colour
    )


def _values(dataset: Dataset, keyword: str) -> list[str]:
    value = element(dataset, keyword)
    if value is None:
        return []
    return [str(part).upper() for part in ([value] if isinstance(value, str) else value)]
