"""Which decoder handles which transfer syntax is written in `codecs.FAMILIES` and hangs on nothing that is installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging import codecs
from medvision_ray.imaging.codecs import FAMILIES, Family
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

CONFIG = DecodeConfig()

# pydicom takes python-gdcm before every other plugin; this one is there, new enough, and fatal to whoever uses it.
GDCM = """
import os
class Version:
    @staticmethod
    def GetVersion():
        return "3.2.6"
class DataElement:
    def __init__(self, *_):
        os._exit(86)
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    os._exit(86)
"""
CHILD = """
import hashlib, sys
import gdcm, pydicom
from pydicom.pixels import get_decoder
from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
assert "gdcm" in get_decoder("1.2.840.10008.1.2.4.70").available_plugins, "the impostor is not found"
for path in sys.argv[2:]:
    pixels = decode(open(path, "rb").read(), DecodeConfig()).pixels
    print(hashlib.sha1(pixels.tobytes()).hexdigest(), flush=True)
if sys.argv[1] == "pydicom":
    pydicom.dcmread(sys.argv[2]).pixel_array
"""
COMPRESSED = [
    "JPEG2000.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "MR_small_RLE.dcm",
    "JPEG-lossy.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
]


def run(folder: Path, user: str) -> subprocess.CompletedProcess[str]:
    (folder / "gdcm.py").write_text(GDCM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    paths = [str(get_testdata_file(name)) for name in COMPRESSED]
    command = [sys.executable, "-c", CHILD, user, *paths]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path.cwd())


def test_an_installed_gdcm_is_never_asked(tmp_path: Path) -> None:
    done = run(tmp_path, "medvision_ray")
    assert done.returncode == 0, done.stderr
    here = [decode(Path(str(get_testdata_file(name))).read_bytes(), CONFIG).pixels for name in COMPRESSED]
    assert done.stdout.split() == [hashlib.sha1(pixels.tobytes()).hexdigest() for pixels in here]


def test_pydicom_itself_would_have_asked_it(tmp_path: Path) -> None:
    """Without this the test above would prove nothing."""
    done = run(tmp_path, "pydicom")
    assert len(done.stdout.split()) == len(COMPRESSED)
    assert done.returncode == 86


@pytest.mark.parametrize(
    ("family", "codec"),
    [
        (Family.JPEG, "jpeg8_decode"),
        (Family.JPEG_LS, "jpegls_decode"),
        (Family.JPEG_2000, "jpeg2k_decode"),
        (Family.RLE, "decode_rle"),
    ],
)
def test_each_family_has_its_one_codec(monkeypatch: pytest.MonkeyPatch, family: Family, codec: str) -> None:
    files = {
        Family.JPEG: "JPEG-lossy.dcm",
        Family.JPEG_LS: "MR_small_jpeg_ls_lossless.dcm",
        Family.JPEG_2000: "JPEG2000.dcm",
        Family.RLE: "MR_small_RLE.dcm",
    }

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(codecs if codec == "decode_rle" else codecs.imagecodecs, codec, gone)
    for other, name in files.items():
        data = Path(str(get_testdata_file(name))).read_bytes()
        if other is not family:
            assert decode(data, CONFIG).pixels.any()
            continue
        with pytest.raises(DecodeError) as caught:
            decode(data, CONFIG)
        assert caught.value.code is ErrorCode.CORRUPT


def test_the_table_holds_every_syntax_of_the_documentation() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "imaging.md").read_text()
    for syntax, family in FAMILIES.items():
        short = syntax.removeprefix("1.2.840.10008.1.2.")
        assert f"`{short}`" in documented, (syntax, family)


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg_dcmtk.dcm"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_jpeg_cut_anywhere_is_truncated_whatever_its_process(name: str, share: float) -> None:
    dataset = pydicom.dcmread(get_testdata_file(name))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    dataset.PixelData = encapsulate([frame[: int(len(frame) * share)]])
    out = BytesIO()
    dataset.save_as(out)
    with pytest.raises(DecodeError) as caught:
        decode(out.getvalue(), CONFIG)
    assert caught.value.code in (ErrorCode.TRUNCATED, ErrorCode.CORRUPT)
    if share >= 0.9:
        assert caught.value.code is ErrorCode.TRUNCATED


def test_a_cut_jpeg_would_have_decoded_without_the_check() -> None:
    """libjpeg-turbo fills the rest with grey and says nothing."""
    dataset = pydicom.dcmread(get_testdata_file("JPEG-lossy.dcm"))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    whole = codecs.imagecodecs.jpeg8_decode(frame)
    cut = codecs.imagecodecs.jpeg8_decode(frame[: int(len(frame) * 0.7)])
    assert cut.shape == whole.shape
    assert not np.array_equal(cut, whole)
