"""The header fields of an object that may enter tables: a closed list, each value checked, free text never.

Codes pass only where they are on the standard's list of defined terms, because a field of code strings
takes a name as well as a code. The three fields that a device writes of itself have no such list: they
pass a narrow pattern, and not where they share a word with the patient's or the staff's own fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from medvision_ray.imaging.dicom_header import items, text
from medvision_ray.imaging.header_terms import BODY_PARTS, LATERALITIES, PRESENTATION_INTENTS, SEXES, VIEWS
from medvision_ray.privacy import Pseudonymiser

# A name of a device or a version: no `^` and no `,` as in names of people, no `@`, no line break.
_DEVICE_TEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+/()-]{0,47}")
_COMPANY_COMMA = re.compile(r",(?=\s*(?:inc|ltd|llc|corp)\b)", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"\d{8}")  # may be a patient's number or a date of birth
_WORD = re.compile(r"[^\W_]{3,}")
_IDENTIFYING_KEYWORDS = (
    "PatientName PatientID OtherPatientIDs OtherPatientNames AccessionNumber ReferringPhysicianName "
    "PerformingPhysicianName OperatorsName InstitutionName"
)
_IDENTIFYING = _IDENTIFYING_KEYWORDS.split()
_AGE = re.compile(r"(\d{3})([DWMY])")
_DAYS_A_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}
_TOP_BAND_YEARS = 90  # 45 CFR 164.514(b)(2)(i)(C): ages over 89 are one category
_OLDEST_YEARS = 130
_KVP = (1.0, 1000.0)
_THICKNESS_MM = (0.001, 1000.0)

_READ_KEYWORDS = (
    "Manufacturer ManufacturerModelName SoftwareVersions BodyPartExamined ImageLaterality Laterality ViewPosition "
    "PresentationIntentType PatientSex PatientAge PatientBirthDate StudyDate KVP SliceThickness"
)
FIELD_KEYWORDS = (*_READ_KEYWORDS.split(), *_IDENTIFYING)
"""What has to be parsed for `read_header_fields`; none of it is kept but the fields themselves."""


@dataclass(frozen=True)
class HeaderFields:
    """What a header says of an image beside its pixels, in the tables' form; None where it says nothing usable.

    Attributes:
        patient_age_band: ten years such as `40-49`; `90+` from 90 on.
        kvp: tube voltage in kV.
        study_date: as `privacy.study_date` wants it, in ISO form.
        may_contain_text: letters may be burned into the pixels; False only where nothing speaks for it.
    """

    manufacturer: str | None = None
    manufacturer_model: str | None = None
    software: str | None = None
    body_part: str | None = None
    laterality: str | None = None
    view: str | None = None
    presentation_intent: str | None = None
    patient_sex: str | None = None
    patient_age_band: str | None = None
    kvp: float | None = None
    slice_thickness_mm: float | None = None
    study_date: str | None = None
    may_contain_text: bool = True


def read_header_fields(
    dataset: Dataset, pseudonymiser: Pseudonymiser | None, *, may_contain_text: bool
) -> HeaderFields:
    """The fields that the site's policy lets through; without a pseudonymiser none."""
    if pseudonymiser is None:
        return HeaderFields(may_contain_text=may_contain_text)
    wanted = pseudonymiser.policy.header_fields
    found: dict[str, Any] = {name: _READERS[name](dataset) for name in wanted if name in _READERS}
    devices = [name for name in wanted if name in _DEVICE_KEYWORDS]
    if devices:
        known = {word for name in _IDENTIFYING for word in _words(_plain(dataset, name))}
        found.update({name: _device_text(_first(dataset, _DEVICE_KEYWORDS[name]), known) for name in devices})
    return HeaderFields(**found, study_date=_study_date(dataset, pseudonymiser), may_contain_text=may_contain_text)


def age_band(years: float) -> str | None:
    """Ten years of age, `00-09` to `80-89`, then `90+`; None for what nobody reaches.

    Examples:
        >>> [age_band(years) for years in (0.1, 89.9, 90, 117)]
        ['00-09', '80-89', '90+', '90+']
    """
    if not 0 <= years <= _OLDEST_YEARS:
        return None
    low = int(years) // 10 * 10
    return "90+" if low >= _TOP_BAND_YEARS else f"{low:02d}-{low + 9:02d}"


def _device_text(value: str, known: set[str]) -> str | None:
    """What a device says of itself, if it looks so and shares no word with `known`."""
    value = re.sub(" +", " ", _COMPANY_COMMA.sub(" ", value))
    if not _DEVICE_TEXT.fullmatch(value) or _LONG_NUMBER.search(value):
        return None
    return None if known & _words(value) else value


@lru_cache(maxsize=64)
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def _plain(dataset: Dataset, keyword: str) -> str:
    """An element's bytes, each as one character: what passes here is ASCII, and pydicom's conversion takes ten times as long."""
    tag = _tag(keyword)
    item = dataset.get_item(tag) if tag in dataset else None
    value = item.value if item is not None else None
    return value.decode("latin-1") if isinstance(value, bytes) else str(value or "")


def _first(dataset: Dataset, keyword: str) -> str:
    """The first of an element's values, without blanks around it."""
    return _plain(dataset, keyword).partition("\\")[0].strip(" \0")


def _words(value: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(value)}


def _code(keywords: tuple[str, ...], allowed: frozenset[str]) -> Callable[[Dataset], str | None]:
    def read(dataset: Dataset) -> str | None:
        for keyword in keywords:
            value = re.sub(r"[ _-]", "", _first(dataset, keyword)).upper()
            if value in allowed:
                return value
        return None

    return read


def _presentation_intent(dataset: Dataset) -> str | None:
    value = _first(dataset, "PresentationIntentType").upper()
    return value if value in PRESENTATION_INTENTS else None


def _age(dataset: Dataset) -> str | None:
    """From PatientAge, else from the dates of birth and study (DICOM PS3.3 C.7.2.2)."""
    stated = _AGE.fullmatch(_first(dataset, "PatientAge").upper())
    if stated:
        return age_band(int(stated[1]) / _DAYS_A_YEAR[stated[2]])
    born, studied = (_date(_first(dataset, keyword)) for keyword in ("PatientBirthDate", "StudyDate"))
    if born is None or studied is None:
        return None
    return age_band(studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day)))


def _date(value: str) -> date | None:
    try:
        return date(int(value[:4]), int(value[4:6]), int(value[6:])) if re.fullmatch(r"[0-9]{8}", value) else None
    except ValueError:
        return None


def _study_date(dataset: Dataset, pseudonymiser: Pseudonymiser) -> str | None:
    day = _date(_first(dataset, "StudyDate"))
    if day is None:
        return None
    patient, issuer = (text(dataset, keyword) for keyword in ("PatientID", "IssuerOfPatientID"))
    shown = pseudonymiser.study_date(day, patient, issuer)
    return shown.isoformat() if shown is not None else None


def _numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    try:
        return (float(_first(dataset, keyword)),)
    except ValueError:
        return ()


def _number(values: tuple[float, ...], limits: tuple[float, float]) -> float | None:
    """The first value, where it is plausible; rounded, so that no long number gets through in its decimals."""
    if not values or not math.isfinite(values[0]) or not limits[0] <= values[0] <= limits[1]:
        return None
    return round(values[0], 3)


def _kvp(dataset: Dataset) -> float | None:
    return _number(_numbers(dataset, "KVP"), _KVP)


def _slice_thickness(dataset: Dataset) -> float | None:
    places = [dataset]
    for group in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        places += [found for item in items(dataset, group)[:1] for found in items(item, "PixelMeasuresSequence")[:1]]
    found = (_number(_numbers(place, "SliceThickness"), _THICKNESS_MM) for place in places)
    return next((value for value in found if value is not None), None)


_DEVICE_KEYWORDS = {
    "manufacturer": "Manufacturer",
    "manufacturer_model": "ManufacturerModelName",
    "software": "SoftwareVersions",
}
_READERS: dict[str, Callable[[Dataset], str | float | None]] = {
    "body_part": _code(("BodyPartExamined",), BODY_PARTS),
    "laterality": _code(("ImageLaterality", "Laterality"), LATERALITIES),
    "view": _code(("ViewPosition",), VIEWS),
    "presentation_intent": _presentation_intent,
    "patient_sex": _code(("PatientSex",), SEXES),
    "patient_age_band": _age,
    "kvp": _kvp,
    "slice_thickness_mm": _slice_thickness,
}
