"""Native encodings that real archives hold and public corpora have few of, written by hand and read back."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medvision_ray.config import DecodeConfig, PreprocessConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.preprocess import prepare

CONFIG = DecodeConfig()
RGB = np.random.default_rng(0).integers(0, 256, (2, 8, 10, 3), dtype=np.uint8)


def saved(dataset: Dataset, syntax: pydicom.uid.UID | None = None) -> bytes:
    out = BytesIO()
    if syntax is None:
        dataset.save_as(out)
        return out.getvalue()
    fresh = Dataset(dict(dataset))  # knows of no encoding, which pydicom would not change
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(out, fresh, enforce_file_format=True)
    return out.getvalue()


def ct(values: np.ndarray[Any, Any] | None = None) -> pydicom.FileDataset:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    if values is not None:
        dataset.PixelData = values.tobytes()
        dataset.Rows, dataset.Columns = values.shape
        dataset.BitsAllocated = 8 * values.itemsize
        dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
    return dataset


def colour(samples: np.ndarray[Any, Any], photometric: str, planar: int) -> pydicom.FileDataset:
    dataset = pydicom.dcmread(get_testdata_file("SC_rgb_small_odd.dcm"))
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 8, 10, 2
    dataset.PhotometricInterpretation, dataset.PlanarConfiguration = photometric, planar
    dataset.PixelData = samples.tobytes()
    return dataset


def to_ybr(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Full-range Rec. 601, written from the equations of DICOM PS3.3 C.7.6.3.1.2."""
    red, green, blue = (rgb[..., index].astype(np.float64) for index in range(3))
    luma = 0.2990 * red + 0.5870 * green + 0.1140 * blue
    cb = -0.1687 * red - 0.3313 * green + 0.5000 * blue + 128
    cr = 0.5000 * red - 0.4187 * green - 0.0813 * blue + 128
    return np.clip(np.rint(np.stack([luma, cb, cr], axis=-1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("big_endian", [False, True])
def test_colour_by_pixel_and_by_plane_is_the_same(planar: int, big_endian: bool) -> None:
    samples = np.moveaxis(RGB, -1, 1) if planar else RGB
    dataset = colour(np.ascontiguousarray(samples), "RGB", planar)
    dataset["PixelData"].VR = "OB"
    data = saved(dataset, ExplicitVRBigEndian if big_endian else None)
    np.testing.assert_array_equal(decode(data, CONFIG).pixels, RGB)


@pytest.mark.parametrize("planar", [0, 1])
def test_ybr_full_becomes_rgb(planar: int) -> None:
    ybr = to_ybr(RGB)
    samples = np.ascontiguousarray(np.moveaxis(ybr, -1, 1) if planar else ybr)
    found = decode(saved(colour(samples, "YBR_FULL", planar)), CONFIG).pixels
    assert np.abs(found.astype(int) - RGB).max() <= 2  # YBR itself is rounded


def test_ybr_full_422_takes_each_chroma_for_two_pixels() -> None:
    pairs = np.repeat(RGB[:, :, ::2], 2, axis=2)
    ybr = to_ybr(pairs)
    packed = np.stack([ybr[:, :, ::2, 0], ybr[:, :, 1::2, 0], ybr[:, :, ::2, 1], ybr[:, :, ::2, 2]], axis=-1)
    found = decode(saved(colour(packed, "YBR_FULL_422", 0)), CONFIG).pixels
    assert np.abs(found.astype(int) - pairs).max() <= 2


def test_a_real_ybr_file_is_the_rounded_inverse_of_the_standards_equations(corpora_dir: Path) -> None:
    """The one file of the corpora that dcmtk shows otherwise (`test_dcmtk.EXCEPTIONS`)."""
    data = (corpora_dir / "dicom-test-files/data/pydicom/SC_ybr_full_uncompressed.dcm").read_bytes()
    ybr = np.frombuffer(pydicom.dcmread(BytesIO(data)).PixelData, np.uint8).reshape(100, 100, 3).astype(np.float64)
    forward = np.array([[0.2990, 0.5870, 0.1140], [-0.1687, -0.3313, 0.5000], [0.5000, -0.4187, -0.0813]])
    exact = np.clip((ybr - [0, 128, 128]) @ np.linalg.inv(forward).T, 0, 255)
    assert np.abs(exact - decode(data, CONFIG).pixels[0]).max() <= 0.5


def test_a_sample_at_the_top_of_its_cell_is_shifted_down() -> None:
    values = np.arange(128 * 128, dtype=np.uint16).reshape(128, 128) & 0xFFF
    dataset = ct(values << 4 | 0x5)  # four bits of something else below
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 15, 0
    np.testing.assert_array_equal(decode(saved(dataset), CONFIG).pixels[0], values)


def test_a_sample_in_the_middle_of_its_cell_is_sign_extended() -> None:
    values = np.array([[-2048, -1, 0, 2047]], np.int16)
    dataset = ct(((values.astype(np.uint16) & 0xFFF) << 2 | 0xC001).astype(np.uint16))
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 13, 1
    assert decode(saved(dataset), CONFIG).pixels[0].tolist() == values.tolist()


@pytest.mark.parametrize("frames", [1, 3])
def test_single_bits_run_on_from_frame_to_frame(frames: int) -> None:
    bits = np.random.default_rng(3).integers(0, 2, (frames, 5, 7), dtype=np.uint8)
    dataset = ct()
    dataset.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes() + b"\0"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 5, 7, frames
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = dataset.PixelRepresentation = 0
    np.testing.assert_array_equal(decode(saved(dataset), CONFIG).pixels, bits)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("preamble", [True, False])
def test_every_integer_reads_back_in_every_native_syntax(syntax: pydicom.uid.UID, kind: str, preamble: bool) -> None:
    limits = np.iinfo(kind)
    values = np.random.default_rng(5).integers(limits.min, limits.max, (8, 10), dtype=kind, endpoint=True)
    little = syntax is not ExplicitVRBigEndian
    dataset = ct(values.astype(values.dtype.newbyteorder("<" if little else ">")))
    dataset.PixelRepresentation = int(limits.min < 0)
    dataset["PixelData"].VR = "OB" if values.itemsize == 1 and not little else "OW"
    data = saved(dataset, syntax)
    found = decode(data if preamble else data[132:], CONFIG).pixels[0]
    assert found.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels_have_a_padding_of_their_own(keyword: str, kind: str) -> None:
    values = np.array([[-1e6, 0.25, 1.5]], kind)
    dataset = ct()
    del dataset.PixelData
    dataset.Rows, dataset.Columns = values.shape
    setattr(dataset, keyword, values.tobytes())
    prefix = keyword.removesuffix("PixelData")
    setattr(dataset, f"{prefix}PixelPaddingValue", -1e6)
    image = decode(saved(dataset), CONFIG)
    np.testing.assert_array_equal(image.pixels[0], values)
    assert image.display.padding == (-1e6, -1e6)


def functional_groups(dataset: Dataset, group: Dataset) -> Dataset:
    dataset.SharedFunctionalGroupsSequence = Sequence([group])
    return dataset


def lut(first: int, entries: list[int], bits: int = 16) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


def test_a_voi_lut_within_the_functional_groups_is_used() -> None:
    macro, group = Dataset(), Dataset()
    macro.VOILUTSequence = Sequence([lut(0, [5, 6, 7])])
    group.FrameVOILUTSequence = Sequence([macro])
    table = decode(saved(functional_groups(ct(), group)), CONFIG).display.voi_lut
    assert table is not None
    assert (table.first, table.values.tolist()) == (0, [5, 6, 7])


def test_a_frames_own_groups_win_over_the_shared_ones_and_those_over_the_top_level() -> None:
    def windowed(center: float) -> Dataset:
        macro, group = Dataset(), Dataset()
        macro.WindowCenter, macro.WindowWidth = center, 10
        group.FrameVOILUTSequence = Sequence([macro])
        return group

    dataset = functional_groups(ct(), windowed(20))
    dataset.WindowCenter, dataset.WindowWidth = 30, 10
    dataset.NumberOfFrames, dataset.PixelData = 2, dataset.PixelData * 2
    dataset.PerFrameFunctionalGroupsSequence = Sequence([windowed(11), Dataset()])
    image = decode(saved(dataset), CONFIG)
    windows = [image.display_of(index).window for index in range(2)]
    assert [window.center for window in windows if window] == [11, 20]
    del dataset.SharedFunctionalGroupsSequence
    image = decode(saved(dataset), CONFIG)
    windows = [image.display_of(index).window for index in range(2)]
    assert [window.center for window in windows if window] == [11, 30]


@pytest.mark.parametrize(
    ("unit", "slope", "hounsfield"),
    [("HU", 1, True), ("HU_MOD", 1, True), (None, 1, True), ("US", 1, False), ("MGML", 1, False), (None, None, False)],
)
def test_a_ct_is_in_hounsfield_units_only_where_it_says_so(
    unit: str | None, slope: int | None, hounsfield: bool
) -> None:
    dataset = ct()
    if unit:
        dataset.RescaleType = unit
    if slope is None:
        del dataset.RescaleSlope, dataset.RescaleIntercept
    image = decode(saved(dataset), CONFIG)
    assert image.display.hounsfield is hounsfield


def test_a_perfusion_map_of_a_ct_does_not_take_the_window_in_hounsfield_units(corpora_dir: Path) -> None:
    """RescaleType US of an enhanced CT: blood flow, not attenuation; the file's own window shows it."""
    image = decode((corpora_dir / "dicom-test-files/data/pydicom/eCT_Supplemental.dcm").read_bytes(), CONFIG)
    assert (image.modality, image.display.hounsfield) == ("CT", False)
    lung = prepare(image, PreprocessConfig(ct_window_hu=(-600.0, 1500.0))).pixels
    own = prepare(image, PreprocessConfig(ct_window_hu=None)).pixels
    np.testing.assert_array_equal(lung, own)


@pytest.mark.parametrize(
    ("sop_class", "code"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", ErrorCode.NOT_AN_IMAGE),  # comprehensive report
        ("1.2.840.10008.5.1.4.1.1.104.1", ErrorCode.NOT_AN_IMAGE),  # encapsulated PDF
        ("1.2.840.10008.5.1.4.1.1.481.5", ErrorCode.NOT_AN_IMAGE),  # radiotherapy plan
        ("1.2.840.10008.5.1.4.1.1.11.1", ErrorCode.NOT_AN_IMAGE),  # presentation state
        ("1.2.840.10008.5.1.4.1.1.9.1.1", ErrorCode.NOT_AN_IMAGE),  # ECG waveform
        ("1.2.840.10008.5.1.4.1.1.66.4", ErrorCode.NOT_AN_IMAGE),  # segmentation, with pixels too
        ("1.2.840.10008.5.1.4.1.1.2", ErrorCode.NO_PIXELS),  # CT
    ],
)
def test_a_class_without_pictures_is_not_an_image(sop_class: str, code: ErrorCode) -> None:
    dataset = ct()
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    del dataset.PixelData
    with pytest.raises(DecodeError) as caught:
        decode(saved(dataset), CONFIG)
    assert caught.value.code is code


def test_a_level_of_a_whole_slide_is_an_unsupported_shape() -> None:
    dataset = ct()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    with pytest.raises(DecodeError) as caught:
        decode(saved(dataset), CONFIG)
    assert caught.value.code is ErrorCode.UNSUPPORTED_SHAPE
    assert caught.value.facts == {"kind": "whole_slide"}
