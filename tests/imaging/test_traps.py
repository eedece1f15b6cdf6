"""The known traps of medical image files, each held by a named test: by those that `traps.csv` names, or below.

Traps are of decoders, of hostile files, of the display chain, of geometry, of identifiers, and of the
real data that the tests use. A renamed or deleted test makes this module fail.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medvision_ray.config import DecodeConfig, LabelsConfig, PreprocessConfig
from medvision_ray.imaging import codecs
from medvision_ray.imaging import decode as decode_module
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.grid import fit
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.imaging.volume import decode_series
from medvision_ray.learning.labels import duplicate_groups, load_labels
from medvision_ray.privacy import Pseudonymiser

TESTS = Path(__file__).parents[1]
CONFIG = DecodeConfig()


def test_every_trap_has_a_test_that_asserts_something() -> None:
    """By the syntax tree: a test that the table names exists, is collected by its name, and can fail."""
    table = rows_of(Path(__file__).with_name("traps.csv"))
    assert len({row["trap"] for row in table}) == len(table) > 70
    for row in table:
        file, name = row["test"].split("::")
        functions = functions_of(TESTS / file)
        assert name in functions, row
        # an assertion, or a call of one: pytest.raises, numpy.testing, or a function of the module that holds one
        calls = {ast.unparse(n.func).split(".")[-1] for n in ast.walk(functions[name]) if isinstance(n, ast.Call)}
        asserting = {
            other for other, node in functions.items() if any(isinstance(n, ast.Assert) for n in ast.walk(node))
        }
        assert name in asserting or calls & {"raises", "assert_array_equal", "assert_allclose", *asserting}, row


@lru_cache
def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def ct() -> pydicom.FileDataset:
    return pydicom.dcmread(get_testdata_file("CT_small.dcm"))


def saved(dataset: Dataset) -> bytes:
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def shown(image: MedicalImage, **options: Any) -> np.ndarray[Any, Any]:
    config = PreprocessConfig(size=(64, 64), resize="stretch", percentiles=(0, 100), **options)
    return prepare(image, config).pixels[0, 0]


# Decoders


def test_frames_after_the_first_of_a_ybr_jpeg_keep_their_colours(corpora_dir: Path) -> None:
    """The colour space that a decoder notes down after the first frame must not hold for the second."""
    folder = corpora_dir / "dicomParser/testImages/encapsulated/multi-frame"
    coded = decode((folder / "IM00001.fragmented_no_bot_jpeg_baseline.50.dcm").read_bytes(), CONFIG).pixels
    native = decode((folder / "IM00001.implicit_little_endian.dcm").read_bytes(), CONFIG).pixels
    assert len(coded) == len(native) == 8
    for one, other in zip(coded.astype(int), native.astype(int), strict=True):
        assert np.abs(one - other).mean() < 3  # green frames are off by tens


def test_rgb_in_a_jpeg_without_a_word_about_it_is_not_taken_for_ybr() -> None:
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[..., 0], colours[16:, :, 1], colours[:, 16:, 2] = 200, 120, 60
    code = imagecodecs.jpeg8_encode(colours, level=100, colorspace="RGB", outcolorspace="RGB")
    for start in (code.index(b"\xff\xc0") + 10, code.index(b"\xff\xda") + 5):  # components named 1, 2, 3
        step = 3 if start < code.index(b"\xff\xda") else 2
        for number in range(3):
            place = start + step * number
            code = code[:place] + bytes([number + 1]) + code[place + 1 :]
    adobe = code.find(b"\xff\xee")
    if adobe >= 0:
        code = code[:adobe] + code[adobe + 2 + int.from_bytes(code[adobe + 2 : adobe + 4], "big") :]
    dataset = pydicom.dcmread(get_testdata_file("SC_rgb_small_odd.dcm"))
    dataset.Rows = dataset.Columns = 32
    dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
    dataset.PixelData = encapsulate([code])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.50")
    assert np.abs(decode(saved(dataset), CONFIG).pixels[0].astype(int) - colours).max() <= 3


@pytest.mark.parametrize(
    "path", ["dicom-test-files/data/WG04/JPLY/RG2_JPLY", "dcm4che/dcm4che-test-data/src/main/resources/NM1_JPLY"]
)
def test_jpeg_extended_with_a_spectral_end_of_0_decodes(corpora_dir: Path, path: str) -> None:
    """The lossy 12-bit files of WG-04, which pylibjpeg-libjpeg, Pillow and pydicom's GDCM refuse."""
    image = decode((corpora_dir / path).read_bytes(), CONFIG)
    assert image.pixels.dtype.itemsize == 2
    assert int(image.pixels.max()) > 255


def test_the_header_s_sign_holds_where_a_jpeg_2000_has_another(corpora_dir: Path) -> None:
    pixels = decode(
        (corpora_dir / "pydicom/src/pydicom/data/test_files/J2K_pixelrep_mismatch.dcm").read_bytes(), CONFIG
    ).pixels
    assert pixels.dtype == np.int16
    assert (int(pixels.min()), int(pixels.max())) == (-2000, 1896)  # unsigned, the air around the patient is bright


def test_rle_is_never_left_to_the_decoder_that_crashes(corpora_dir: Path) -> None:
    bomb = (corpora_dir / "bombs/imagecodecs_dicomrle_segv.dcm").read_bytes()
    with pytest.raises(DecodeError):
        decode(bomb, CONFIG)
    calls = {
        node.attr for node in ast.walk(ast.parse(Path(codecs.__file__).read_text())) if isinstance(node, ast.Attribute)
    }
    assert not {name for name in calls if "rle" in name and name != "RLE"}


def test_a_decoder_that_raises_stop_iteration_ends_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise StopIteration

    monkeypatch.setattr(decode_module, "decode_dicom", stop)
    with pytest.raises(DecodeError) as caught:
        list(decode(data, CONFIG) for data in [saved(ct())])
    assert caught.value.code is ErrorCode.CORRUPT


def test_four_threads_decode_what_one_decodes(corpora_dir: Path) -> None:
    paths = [
        *sorted((corpora_dir / "dicom-test-files/data/WG04").rglob("MR*")),
        *(corpora_dir / "dicomParser").rglob("CT*.dcm"),
    ]
    data = [path.read_bytes() for path in paths if path.is_file()]

    def digest(content: bytes) -> str:
        return hashlib.sha1(np.ascontiguousarray(decode(content, CONFIG).pixels).tobytes()).hexdigest()

    alone = [digest(content) for content in data]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(digest, data * 2))
    assert (len(alone), len(set(alone))) == (14, 5)
    assert together == alone * 2


def test_overlay_planes_are_not_drawn() -> None:
    plain = decode(saved(ct()), CONFIG).pixels
    dataset = ct()
    for element, kind, value in ((0x10, "US", 128), (0x11, "US", 128), (0x40, "CS", "G"), (0x50, "SS", [1, 1])):
        dataset.add_new((0x6000, element), kind, value)
    dataset.add_new((0x6000, 0x0100), "US", 1)
    dataset.add_new((0x6000, 0x0102), "US", 0)
    dataset.add_new((0x6000, 0x3000), "OW", b"\xff" * (128 * 128 // 8))
    np.testing.assert_array_equal(decode(saved(dataset), CONFIG).pixels, plain)


# Display


def test_monochrome1_is_not_inverted_in_the_stored_values() -> None:
    dataset = ct()
    dataset.PhotometricInterpretation = "MONOCHROME1"
    image = decode(saved(dataset), CONFIG)
    np.testing.assert_array_equal(image.pixels, decode(saved(ct()), CONFIG).pixels)
    assert image.display.invert


def test_a_slope_of_0_and_none_is_1() -> None:
    dataset = ct()
    dataset.RescaleSlope = 0
    assert decode(saved(dataset), CONFIG).display.slope == 1.0
    del dataset.RescaleSlope, dataset.RescaleIntercept
    display = decode(saved(dataset), CONFIG).display
    assert (display.slope, display.intercept, display.hounsfield) == (1.0, 0.0, False)


def test_an_empty_item_of_a_voi_lut_sequence_is_passed_over() -> None:
    dataset = ct()
    dataset.Modality, dataset.WindowCenter, dataset.WindowWidth = "DX", 100, 50
    dataset.VOILUTSequence = Sequence([Dataset()])
    display = decode(saved(dataset), CONFIG).display
    assert display.voi_lut is None
    assert display.window is not None
    assert display.window.width == 50


def test_a_window_that_clips_is_applied_before_resizing() -> None:
    """A board of far too dark and far too bright pixels is grey after the window, and black or white before it."""
    dataset = ct()
    board = np.indices((128, 128)).sum(axis=0) % 2
    dataset.PixelData = np.where(board, 3000, -1000).astype("<i2").tobytes()
    dataset.RescaleIntercept, dataset.RescaleSlope = 0, 1
    del dataset.PixelPaddingValue
    pixels = shown(decode(saved(dataset), CONFIG), ct_window_hu=(40.0, 400.0))
    assert abs(float(pixels.mean()) - 127.5) < 1  # the mean of -1000 and 3000 is above the window: white


@pytest.mark.parametrize(
    ("photometric", "sign", "inverted"),
    [("MONOCHROME1", 1, True), ("MONOCHROME2", 1, True), ("MONOCHROME2", -1, False), ("MONOCHROME1", -1, False)],
)
def test_a_raw_x_ray_is_bright_where_the_beam_was_weak(photometric: str, sign: int, inverted: bool) -> None:
    dataset = raw_film(photometric)
    dataset.PixelIntensityRelationshipSign = sign
    image = decode(saved(dataset), CONFIG, Pseudonymiser(b"0123456789abcdef0123456789abcdef"))
    assert image.display.invert is inverted
    assert image.header.presentation_intent == "FOR PROCESSING"
    dataset.PresentationIntentType = "FOR PRESENTATION"  # its values are made for the photometric interpretation
    assert decode(saved(dataset), CONFIG).display.invert is (photometric == "MONOCHROME1")


def raw_film(photometric: str) -> pydicom.FileDataset:
    dataset = ct()
    dataset.Modality, dataset.PresentationIntentType = "MG", "FOR PROCESSING"
    dataset.PhotometricInterpretation = photometric
    return dataset


def test_raw_x_rays_are_refused_where_the_site_wants_it() -> None:
    refusing = DecodeConfig(for_processing="refuse")
    with pytest.raises(DecodeError) as caught:
        decode(saved(raw_film("MONOCHROME1")), refusing)
    assert caught.value.code is ErrorCode.FOR_PROCESSING
    assert decode(saved(ct()), refusing).modality == "CT"


def test_a_film_without_a_window_is_shown_by_its_percentiles_without_padding() -> None:
    dataset = ct()
    dataset.Modality = "CR"
    stored = np.full((128, 128), 500, "<i2")
    stored[:64], stored[:, :8] = 900, 30000
    dataset.PixelData = stored.tobytes()
    dataset["PixelPaddingValue"].value = 30000
    pixels = shown(decode(saved(dataset), CONFIG))
    assert (int(pixels[8, 32]), int(pixels[56, 32]), int(pixels[8, 1])) == (255, 0, 0)


# Geometry


def test_thickness_and_spacing_between_slices_are_no_geometry(phantom_series: Callable[..., list[bytes]]) -> None:
    parts = []
    for part in phantom_series(4):
        dataset = pydicom.dcmread(BytesIO(part))
        dataset.SliceThickness, dataset.SpacingBetweenSlices = 9, 7
        parts.append(saved(dataset))
    volume = decode_series(parts, CONFIG)
    assert volume.geometry is not None
    assert volume.geometry.slice_spacing_mm == pytest.approx(2.5)


def test_nifti_takes_the_sform_where_its_code_is_set_and_else_the_qform() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    spacings = []
    for sform_code in (1, 0):
        image = nibabel.Nifti1Image(voxels, np.eye(4))
        image.set_qform(np.diag([5.0, 6.0, 7.0, 1.0]), code=1)
        image.set_sform(np.diag([2.0, 3.0, 4.0, 1.0]), code=sform_code)
        spacings.append(decode(image.to_bytes(), CONFIG).spacing_mm)
    assert spacings == [pytest.approx((3, 2)), pytest.approx((6, 5))]


# Identifiers


def test_a_damaged_date_reaches_no_warning_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    data = saved(ct())
    place = data.index(b"\x08\x00\x20\x00DA") + 8
    data = data[:place] + b"DOE JANE" + data[place + 8 :]
    with warnings.catch_warnings(record=True) as told, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        decode(data, CONFIG, Pseudonymiser(b"0123456789abcdef0123456789abcdef"))
    assert not [warning for warning in told if "DOE" in str(warning.message)]
    assert "DOE" not in caplog.text


# The data


def test_brain_mri_keeps_the_smallest_tumours_in_the_model_s_grid(data_dir: Path) -> None:
    """The smallest covers a thousandth of its slice; resizing a mask by its nearest pixels can lose it."""
    shares = {}
    for row in rows_of(data_dir / "brain_mri/labels.csv")[::20]:
        mask = cv2.imread(str(data_dir / "brain_mri" / row["mask"]), cv2.IMREAD_GRAYSCALE)
        shares[row["mask"]] = float((mask > 0).mean())
    for path in sorted(shares, key=lambda path: shares[path])[:10]:
        mask = cv2.imread(str(data_dir / "brain_mri" / path), cv2.IMREAD_GRAYSCALE)
        in_grid = fit(mask.shape[:2], (96, 96), keep_aspect=True).mask_to_model(mask)
        assert in_grid.any()
        assert float(in_grid.mean()) == pytest.approx(shares[path], rel=0.35)
    assert min(shares.values()) < 0.004


def test_chest_x_ray_is_grey_in_rgb_and_decodes_to_grey(data_dir: Path) -> None:
    for row in rows_of(data_dir / "chest_xray/labels.csv")[::400]:
        data = (data_dir / "chest_xray" / row["image"]).read_bytes()
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert stored.shape == (224, 224, 3)
        image = decode(data, CONFIG)
        assert image.pixels.shape == (1, 224, 224)
        np.testing.assert_array_equal(image.pixels[0], stored[..., 0])


def test_chest_x_ray_patient_numbers_restart_and_are_told_apart(data_dir: Path) -> None:
    table = load_labels(LabelsConfig(table=str(data_dir / "chest_xray/labels.csv")))
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(data_dir / "chest_xray/labels.csv"):
        splits[row["patient_id"].split("-", 1)[1]].add(row["split"])
    assert sum(len(found) > 1 for found in splits.values()) > 100  # by their bare numbers they would overlap
    train, test = (set(table.select(split).patients) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_chest_x_ray_holds_exact_copies_within_splits_and_none_across(data_dir: Path) -> None:
    rows = rows_of(data_dir / "chest_xray/labels.csv")
    digests = [hashlib.sha256((data_dir / "chest_xray" / row["image"]).read_bytes()).hexdigest() for row in rows]
    copies = sum(count - 1 for count in Counter(digests).values())
    assert copies == 32
    assert duplicate_groups(digests, [row["split"] for row in rows]) == []
    made = load_labels(LabelsConfig(table=str(data_dir / "chest_xray/labels.csv"))).splits
    assert duplicate_groups(digests, made) == []  # copies are of one patient, whom the split for validation keeps whole


def test_chest_ct_has_padding_both_signs_and_several_windows_and_shows_air_black(data_dir: Path) -> None:
    darkest, kinds, windows = 0.0, Counter[str](), 0
    for row in rows_of(data_dir / "chest_ct_dicom/labels.csv")[::3]:
        data = (data_dir / "chest_ct_dicom" / row["image"]).read_bytes()
        image = decode(data, CONFIG)
        kinds[image.pixels.dtype.kind] += 1
        values = image.pixels * image.display.slope + image.display.intercept
        darkest = min(darkest, float(values.min()))
        header = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
        windows += not isinstance(header.WindowCenter, float)
        assert image.display.window is not None
        assert image.display.window.center == np.atleast_1d(header.WindowCenter)[0]
        model = prepare(image, PreprocessConfig(size=(512, 512), ct_window_hu=(-600.0, 1500.0)))
        assert (model.pixels[0, 0][values[0] < -1500] == 0).all()
    assert darkest == -3024
    assert min(kinds["i"], kinds["u"]) > 5
    assert windows > 10


def test_chest_ct_patients_with_both_labels_stay_in_one_split(data_dir: Path) -> None:
    table = load_labels(LabelsConfig(table=str(data_dir / "chest_ct_dicom/labels.csv")))
    labels, splits = defaultdict(set), defaultdict(set)
    for patient, label, split in zip(table.patients, table.labels, table.splits, strict=True):
        labels[patient].add(int(label))
        splits[patient].add(str(split))
    both = [patient for patient, found in labels.items() if len(found) == 2]
    assert len(both) == 9
    assert all(len(splits[patient]) == 1 for patient in both)


def test_chest_ct_manufacturer_tells_the_label_and_is_a_column_to_check_by(data_dir: Path) -> None:
    """A model can learn the scanner in place of the contrast; rows name it, so that metrics can be cut by it."""
    counts: dict[str | None, Counter[str]] = defaultdict(Counter)
    for row in rows_of(data_dir / "chest_ct_dicom/labels.csv"):
        data = (data_dir / "chest_ct_dicom" / row["image"]).read_bytes()
        header = decode(data, CONFIG, Pseudonymiser(b"0123456789abcdef0123456789abcdef")).header
        counts[header.manufacturer][row["label"]] += 1
    assert set(counts) == {"SIEMENS", "GE MEDICAL SYSTEMS"}
    by_scanner = sum(max(found.values()) for found in counts.values())
    assert by_scanner == 63  # of 100, against 50 by guessing
