"""What of a header may enter tables: codes from closed lists, plausible numbers, bands; never free text."""

from __future__ import annotations

from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import ImplicitVRLittleEndian

from medvision_ray.config import HEADER_FIELDS, DecodeConfig, PrivacyConfig
from medvision_ray.demo import encode
from medvision_ray.demo.encode import Subject
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.header_fields import HeaderFields, age_band
from medvision_ray.privacy import Pseudonymiser

SUBJECT = Subject("DOE^JANE", "MRN-7731", "ACC-9", 1, 0)
PICTURE = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
CT = encode.ct_dicom(SUBJECT, 0, PICTURE, signed=True, compressed=False)


def keys(**policy: Any) -> Pseudonymiser:
    return Pseudonymiser(b"k" * 32, PrivacyConfig.model_validate(policy))


def changed(data: bytes = CT, syntax: str | None = None, **elements: Any) -> bytes:
    """The object with elements set, as any value of any form, or removed (None)."""
    dataset = dcmread(BytesIO(data))
    for keyword, value in elements.items():
        if value is None:
            if keyword in dataset:
                del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    sink = BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def fields(data: bytes, **policy: Any) -> HeaderFields:
    return decode(data, DecodeConfig(), keys(**policy)).header


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
def test_the_allow_list_is_read_in_every_encoding(syntax: str | None) -> None:
    data = changed(
        syntax=syntax,
        Manufacturer="SIEMENS",
        ManufacturerModelName="SOMATOM Definition AS+",
        SoftwareVersions=["syngo CT VA48A", "SOMARIS/7"],
        BodyPartExamined="CHEST",
        ImageLaterality="R",
        ViewPosition="AP",
        PatientSex="F",
        PatientAge="047Y",
        KVP="120",
        SliceThickness="1.25",
        StudyDate="20240517",
    )
    assert fields(data, study_date="year") == HeaderFields(
        manufacturer="SIEMENS",
        manufacturer_model="SOMATOM Definition AS+",
        software="syngo CT VA48A",
        body_part="CHEST",
        laterality="R",
        view="AP",
        patient_sex="F",
        patient_age_band="40-49",
        kvp=120.0,
        slice_thickness_mm=1.25,
        study_date="2024-01-01",
        may_contain_text=False,
    )


def test_without_a_pseudonymiser_nothing_of_the_header_is_told() -> None:
    assert decode(CT, DecodeConfig()).header == HeaderFields(may_contain_text=False)


def test_a_site_leaves_fields_out() -> None:
    kept = tuple(name for name in HEADER_FIELDS if name not in ("manufacturer", "manufacturer_model", "software"))
    found = fields(changed(PatientAge="047Y"), header_fields=kept)
    assert (found.manufacturer, found.manufacturer_model, found.software) == (None, None, None)
    assert (found.body_part, found.patient_age_band, found.kvp) == ("CHEST", "40-49", 120.0)
    nothing = fields(CT, header_fields=())
    assert [getattr(nothing, name) for name in HEADER_FIELDS] == [None] * len(HEADER_FIELDS)


@pytest.mark.parametrize(
    ("years", "band"),
    [
        (0, "00-09"),
        (9.99, "00-09"),
        (10, "10-19"),
        (89, "80-89"),
        (89.99, "80-89"),
        (90, "90+"),
        (104, "90+"),
        (131, None),
    ],
)
def test_ages_are_bands_and_over_89_one_band(years: float, band: str | None) -> None:
    assert age_band(years) == band


@pytest.mark.parametrize(
    ("stated", "born", "band"),
    [
        ("095Y", None, "90+"),
        ("018M", None, "00-09"),
        ("130D", None, "00-09"),
        ("", "19300518", "90+"),  # 93 years old on 2024-05-17, and 94 a day later
        (None, "20140518", "00-09"),
        (None, "20140517", "10-19"),
        ("47", "19700101", "50-59"),  # no age string
        ("", "JANE DOE", None),
        ("", "20250101", None),  # born after the study
        ("999Y", None, None),
    ],
)
def test_the_band_comes_from_the_age_or_from_two_dates(stated: str | None, born: str | None, band: str | None) -> None:
    assert fields(changed(PatientAge=stated, PatientBirthDate=born, StudyDate="20240517")).patient_age_band == band


@pytest.mark.parametrize("keyword", ["BodyPartExamined", "ViewPosition", "ImageLaterality", "Laterality", "PatientSex"])
@pytest.mark.parametrize("value", ["DOE JANE", "JANE", "M. DOE", "0012345678", "CHEST DOE", "RL"])
def test_a_code_that_is_on_no_list_is_left_out(keyword: str, value: str) -> None:
    found = fields(changed(**{keyword: value}))
    name = {"BodyPartExamined": "body_part", "ViewPosition": "view", "PatientSex": "patient_sex"}.get(
        keyword, "laterality"
    )
    assert getattr(found, name) == ("RL" if (keyword, value) == ("ViewPosition", "RL") else None)


@pytest.mark.parametrize("value", ["DOEJANE", "JANE", "MRN7731", "CT1"])
def test_a_name_in_the_modality_is_no_modality(value: str) -> None:
    assert decode(changed(Modality=value), DecodeConfig(), keys()).modality == "OT"


@pytest.mark.parametrize(
    "value",
    [
        "DOE^JANE",
        "Doe, Jane",
        "jane.doe@example.org",
        "Jane",
        "device of doe",
        "MRN-7731",
        "4711 19700101",
        "a\nb",
        "x" * 60,
        "é",
    ],
)
@pytest.mark.parametrize("keyword", ["Manufacturer", "ManufacturerModelName", "SoftwareVersions"])
def test_device_text_that_looks_like_or_shares_a_word_with_a_person_is_left_out(keyword: str, value: str) -> None:
    found = fields(changed(**{keyword: value}, SpecificCharacterSet="ISO_IR 192"))
    name = {"Manufacturer": "manufacturer", "ManufacturerModelName": "manufacturer_model"}.get(keyword, "software")
    assert getattr(found, name) is None


def test_a_company_keeps_its_name_with_a_comma() -> None:
    assert fields(changed(Manufacturer="Philips Medical Systems, Inc.")).manufacturer == "Philips Medical Systems Inc."


@pytest.mark.parametrize("value", ["0", "-5", "1234567890", "1e30", "JANE", "NaN", "120\\DOE"])
def test_numbers_out_of_range_are_left_out(value: str) -> None:
    raw = CT.replace(
        b"\x18\x00\x60\x00DS\x04\x00120 ", b"\x18\x00\x60\x00DS" + len(pad(value)).to_bytes(2, "little") + pad(value)
    )
    assert raw != CT
    assert fields(raw).kvp == (120.0 if value.startswith("120") else None)


def pad(value: str) -> bytes:
    return value.encode() + b" " * (len(value) % 2)


def test_no_long_number_gets_through_in_decimals() -> None:
    assert fields(changed(KVP="44.1234567", SliceThickness="1.98765432")) == fields(
        changed(KVP="44.123", SliceThickness="1.988")
    )


def test_slice_thickness_comes_from_the_functional_groups_too() -> None:
    data = encode.multiframe_dicom(SUBJECT, 1, np.stack([PICTURE, PICTURE]))
    dataset = dcmread(BytesIO(data))
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = "3"
    sink = BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    assert fields(sink.getvalue()).slice_thickness_mm == 3.0


def test_study_dates_are_omitted_truncated_or_shifted() -> None:
    data = changed(StudyDate="20240517")
    assert fields(data).study_date is None
    assert fields(data, study_date="year").study_date == "2024-01-01"
    shifted = fields(data, study_date="shift").study_date
    expected = keys(study_date="shift").study_date(date(2024, 5, 17), SUBJECT.patient_id)
    assert expected is not None
    assert shifted == expected.isoformat()
    for value in ("DOE", "20241399", "2024.05.17", ""):
        assert fields(changed(StudyDate=value), study_date="year").study_date is None


def suspect(**elements: Any) -> bool:
    return decode(changed(**elements), DecodeConfig()).header.may_contain_text


def test_burned_in_text_is_suspected_by_what_the_header_says_and_by_the_kind_of_picture() -> None:
    assert not suspect()
    assert not suspect(BurnedInAnnotation="NO")
    assert suspect(BurnedInAnnotation="YES")
    assert suspect(Modality="US")
    assert suspect(Modality="US", BurnedInAnnotation="NO")  # a device's NO is often wrong for these
    assert suspect(Modality="XC")
    assert suspect(Modality="OT")
    assert suspect(Modality=None)
    assert suspect(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    assert suspect(SOPClassUID="1.2.840.10008.5.1.4.1.1.7.4")
    assert suspect(SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.4")
    assert suspect(SOPClassUID=None)
    assert suspect(ImageType=["DERIVED", "SECONDARY"])
    assert suspect(ImageType=["DERIVED", "PRIMARY", "SCREEN SAVE"])
    assert suspect(ConversionType="SD")
    # The classes whose numbers only begin alike are not meant.
    assert not suspect(SOPClassUID="1.2.840.10008.5.1.4.1.1.6777")


def test_colour_of_a_grey_modality_is_suspect() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    assert suspect(
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        Rows=8,
        Columns=8,
        PixelData=picture.tobytes(),
    )


def test_pictures_without_a_header_are_suspect_and_grey_volumes_are_not() -> None:
    assert decode(encode.png(PICTURE), DecodeConfig()).header.may_contain_text
    assert not decode(encode.nifti(SUBJECT, np.stack([PICTURE] * 2)), DecodeConfig()).header.may_contain_text


def test_real_headers_give_values_of_the_lists_only(corpora_dir: Path) -> None:
    seen: dict[str, set[Any]] = {}
    for path in sorted((corpora_dir / "dicom-test-files").rglob("*"))[:80]:
        if path.is_file():
            try:
                header = fields(path.read_bytes())
            except DecodeError:
                continue
            for name, value in vars(header).items():
                seen.setdefault(name, set()).add(value)
    assert {"GE MEDICAL SYSTEMS", "SIEMENS"} <= seen["manufacturer"]
    assert seen["patient_sex"] <= {"M", "F", "O", None}
    assert seen["may_contain_text"] == {True, False}


def test_a_damaged_header_gives_nulls_and_no_error() -> None:
    raw = CT.replace(b"\x10\x00\x40\x00CS\x02\x00O ", b"\x10\x00\x40\x00CS\x02\x00\xff\xfe")
    assert raw != CT
    assert fields(raw).patient_sex is None
