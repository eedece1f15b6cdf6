"""The displayed values of real files against dcmtk's `dcm2pnm`, an implementation that shares nothing with ours.

Grey files: rescale or modality LUT, then the file's first VOI LUT or window, else its own range, then inversion,
within 1/255. Colour files: 8-bit RGB within 1 of 255. dcmtk is a test tool only (Debian package `dcmtk`). What it
cannot read as it lies is given to it in another form of the same object, and each such form is named below;
padding is left as it is, for dcmtk does not know of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.display import Bounds, Scaling, modality_values, unit_values
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.image import MedicalImage, VoiFunction

needs_dcmtk = pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcmtk is not installed")

CONFIG = DecodeConfig()
JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 57, 70))
JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81))
# Syntaxes that dcmtk has no codec for: it gets our stored values uncompressed, so that only the display is compared.
JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))
UNCOMPRESSED_FOR_DCMTK = ("pydicom-data/data_store/data/JLSL_08_07_0_1F.dcm",)  # it refuses JPEG-LS of 7 bits
# Files whose window and rescale are written with VR UN, which dcmtk ignores: `dcmconv --convert-un` first.
TYPED_FOR_DCMTK = (
    "cornerstone3D/packages/dicomImageLoader/examplesOld/test-images/"
    "CTImage.dcm_JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm",
    "cornerstone3D/packages/dicomImageLoader/examplesOld/test-images/"
    "CTImage.dcm_JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm",
)
NOT_COMPARABLE = {
    "SC_rgb_32bit.dcm": "dcmtk takes no 32-bit samples in OW",
    "SC_rgb_32bit_2frame.dcm": "dcmtk takes no 32-bit samples in OW",
    "SC_rgb_expb_32bit.dcm": "dcmtk takes no 32-bit samples in OW",
    "SC_rgb_expb_32bit_2frame.dcm": "dcmtk takes no 32-bit samples in OW",
    "gdcm-US-ALOKA-16.dcm": "dcmtk has no segmented palettes",
    "gdcm-US-ALOKA-16_big.dcm": "dcmtk has no segmented palettes",
}
EXCEPTIONS = {
    "SC_ybr_full_uncompressed.dcm": "dcmtk truncates each term of YBR to RGB, which adds up to 2; ours is rounded once",
}
SAMPLE = (  # each branch once: VOI LUT, modality LUT, INVERSE, MONOCHROME1, window, range, groups, palette, YBR
    "dicom-test-files/data/pydicom/vlut_04.dcm",
    "dicom-test-files/data/pydicom/mlut_18.dcm",
    "highdicom/data/test_files/dx_image.dcm",
    "torchxrayvision/tests/Fake_MONOHR1.dcm",
    "dicomParser/testImages/CT1_UNC.explicit_big_endian.dcm",
    "dicom-test-files/data/pydicom/MR_small_RLE.dcm",
    "dicom-test-files/data/pydicom/emri_small.dcm",
    "dicom-test-files/data/pydicom/eCT_Supplemental.dcm",
    "dicom-test-files/data/pydicom/OBXXXX1A.dcm",
    "dicom-test-files/data/pydicom/SC_rgb_dcmtk_+eb+cy+np.dcm",
    "dicom-test-files/data/WG04/J2KI/RG3_J2KI",
    *TYPED_FOR_DCMTK,
)


@dataclass(frozen=True)
class Comparison:
    """Largest difference of one file's first frame, in 255ths of the display range."""

    key: str
    difference: float


def compare(folder: Path, row: dict[str, Any], work: Path) -> Comparison | None:
    """None where the file is no picture of ours, or one that dcmtk cannot be given."""
    source = folder / row["path"]
    try:
        image = decode(source.read_bytes(), CONFIG)
    except DecodeError:
        return None
    if source.name in NOT_COMPARABLE or image.pixels.dtype.kind == "f":
        return None
    if image.pixels.ndim == 4:
        if row["ts"] in JPEG_2000:
            return None
        shown = dcm2pnm(source, row["ts"], ["--write-raw-pnm"], work)
        shown = shown[..., ::-1] if shown.ndim == 3 else shown[..., None]
        return Comparison(row["path"], float(np.abs(shown.astype(int) - image.pixels[0]).max()))
    display = replace(image.display_of(0), padding=None)
    scaling: Scaling
    option = ["--use-window", "1"]
    if display.voi_lut is not None:
        scaling, option = display.voi_lut, ["--use-voi-lut", "1"]
    elif display.window is not None:
        scaling = display.window
    else:
        values = modality_values(image.pixels[0], display)
        scaling, option = Bounds(float(values.min()), float(values.max())), ["--min-max-window"]
    given, syntax = for_dcmtk(source, row, image, work)
    shown = dcm2pnm(given, syntax, ["--no-overlays", *option, "--write-16-bit-pnm"], work)
    return Comparison(
        row["path"], float(np.abs(shown / 65535.0 - unit_values(image.pixels[0], display, scaling)).max() * 255)
    )


def for_dcmtk(source: Path, row: dict[str, Any], image: MedicalImage, work: Path) -> tuple[Path, str]:
    """The file in a form that dcmtk can show, and its transfer syntax."""
    copy = work / "given.dcm"
    syntax = row["ts"]
    if row["path"] in TYPED_FOR_DCMTK:
        subprocess.run(["dcmconv", "--convert-un", str(source), str(copy)], check=True, capture_output=True)
        source = copy
    dataset = pydicom.dcmread(source, force=True)
    if "SharedFunctionalGroupsSequence" in dataset:
        hoist(dataset)
    elif syntax not in JPEG_2000 and row["path"] not in UNCOMPRESSED_FOR_DCMTK:
        return source, syntax
    if syntax in JPEG_2000 or row["path"] in UNCOMPRESSED_FOR_DCMTK:
        stored = image.pixels[0]
        dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
        dataset["PixelData"].VR = "OW"
        dataset["PixelData"].is_undefined_length = False
        dataset.BitsAllocated = 8 * stored.itemsize
        syntax = dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.save_as(copy, enforce_file_format=True)
    return copy, syntax


def hoist(dataset: pydicom.Dataset) -> None:
    """The first frame's window and rescale at the top level: dcm2pnm does not look into functional groups."""
    groups = [*dataset.get("PerFrameFunctionalGroupsSequence", [])[:1], *dataset.SharedFunctionalGroupsSequence[:1]]
    for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
        macro = next((group[sequence].value[0] for group in groups if sequence in group), pydicom.Dataset())
        for keyword in ("RescaleIntercept", "RescaleSlope", "WindowCenter", "WindowWidth"):
            if keyword in macro:
                setattr(dataset, keyword, macro[keyword].value)


def dcm2pnm(source: Path, syntax: str | None, options: list[str], work: Path) -> np.ndarray[Any, Any]:
    tool = "dcmj2pnm" if syntax in JPEG else "dcml2pnm" if syntax in JPEG_LS else "dcm2pnm"
    out = work / "shown.pnm"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [tool, *options, "--frame", "1", str(source), str(out)], capture_output=True, text=True, check=False
    )
    shown = cv2.imread(str(out), cv2.IMREAD_UNCHANGED) if out.exists() else None
    assert shown is not None, (source.name, done.stderr)
    assert "cannot select" not in done.stderr, (source.name, done.stderr)
    return np.asarray(shown)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, (folder / "MANIFEST.jsonl").read_text().splitlines())
    return {row["path"]: row for row in rows if row["kind"] == "dicom"}


@needs_dcmtk
@pytest.mark.parametrize("key", SAMPLE)
def test_a_file_of_each_branch_is_shown_as_dcmtk_shows_it(corpora_dir: Path, tmp_path: Path, key: str) -> None:
    compared = compare(corpora_dir, manifest(corpora_dir)[key], tmp_path)
    assert compared is not None
    assert compared.difference <= 1.0


@needs_dcmtk
@pytest.mark.slow
def test_all_comparable_files_are_shown_as_dcmtk_shows_them(corpora_dir: Path, tmp_path: Path) -> None:
    compared = [compare(corpora_dir, row, tmp_path) for row in manifest(corpora_dir).values()]
    comparable = [one for one in compared if one is not None]
    apart = {Path(one.key).name: one.difference for one in comparable if one.difference > 1.0}
    print(f"{len(comparable)} files compared with dcmtk, {len(apart)} apart: {apart}")
    assert len(comparable) > 200
    assert len(apart) <= 0.01 * len(comparable)
    assert apart.keys() <= EXCEPTIONS.keys()


@needs_dcmtk
@pytest.mark.parametrize(
    "key", ["dicom-test-files/data/pydicom/CT_small.dcm", "highdicom/data/test_files/dx_image.dcm"]
)
def test_a_sigmoid_window_is_shown_as_dcmtk_shows_it(corpora_dir: Path, tmp_path: Path, key: str) -> None:
    """No corpus file has one: real pixels with a SIGMOID window set."""
    dataset = pydicom.dcmread(corpora_dir / key)
    dataset.VOILUTFunction = "SIGMOID"
    dataset.WindowCenter, dataset.WindowWidth = (40, 400) if dataset.Modality == "CT" else (2048, 1500)
    source = tmp_path / "sigmoid.dcm"
    dataset.save_as(source)
    image = decode(source.read_bytes(), CONFIG)
    window = image.display.window
    assert window is not None
    assert window.function is VoiFunction.SIGMOID
    shown = dcm2pnm(source, None, ["--use-window", "1", "--sigmoid-function", "--write-16-bit-pnm"], tmp_path)
    ours = unit_values(image.pixels[0], replace(image.display, padding=None), window)
    assert np.abs(shown / 65535.0 - ours).max() <= 1 / 255
