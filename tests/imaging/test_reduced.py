"""JPEG and grey JPEG 2000 at a lower resolution: the samples are right, the way back is the source's, and it is told."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from medvision_ray.config import ClaheConfig, DecodeConfig, PreprocessConfig
from medvision_ray.demo.phantom import draw_phantom
from medvision_ray.imaging.codestream import read_jpeg2000
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.preprocess import prepare, preprocess_id, reducible_to
from medvision_ray.imaging.reduced import decode_halved, halvings
from medvision_ray.scoring.objects import Effort, ObjectReader

SMALL = PreprocessConfig(size=(64, 64))
WG04 = "dicom-test-files/data/WG04"


def film(rows: int = 512, columns: int = 512, bits: int = 12, *, signed: bool = False) -> NDArray[Any]:
    picture, _ = draw_phantom(np.random.default_rng(3), "CT", "nodule", max(rows, columns))
    stored = np.rint(picture[:rows, :columns] * ((1 << bits) - 1)).astype(np.int32) - (1 << bits - 1) * signed
    return stored.astype(f"{'i' if signed else 'u'}{2 if bits > 8 else 1}")


def coded(pixels: NDArray[Any], bits: int = 12, **options: Any) -> bytes:
    code: bytes = imagecodecs.jpeg2k_encode(
        pixels, codecformat="j2k", reversible=True, level=0, bitspersample=bits, **options
    )
    return code


def dicom_of(*frames: bytes, rows: int = 512, columns: int = 512, fragments: int = 1, **fields: Any) -> bytes:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for keyword in ("PixelPaddingValue", "ImagePositionPatient"):
        del dataset[keyword]
    dataset.Modality, dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = "MR", 0, 12, 11
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = rows, columns, len(frames)
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = encapsulate(list(frames), fragments_per_frame=fragments)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.90")
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def reduced(data: bytes, size: tuple[int, int] = SMALL.size) -> MedicalImage:
    return decode(data, DecodeConfig(), None, size)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 15])
def test_samples_come_out_of_the_other_library_as_they_went_in(bits: int, signed: bool) -> None:
    """Without halving it must give every stored value, which holds its scaling and its sign."""
    pixels = film(97, 70, bits, signed=signed)
    code = coded(pixels, bits)
    found = decode_halved(code, read_jpeg2000(code), 0)
    assert found.dtype == imagecodecs.jpeg2k_decode(code).dtype
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("rows", "columns", "size", "times"),
    [(2048, 2048, (224, 224), 2), (896, 896, (224, 224), 1), (895, 4000, (224, 224), 0), (1800, 1800, (224, 448), 1)],
)
def test_both_sides_stay_twice_the_models(rows: int, columns: int, size: tuple[int, int], times: int) -> None:
    assert halvings(rows, columns, size) == times


@pytest.mark.parametrize(
    "path", [f"{WG04}/J2KI/MR2_J2KI", f"{WG04}/J2KR/MR2_J2KR", f"{WG04}/J2KI/RG3_J2KI", f"{WG04}/J2KI/RG1_J2KI"]
)
def test_a_real_file_is_shown_nearly_alike_on_the_grid_of_the_source(corpora_dir: Path, path: str) -> None:
    data = (corpora_dir / path).read_bytes()
    config = PreprocessConfig()
    whole, less = decode(data, DecodeConfig()), reduced(data, config.size)
    assert less.pixels.size * 3.9 < whole.pixels.size
    assert min(less.pixels.shape[1:]) >= 448
    assert (less.shape, less.spacing_mm, less.geometry) == (whole.shape, whole.spacing_mm, whole.geometry)
    one, other = prepare(whole, config), prepare(less, config)
    assert one.transform == other.transform
    mask = np.ones(config.size, np.float32)
    assert other.transform.mask_to_source(mask, 0.5).shape == whole.pixels.shape[1:]
    difference = np.abs(one.pixels.astype(int) - other.pixels)
    assert difference.mean() < 1.5  # of 255; the file with most fine detail has 1.2
    assert np.corrcoef(one.pixels.ravel(), other.pixels.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_is_shown_nearly_alike_upright_on_the_grid_of_the_source(colour: bool, orientation: int) -> None:
    pixels = film(600, 1201, 8)
    picture = Image.fromarray(np.stack([pixels, pixels // 2, pixels // 4], axis=-1) if colour else pixels)
    exif, out = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    picture.save(out, "JPEG", quality=95, exif=exif)
    whole, less = decode(out.getvalue(), DecodeConfig()), reduced(out.getvalue())
    assert less.pixels.size * 10 < whole.pixels.size
    assert less.shape == whole.shape == ((1201, 600) if orientation == 6 else (600, 1201))
    one, other = prepare(whole, SMALL), prepare(less, SMALL)
    assert one.transform == other.transform
    assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 1
    for cut in (out.getvalue()[:-2000], out.getvalue()[:-2]):
        with pytest.raises(DecodeError):
            reduced(cut)


def test_a_grey_jpeg_within_dicom_is_shown_nearly_alike(corpora_dir: Path) -> None:
    path = "torchxrayvision/tests/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    data = (corpora_dir / path).read_bytes()
    whole, less = decode(data, DecodeConfig()), reduced(data, (224, 224))
    assert (whole.pixels.shape, less.pixels.shape, less.shape) == ((1, 1024, 1024), (1, 512, 512), (1024, 1024))
    config = PreprocessConfig()
    one, other = prepare(whole, config), prepare(less, config)
    assert one.transform == other.transform
    assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 0.5


def test_whatever_has_no_lower_resolution_is_decoded_whole(corpora_dir: Path) -> None:
    pixels = film()
    single = dicom_of(coded(pixels, resolutions=1))
    native = (corpora_dir / "cornerstone3D/packages/dicomImageLoader/examplesOld/test-images/CTImage.dcm").read_bytes()
    for data in (single, native):
        image = reduced(data)
        assert image.source_shape is None
        np.testing.assert_array_equal(image.pixels, decode(data, DecodeConfig()).pixels)
    np.testing.assert_array_equal(reduced(single).pixels[0], pixels)


def test_all_frames_of_an_object_have_one_resolution() -> None:
    pixels = film()
    both = reduced(dicom_of(coded(pixels), coded(pixels)))
    assert both.pixels.shape == (2, 128, 128)
    mixed = reduced(dicom_of(coded(pixels), coded(pixels, resolutions=2)))
    assert mixed.pixels.shape == (2, 256, 256)


@pytest.mark.parametrize("fragments", [1, 3])
def test_the_fragments_of_a_frame_are_one_codestream(fragments: int) -> None:
    pixels = film()
    data = dicom_of(coded(pixels), fragments=fragments)
    np.testing.assert_array_equal(decode(data, DecodeConfig()).pixels[0], pixels)
    assert reduced(data).pixels.shape == (1, 128, 128)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_frame_that_is_cut_is_refused_all_the_same(share: float) -> None:
    code = coded(film())
    data = dicom_of(code[: int(len(code) * share)])
    with pytest.raises(DecodeError):
        reduced(data)


def test_it_is_off_unless_asked_for_and_rows_tell() -> None:
    data = dicom_of(coded(film()))
    effort = Effort()
    ready = {on: ObjectReader(DecodeConfig(reduced=on), SMALL, None).prepare(data, effort) for on in (False, True)}
    default = ObjectReader(DecodeConfig(), SMALL, None).prepare(data, effort)
    np.testing.assert_array_equal(default.pixels, ready[False].pixels)
    assert (ready[True].pixels != default.pixels).any()
    assert ready[True].transform == default.transform
    assert preprocess_id(SMALL, reduced=True) != preprocess_id(SMALL) == preprocess_id(SMALL, reduced=False)


def test_steps_that_need_all_pixels_get_them() -> None:
    for config in (PreprocessConfig(denoise="median"), PreprocessConfig(clahe=ClaheConfig())):
        assert reducible_to(config) is None
        assert preprocess_id(config, reduced=True) == preprocess_id(config)
    assert reducible_to(SMALL) == (64, 64)
