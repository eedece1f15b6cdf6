"""Files made to hurt: each gets its code at once, and in a child process whose peak memory is read from the kernel.

The small ones lie in `corpora/bombs`; the large ones are made here. None is as large on disk as what it asks for.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

BOMBS = {
    "big.png": ErrorCode.TOO_LARGE,
    "dims_huge.nii": ErrorCode.TOO_LARGE,
    "dims_huge.nii.gz": ErrorCode.TOO_LARGE,
    "dims_neg.nii": ErrorCode.BAD_DIMENSIONS,
    "frames2e9_j2k.dcm": ErrorCode.TOO_LARGE,
    "frames2e9_native.dcm": ErrorCode.TOO_LARGE,
    "hdr65535_j2k.dcm": ErrorCode.BAD_DIMENSIONS,
    "imagecodecs_dicomrle_segv.dcm": ErrorCode.CORRUPT,
    "j2k_20k.dcm": ErrorCode.TOO_LARGE,
    "j2k_mismatch.dcm": ErrorCode.DIMENSION_MISMATCH,
    "j2k_siz_bomb.dcm": ErrorCode.DIMENSION_MISMATCH,
    "j2k_tiles1.dcm": ErrorCode.DECOMPRESSION_BOMB,
    "jls_20k.dcm": ErrorCode.TOO_LARGE,
    "jls_mismatch.dcm": ErrorCode.DIMENSION_MISMATCH,
    "len2g.dcm": ErrorCode.TRUNCATED,
    "nest500.dcm": ErrorCode.CORRUPT,
    "rle65535.dcm": ErrorCode.BAD_DIMENSIONS,
    "vox_nan.nii": ErrorCode.TOO_LARGE,
}
PEAK_BYTES = 64 << 20
CPU_SECONDS = 10.0
ZEROS = 1 << 20

CHILD = """
import json, resource, sys, time
from pathlib import Path
from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
decode(Path(sys.argv[1]).read_bytes(), DecodeConfig())
for path in sys.argv[2:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        decode(Path(path).read_bytes(), DecodeConfig())
        code = "ok"
    except DecodeError as error:
        code = error.code.value
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([Path(path).name, code, (used.ru_maxrss - before) * 1024, time.process_time() - start]))
"""


def in_child(paths: list[Path]) -> dict[str, tuple[str, int, float]]:
    """Code, growth of the peak resident size in bytes, and CPU seconds of each file, all in one process."""
    command = [sys.executable, "-c", CHILD, str(get_testdata_file("CT_small.dcm")), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (code, grown, seconds) for name, code, grown, seconds in rows}


def saved(dataset: pydicom.Dataset) -> bytes:
    out = BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def ct() -> pydicom.FileDataset:
    return pydicom.dcmread(get_testdata_file("CT_small.dcm"))


def deflated_zeros(count: int) -> bytes:
    """Raw deflate blocks that inflate to `count` MiB of zeros, without ever holding them; no last block."""
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return (deflater.compress(bytes(ZEROS)) + deflater.flush(zlib.Z_FULL_FLUSH)) * count


def deflated_dicom() -> bytes:
    """A Deflated Explicit VR object with 3 GiB of zeros after its pixels."""
    whole = Path(str(get_testdata_file("image_dfl.dcm"))).read_bytes()
    start = len(whole) - len(zlib_body(whole))
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    header = deflater.compress(zlib.decompress(whole[start:], -zlib.MAX_WBITS)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return whole[:start] + header + deflated_zeros(3072) + b"\x03\x00"


def zlib_body(whole: bytes) -> bytes:
    length = int.from_bytes(whole[140:144], "little")  # of the file meta group
    return whole[144 + length :]


def nifti_header(shape: tuple[int, int, int], vox_offset: float = 352.0) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, vox_offset)
    header[344:348] = b"n+1\0"
    return bytes(header)


def gzip_nifti(header: bytes) -> bytes:
    """4 GiB of zeros after a NIfTI header."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    start = deflater.compress(header) + deflater.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + start + deflated_zeros(4096) + b"\x03\x00" + bytes(8)


def tiny_frames() -> bytes:
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
    dataset.NumberOfFrames = 50_000
    dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(140)] * 50_000, has_bot=False)
    dataset["PixelData"].is_undefined_length = True
    return saved(dataset)


def nested(tag: bytes) -> bytes:
    """100,000 sequences within one another, before the pixels."""
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    del dataset.PixelData
    item = tag + b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0" + b"\xff\xff\xff\xff"
    return saved(dataset) + item * 100_000


def jpeg(rows: int, columns: int) -> bytes:
    """A grey JPEG of any height: one row of blocks, repeated between restart markers."""
    strip = cv2.imencode(".jpg", np.full((8, columns), 77, np.uint8))[1].tobytes()
    frame, scan = strip.index(b"\xff\xc0"), strip.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(strip[scan + 2 : scan + 4], "big")
    coded = strip[start : strip.rindex(b"\xff\xd9")]
    count = rows // 8
    interval = b"\xff\xdd\x00\x04" + struct.pack(">H", -(-columns // 8))
    tall = strip[: frame + 5] + struct.pack(">H", rows) + strip[frame + 7 : scan]
    body = b"".join(coded + bytes([0xFF, 0xD0 + index % 8]) for index in range(count - 1)) + coded
    return tall + interval + strip[scan:start] + body + b"\xff\xd9"


def jpeg_in_dicom(side: int) -> bytes:
    dataset = pydicom.dcmread(get_testdata_file("JPEG-lossy.dcm"))
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    dataset.Rows = dataset.Columns = side
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = encapsulate([jpeg(20_000, 20_000)])
    return saved(dataset)


def tiff_strip() -> bytes:
    """A TIFF of 24 x 40 pixels whose strip inflates to 1 GiB."""
    out = BytesIO()
    tifffile.imwrite(out, np.zeros((24, 40), np.uint8), compression="zlib")
    data = bytearray(out.getvalue())
    page = tifffile.TiffFile(BytesIO(bytes(data))).pages[0]
    bomb = b"\x78\xda" + deflated_zeros(1024) + b"\x03\x00" + bytes(4)
    for tag, value in ((273, len(data)), (279, len(bomb))):
        entry = page.tags[tag]
        struct.pack_into("<HII", data, entry.offset + 2, 4, 1, value)
    return bytes(data) + bomb


def segmented_palette() -> bytes:
    dataset = ct()
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [0, 0, 16])
        segments = np.array([0, 1, 1, *[1, 65535, 2] * 100_000], "<u2").tobytes()
        setattr(dataset, f"Segmented{colour}PaletteColorLookupTableData", segments)
    return saved(dataset)


def frames_of_ct(count: int) -> bytes:
    dataset = ct()
    dataset.NumberOfFrames, dataset.PixelData = count, dataset.PixelData * count
    return saved(dataset)


def tiled_j2k() -> bytes:
    """Two tiles side by side, spliced from two codestreams: nothing at hand writes tiles (ISO 15444-1, annex A)."""
    dataset = pydicom.dcmread(get_testdata_file("JPEG2000.dcm"))
    dataset.PixelRepresentation = 0
    rows, half = int(dataset.Rows), int(dataset.Columns) // 2
    dataset.Columns = 2 * half
    left, right = (
        bytes(imagecodecs.jpeg2k_encode(np.full((rows, half), value, np.uint16), codecformat="j2k", level=0))
        for value in (100, 200)
    )
    start = left.index(b"\xff\x90")  # the first tile part
    size = left.index(b"\xff\x51")
    header = left[: size + 6] + struct.pack(">I", 2 * half) + left[size + 10 : start]
    tile = right[right.index(b"\xff\x90") :]
    second = tile[:4] + struct.pack(">H", 1) + tile[6:]
    dataset.PixelData = encapsulate([header + left[start:-2] + second])
    return saved(dataset)


def deflated_ct() -> bytes:
    """Fits the limits on pixels; a megabyte of something else does not."""
    dataset = ct()
    dataset.Rows = dataset.Columns = 16
    dataset.PixelData = bytes(512)
    dataset.add_new((0x0009, 0x0010), "LO", "PRIVATE")
    dataset.add_new((0x0009, 0x1001), "OB", bytes(1 << 20))
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    return saved(dataset)


MADE: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflate_3g.dcm": (deflated_dicom, "decompression_bomb"),
    "zeros_4g.nii.gz": (lambda: gzip_nifti(nifti_header((2048, 1024, 1024))), "too_large"),
    "offset_3g.nii.gz": (lambda: gzip_nifti(nifti_header((64, 64, 64), float(3 << 30))), "decompression_bomb"),
    "frames_50000.dcm": (tiny_frames, "too_large"),
    "nested_100000_wanted.dcm": (lambda: nested(b"\x00\x52\x29\x92"), "corrupt"),
    "nested_100000_other.dcm": (lambda: nested(b"\xe1\x7f\x10\x10"), "corrupt"),
    "jpeg_20k.jpg": (lambda: jpeg(20_000, 20_000), "too_large"),
    "jpeg_20k.dcm": (lambda: jpeg_in_dicom(20_000), "too_large"),
    "jpeg_mismatch.dcm": (lambda: jpeg_in_dicom(64), "dimension_mismatch"),
    "strip_1g.tif": (tiff_strip, "corrupt"),
    "segments.dcm": (segmented_palette, "ok"),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_has_its_code(corpora_dir: Path, name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode((corpora_dir / "bombs" / name).read_bytes(), DecodeConfig())
    assert caught.value.code is BOMBS[name]


def test_the_bombs_of_the_corpora_take_no_memory_and_no_time(corpora_dir: Path) -> None:
    paths = sorted((corpora_dir / "bombs").iterdir())
    assert {path.name for path in paths} == set(BOMBS)
    for name, (code, grown, seconds) in in_child(paths).items():
        assert code == BOMBS[name].value, name
        assert grown < PEAK_BYTES, (name, grown)
        assert seconds < CPU_SECONDS, (name, seconds)


def test_the_large_bombs_take_no_memory_and_no_time(tmp_path: Path) -> None:
    for name, (make, _) in MADE.items():
        (tmp_path / name).write_bytes(make())
    found = in_child([tmp_path / name for name in MADE])
    assert {name: code for name, (code, _, _) in found.items()} == {name: code for name, (_, code) in MADE.items()}
    for name, (_, grown, seconds) in found.items():
        assert grown < PEAK_BYTES, (name, grown)
        assert seconds < CPU_SECONDS, (name, seconds)


def test_the_tall_jpeg_of_these_tests_is_a_sound_one() -> None:
    pixels = decode(jpeg(160, 200), DecodeConfig()).pixels
    assert pixels.shape == (1, 160, 200)
    assert np.unique(pixels).tolist() == [77]


def test_the_tiles_of_these_tests_are_sound() -> None:
    pixels = decode(tiled_j2k(), DecodeConfig()).pixels
    columns = pixels.shape[2]
    assert np.unique(pixels[:, :, : columns // 2]).size == np.unique(pixels[:, :, columns // 2 :]).size == 1
    assert pixels[0, 0, -1] - pixels[0, 0, 0] == 100


@pytest.mark.parametrize(
    ("limits", "make", "code"),
    [
        ({"max_bytes": 1000}, lambda: saved(ct()), ErrorCode.TOO_LARGE),
        ({"max_frame_pixels": 16_383}, lambda: saved(ct()), ErrorCode.TOO_LARGE),
        ({"max_decoded_bytes": 32_767}, lambda: saved(ct()), ErrorCode.TOO_LARGE),
        ({"max_frames": 2}, lambda: frames_of_ct(3), ErrorCode.TOO_LARGE),
        ({"max_tiles": 1}, tiled_j2k, ErrorCode.DECOMPRESSION_BOMB),
        ({"max_decoded_bytes": 100_000}, deflated_ct, ErrorCode.DECOMPRESSION_BOMB),
    ],
)
def test_each_limit_of_the_configuration_has_its_code(
    limits: dict[str, Any], make: Callable[[], bytes], code: ErrorCode
) -> None:
    data = make()
    decode(data, DecodeConfig())
    with pytest.raises(DecodeError) as caught:
        decode(data, DecodeConfig(**limits))
    assert caught.value.code is code
