"""NIfTI volumes against nibabel, in every orientation, size and damage."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

CONFIG = DecodeConfig()
VOXELS = np.random.default_rng(0).integers(-500, 500, (5, 7, 4)).astype(np.int16)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


def nifti(voxels: np.ndarray[Any, Any] = VOXELS, kind: Any = nibabel.Nifti1Image, **fields: Any) -> bytes:
    image = kind(voxels, AFFINE)
    for name, value in fields.items():
        image.header[name] = value
    return bytes(image.to_bytes())


def code_of(data: bytes, config: DecodeConfig = CONFIG) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        decode(data, config)
    return caught.value.code


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_slices_are_axial_with_the_patients_right_on_the_left(kind: Any, compress: Any) -> None:
    image = decode(compress(nifti(kind=kind)), CONFIG)
    expected = VOXELS[::-1, ::-1, :].transpose(2, 1, 0)  # the file is RAS: columns go left, rows go back
    np.testing.assert_array_equal(image.pixels, expected)
    assert (image.source_format, image.modality, image.spacing_mm) == ("nifti", "OT", (3.0, 2.0))


def test_scaling_is_the_display_and_values_agree_with_nibabel(corpora_dir: Path) -> None:
    path = corpora_dir / "nibabel/nibabel/tests/data/anatomical.nii"
    image = decode(path.read_bytes(), CONFIG)
    canonical = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    ours = image.pixels * image.display.slope + image.display.intercept
    np.testing.assert_allclose(ours, canonical[::-1, ::-1].transpose(2, 1, 0))


def test_big_endian_files_come_out_in_machine_order(corpora_dir: Path) -> None:
    folder = corpora_dir / "nifti-reader-js/data"
    big, little = (decode((folder / f"{name}.nii.gz").read_bytes(), CONFIG).pixels for name in ("big", "little"))
    assert big.dtype.isnative
    np.testing.assert_array_equal(big, little)


def test_the_slope_and_intercept_of_the_header_are_kept() -> None:
    display = decode(nifti(scl_slope=0.5, scl_inter=-3), CONFIG).display
    assert (display.slope, display.intercept) == (0.5, -3)
    assert decode(nifti(scl_slope=0), CONFIG).display.slope == 1


def test_four_dimensions_need_a_volume_index() -> None:
    voxels = np.stack([VOXELS, VOXELS + 1], axis=-1)
    assert code_of(nifti(voxels)) is ErrorCode.UNSUPPORTED_SHAPE
    for index in (0, 1):
        chosen = decode(gzip.compress(nifti(voxels)), DecodeConfig(volume_index=index)).pixels
        np.testing.assert_array_equal(chosen, decode(nifti(VOXELS + np.int16(index)), CONFIG).pixels)
    assert code_of(nifti(voxels), DecodeConfig(volume_index=2)) is ErrorCode.UNSUPPORTED_SHAPE


@pytest.mark.parametrize("missing", [1, 100])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_fewer_voxels_than_the_header_names_is_truncated(missing: int, compress: Any) -> None:
    assert code_of(compress(nifti()[:-missing])) is ErrorCode.TRUNCATED


def test_a_gzip_file_cut_short_is_truncated() -> None:
    data = gzip.compress(nifti())
    assert code_of(data[: len(data) // 2]) is ErrorCode.TRUNCATED


def test_a_wrong_gzip_checksum_is_corrupt() -> None:
    data = bytearray(gzip.compress(nifti()))
    data[-8] ^= 1
    assert code_of(bytes(data)) is ErrorCode.CORRUPT


def test_a_compressed_volume_is_never_inflated_past_its_header() -> None:
    image = decode(gzip.compress(nifti() + bytes(50_000_000)), DecodeConfig(max_decoded_bytes=100_000))
    assert image.pixels.shape == (4, 7, 5)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"datatype": 32}, ErrorCode.UNSUPPORTED_ENCODING),
        ({"vox_offset": np.nan}, ErrorCode.BAD_HEADER),
        ({"vox_offset": 1e30}, ErrorCode.BAD_HEADER),
        ({"dim": [3, 5, -7, 4, 1, 1, 1, 1]}, ErrorCode.BAD_DIMENSIONS),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, ErrorCode.TOO_LARGE),
    ],
)
def test_a_bad_header_has_its_code(fields: dict[str, Any], code: ErrorCode) -> None:
    data = bytearray(nifti())
    header = nibabel.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    assert code_of(header.binaryblock + bytes(data[348:])) is code


def test_rgb_voxels_become_rgb_frames() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (5, 7, 4, 3), dtype=np.uint8)
    voxels = rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    pixels = decode(nifti(voxels), CONFIG).pixels
    np.testing.assert_array_equal(pixels, rgb[::-1, ::-1].transpose(2, 1, 0, 3))
