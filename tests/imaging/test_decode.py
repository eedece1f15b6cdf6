"""The boundary: what is raised, what leaks, what DICOM objects say of themselves."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging import decode as decode_module
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import VoiFunction, Window
from medvision_ray.privacy import Pseudonymiser

CONFIG = DecodeConfig()
KEYS = Pseudonymiser(b"0123456789abcdef0123456789abcdef")


def ct() -> pydicom.FileDataset:
    return pydicom.dcmread(get_testdata_file("CT_small.dcm"))


def saved(dataset: Dataset) -> bytes:
    out = BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def code_of(data: bytes, config: DecodeConfig = CONFIG) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        decode(data, config)
    return caught.value.code


def test_no_bytes_are_an_empty_file() -> None:
    assert code_of(b"") is ErrorCode.EMPTY_FILE


@pytest.mark.parametrize("data", [b"patient,label\n1,2\n" * 50, b"\x00" * 400, b"PK\x03\x04" + bytes(500), b"a"])
def test_other_content_is_an_unsupported_format(data: bytes) -> None:
    assert code_of(data) is ErrorCode.UNSUPPORTED_FORMAT


def test_an_object_over_the_byte_limit_is_too_large() -> None:
    assert code_of(saved(ct()), DecodeConfig(max_bytes=1000)) is ErrorCode.TOO_LARGE


def test_dicom_without_preamble_is_recognised() -> None:
    image = decode(Path(get_testdata_file("CT_small.dcm")).read_bytes()[132:], CONFIG)
    assert (image.source_format, image.modality, image.pixels.shape) == ("dicom", "CT", (1, 128, 128))


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError("DOE^JANE"), ErrorCode.OUT_OF_MEMORY),
        (RecursionError("DOE^JANE"), ErrorCode.CORRUPT),
        (type("PanicException", (BaseException,), {})("DOE^JANE"), ErrorCode.CORRUPT),
    ],
)
def test_whatever_a_decoder_raises_becomes_a_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: ErrorCode
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(decode_module, "decode_dicom", fail)
    with pytest.raises(DecodeError) as caught:
        decode(saved(ct()), CONFIG)
    assert caught.value.code is code
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_an_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_module, "decode_dicom", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(saved(ct()), CONFIG)


LEAK = """
import sys, logging
logging.basicConfig(level=logging.DEBUG)
from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
try:
    decode(open(sys.argv[1], "rb").read(), DecodeConfig())
except Exception as error:
    import traceback
    traceback.print_exc()
    sys.exit(7)
"""


@pytest.mark.parametrize("keyword", ["Rows", "RescaleSlope", "PixelSpacing", "Modality", "PatientID", "StudyDate"])
def test_no_text_of_the_file_reaches_an_error_a_log_or_a_warning(tmp_path: Path, keyword: str) -> None:
    data = saved(ct())
    element = ct()[keyword]
    planted = b"DOE^JANE" if element.VR not in ("US",) else b"DO"
    group, number = element.tag.group, element.tag.element
    place = data.index(group.to_bytes(2, "little") + number.to_bytes(2, "little"), 132)
    length = int.from_bytes(data[place + 6 : place + 8], "little")
    value = (planted * 8)[:length]
    broken = data[: place + 8] + value + data[place + 8 + length : -9000]
    file = tmp_path / "broken.dcm"
    file.write_bytes(broken)
    done = subprocess.run([sys.executable, "-c", LEAK, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "DOE" not in done.stdout + done.stderr
    assert "JANE" not in done.stdout + done.stderr


def test_keys_are_pseudonyms_of_the_identifiers() -> None:
    dataset = ct()
    dataset.PatientID, dataset.IssuerOfPatientID = " abc ", "site"
    keys = decode(saved(dataset), CONFIG, KEYS).keys
    assert keys.patient_key == KEYS.patient("ABC", "SITE")
    assert keys.study_key == KEYS.study(str(dataset.StudyInstanceUID))
    assert keys.series_key == KEYS.series(str(dataset.SeriesInstanceUID))


def test_a_blank_or_absent_identifier_has_no_key() -> None:
    dataset = ct()
    dataset.PatientID = "  "
    del dataset.StudyInstanceUID
    keys = decode(saved(dataset), CONFIG, KEYS).keys
    assert keys.patient_key is None
    assert keys.study_key is None
    assert decode(saved(ct()), CONFIG).keys.patient_key is None


def test_the_first_window_and_its_function_are_kept() -> None:
    dataset = ct()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = [40, -600], [400, 1500], "SIGMOID"
    assert decode(saved(dataset), CONFIG).display.window == Window(40, 400, VoiFunction.SIGMOID)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "IDENTITY", False),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "INVERSE", True),
    ],
)
def test_inversion_follows_the_shape_and_else_the_photometric(
    photometric: str, shape: str | None, inverted: bool
) -> None:
    dataset = ct()
    dataset.PhotometricInterpretation = photometric
    if shape:
        dataset.PresentationLUTShape = shape
    assert decode(saved(dataset), CONFIG).display.invert is inverted


def test_padding_written_as_unsigned_means_the_signed_value() -> None:
    dataset = ct()
    dataset.add_new("PixelPaddingValue", "US", 63536)
    assert decode(saved(dataset), CONFIG).display.padding == (-2000, -2000)


def test_frames_that_differ_have_a_display_each() -> None:
    dataset = ct()
    dataset.NumberOfFrames = 2
    dataset.PixelData = dataset.PixelData * 2
    groups = []
    for slope in (1, 3):
        transformation, group = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -10
        group.PixelValueTransformationSequence = Sequence([transformation])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    image = decode(saved(dataset), CONFIG)
    assert [image.display_of(i).slope for i in range(2)] == [1, 3]
    groups[1].PixelValueTransformationSequence[0].RescaleSlope = 1
    assert decode(saved(dataset), CONFIG).frame_display == ()


def test_bits_above_those_stored_are_cleared_and_the_sign_extended() -> None:
    dataset = ct()
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = np.full((128, 128), 0x7F38, "<u2").tobytes()
    assert np.unique(decode(saved(dataset), CONFIG).pixels).tolist() == [0xF38 - 4096]
    dataset.PixelRepresentation = 0
    assert np.unique(decode(saved(dataset), CONFIG).pixels).tolist() == [0xF38]


def test_a_palette_becomes_rgb_as_pydicom_maps_it() -> None:
    path = get_testdata_file("examples_palette.dcm")
    dataset = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_color_lut(dataset.pixel_array, dataset)
    image = decode(Path(path).read_bytes(), CONFIG)
    np.testing.assert_array_equal(image.pixels[0], expected >> 8 if expected.dtype == np.uint16 else expected)


def test_sixteen_bit_colour_is_scaled_to_eight() -> None:
    path = get_testdata_file("SC_rgb_rle_16bit.dcm")
    expected = pydicom.dcmread(path).pixel_array >> 8
    np.testing.assert_array_equal(decode(Path(path).read_bytes(), CONFIG).pixels[0], expected)


def test_fewer_bytes_than_the_header_says_is_truncated() -> None:
    dataset = ct()
    dataset.PixelData = dataset.PixelData[:-2]
    assert code_of(saved(dataset)) is ErrorCode.TRUNCATED


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("Rows", 0, ErrorCode.BAD_DIMENSIONS),
        ("Columns", 65535, ErrorCode.BAD_DIMENSIONS),
        ("SamplesPerPixel", 2, ErrorCode.UNSUPPORTED_SHAPE),
        ("BitsAllocated", 12, ErrorCode.UNSUPPORTED_ENCODING),
        ("BitsStored", 17, ErrorCode.BAD_HEADER),
        ("PhotometricInterpretation", "DOE JANE", ErrorCode.BAD_HEADER),
    ],
)
def test_a_bad_header_field_has_its_code(field: str, value: object, code: ErrorCode) -> None:
    dataset = ct()
    setattr(dataset, field, value)
    assert code_of(saved(dataset)) is code


def test_an_unknown_transfer_syntax_is_an_unsupported_encoding() -> None:
    data = Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes()
    unknown = data.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.7\0", 1)
    assert unknown != data
    assert code_of(unknown) is ErrorCode.UNSUPPORTED_ENCODING
