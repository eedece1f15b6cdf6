"""The rarer modes of PNG, BMP, TIFF and JPEG: by their specifications, and beside Pillow where Pillow follows them."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode

CONFIG = DecodeConfig()
GREY = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (24, 40), dtype=np.uint16)
SMOOTH = cv2.resize(COLOUR[:4, :6], (96, 64), interpolation=cv2.INTER_LINEAR)

Array = np.ndarray[Any, Any]


def pixels_of(data: bytes) -> Array:
    pixels = decode(data, CONFIG).pixels
    assert pixels.shape[0] == 1
    return pixels[0]


def code_of(data: bytes) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        decode(data, CONFIG)
    return caught.value.code


def by_pillow(data: bytes) -> Array:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def png(rows: list[bytes], width: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of unfiltered rows, with chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    packed = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def packed_rows(values: Array, bits: int) -> list[bytes]:
    spread = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :]
    return [np.packbits(row.ravel()).tobytes() for row in spread]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_is_scaled_to_the_full_range(bits: int) -> None:
    values = GREY >> (8 - bits)
    rows = packed_rows(values, bits)
    scale = 255 // ((1 << bits) - 1)
    np.testing.assert_array_equal(pixels_of(png(rows, 40, bits, 0)), values * scale)
    palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), dtype=np.uint8)
    found = pixels_of(png(rows, 40, bits, 3, (b"PLTE", palette.tobytes())))
    np.testing.assert_array_equal(found, palette[values])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_an_inverted_palette_is_looked_up_and_not_taken_for_grey_values(bits: int) -> None:
    values = GREY >> (8 - bits)
    scale = 255 // ((1 << bits) - 1)
    palette = np.repeat((255 - np.arange(1 << bits) * scale).astype(np.uint8)[:, None], 3, axis=1)
    found = pixels_of(png(packed_rows(values, bits), 40, bits, 3, (b"PLTE", palette.tobytes())))
    np.testing.assert_array_equal(found, 255 - values * scale)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_value_of_png_is_black(bits: int) -> None:
    values = DEEP if bits == 16 else GREY >> (8 - bits)
    rows = [row.astype(">u2").tobytes() for row in DEEP] if bits == 16 else packed_rows(values, bits)
    clear = int(values[0, 0]) or 1
    scale = 1 if bits == 16 else 255 // ((1 << bits) - 1)
    found = pixels_of(png(rows, 40, bits, 0, (b"tRNS", struct.pack(">H", clear))))
    np.testing.assert_array_equal(found, np.where(values == clear, 0, values * np.uint16(scale)))


def test_grey_and_alpha_of_16_bits_keeps_its_depth() -> None:
    alpha = np.roll(DEEP, 3)
    rows = [row.astype(">u2").tobytes() for row in np.dstack([DEEP, alpha])]
    np.testing.assert_array_equal(pixels_of(png(rows, 40, 16, 4)), np.rint(DEEP * (alpha / 65535)).astype(np.uint16))


def test_a_gamma_chunk_changes_no_value() -> None:
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_array_equal(pixels_of(png([row.tobytes() for row in GREY], 40, 8, 0, gamma)), GREY)


def test_an_animation_is_its_first_picture() -> None:
    out = BytesIO()
    Image.fromarray(COLOUR).save(out, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    np.testing.assert_array_equal(pixels_of(out.getvalue()), COLOUR)


def bmp(
    rows: Array,
    bits: int,
    *,
    masks: tuple[int, ...] = (),
    palette: bytes = b"",
    compression: int = 0,
    top_down: bool = False,
) -> bytes:
    lines = rows if top_down else rows[::-1]
    body = b"".join(line.tobytes().ljust((len(line.tobytes()) + 3) // 4 * 4, b"\0") for line in lines)
    extra = struct.pack(f"<{len(masks)}I", *masks) + palette
    height = -len(rows) if top_down else len(rows)
    header = struct.pack("<IiiHHIIiiII", 40, 40, height, 1, bits, compression, len(body), 0, 0, len(palette) // 4, 0)
    offset = 14 + len(header) + len(extra)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + extra + body


@pytest.mark.parametrize(
    ("masks", "layout"),
    [((), (5, 5, 5)), ((0xF800, 0x07E0, 0x001F), (5, 6, 5)), ((0x7C00, 0x03E0, 0x001F), (5, 5, 5))],
)
def test_bmp_of_16_bits_reaches_white(masks: tuple[int, ...], layout: tuple[int, ...]) -> None:
    data = bmp(DEEP, 16, masks=masks, compression=3 if masks else 0)
    shifts = (sum(layout[1:]), layout[2], 0)
    parts = [
        (DEEP >> shift & ((1 << bits) - 1)) / ((1 << bits) - 1) for bits, shift in zip(layout, shifts, strict=True)
    ]
    found = pixels_of(data)
    np.testing.assert_array_equal(found, np.rint(np.dstack(parts) * 255))
    assert np.abs(found.astype(int) - by_pillow(data)).max() <= 1
    assert found.max() == 255


@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_of_32_bits_follows_its_masks(top_down: bool) -> None:
    cells = np.dstack([COLOUR, GREY])
    np.testing.assert_array_equal(pixels_of(bmp(cells, 32, top_down=top_down)), COLOUR[..., ::-1])
    masks = (0xFF, 0xFF00, 0xFF0000)
    np.testing.assert_array_equal(pixels_of(bmp(cells, 32, masks=masks, compression=3, top_down=top_down)), COLOUR)


def test_bmp_palettes_of_1_4_and_8_bits_are_looked_up() -> None:
    for bits in (1, 4, 8):
        values = GREY >> (8 - bits)
        palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 4), dtype=np.uint8)
        rows = np.array([np.frombuffer(row, np.uint8) for row in packed_rows(values, bits)])
        np.testing.assert_array_equal(
            pixels_of(bmp(rows, bits, palette=palette.tobytes())), palette[values][..., 2::-1]
        )


def test_run_length_bmp_is_decoded_and_refused_where_it_is_cut() -> None:
    runs = b"".join(b"".join(bytes([1, value]) for value in row.tolist()) + b"\0\0" for row in GREY[::-1]) + b"\0\1"
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1).tobytes()
    whole = bmp(GREY, 8, palette=palette, compression=1)
    data = whole[: -GREY.size] + runs
    np.testing.assert_array_equal(pixels_of(data), GREY)
    assert code_of(data[: len(data) // 2]) is ErrorCode.CORRUPT


def tiff(pixels: Array, **options: Any) -> bytes:
    out = BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "f2", "f4", "f8"])
@pytest.mark.parametrize("tiled", [False, True])
def test_tiff_of_every_depth_in_strips_and_tiles(kind: str, tiled: bool) -> None:
    values = np.tile(DEEP.astype(kind) if kind[0] != "f" else (DEEP / 7).astype(kind), (3, 2))
    data = tiff(values, compression="zlib", predictor=True, **({"tile": (32, 32)} if tiled else {"rowsperstrip": 7}))
    np.testing.assert_array_equal(pixels_of(data), values)


@pytest.mark.parametrize("compression", ["lzw", "packbits", "zlib", None])
def test_tiff_by_plane_is_colour(compression: str | None) -> None:
    data = tiff(np.moveaxis(COLOUR, -1, 0), photometric="rgb", planarconfig="separate", compression=compression)
    np.testing.assert_array_equal(pixels_of(data), COLOUR)


@pytest.mark.parametrize(
    "options",
    [{"photometric": "ycbcr"}, {"photometric": "ycbcr", "tile": (32, 32)}, {"photometric": "rgb", "rowsperstrip": 16}],
)
def test_jpeg_in_tiff_is_what_pillow_reads(options: dict[str, Any]) -> None:
    data = tiff(SMOOTH, compression="jpeg", compressionargs={"level": 95}, **options)
    np.testing.assert_array_equal(pixels_of(data), by_pillow(data))


def test_jpeg_in_tiff_with_tables_of_its_own_and_in_grey(tmp_path: Any) -> None:
    out = BytesIO()
    Image.fromarray(SMOOTH).save(out, "TIFF", compression="jpeg", quality=95)
    np.testing.assert_array_equal(pixels_of(out.getvalue()), by_pillow(out.getvalue()))
    grey = tiff(SMOOTH[..., 0], compression="jpeg")
    np.testing.assert_array_equal(pixels_of(grey), np.asarray(Image.open(BytesIO(grey))))


def test_jpeg_in_tiff_is_held_against_its_strip_and_its_end() -> None:
    data = tiff(GREY, compression="jpeg")
    frame = data.index(b"\xff\xc0")
    lying = data[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + data[frame + 9 :]
    assert code_of(lying) is ErrorCode.DIMENSION_MISMATCH
    end = data.rindex(b"\xff\xd9")
    assert code_of(data[:end] + b"\0\0" + data[end + 2 :]) is ErrorCode.TRUNCATED


@pytest.mark.parametrize("compression", ["zstd", "lzma", "webp", "jpeg2000"])
def test_other_codecs_in_tiff_are_an_unsupported_encoding(compression: str) -> None:
    assert code_of(tiff(COLOUR, photometric="rgb", compression=compression)) is ErrorCode.UNSUPPORTED_ENCODING


def test_cmyk_tiff_is_an_unsupported_encoding() -> None:
    data = tiff(np.dstack([COLOUR, GREY]), photometric="separated")
    assert code_of(data) is ErrorCode.UNSUPPORTED_ENCODING


def test_each_kind_of_fourth_channel_of_tiff_is_what_it_says() -> None:
    four = np.dstack([np.minimum(COLOUR, GREY[..., None]), GREY])
    blended = np.rint(four[..., :3] * (GREY[..., None] / 255)).astype(np.uint8)
    for kind, expected in (("unassalpha", blended), ("assocalpha", four[..., :3]), ("unspecified", four[..., :3])):
        np.testing.assert_array_equal(pixels_of(tiff(four, photometric="rgb", extrasamples=[kind])), expected)


def test_a_tiff_of_more_channels_than_a_picture_has_is_an_unsupported_shape() -> None:
    data = tiff(COLOUR, photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * 2)
    assert code_of(data) is ErrorCode.UNSUPPORTED_SHAPE


def test_an_inverted_palette_of_tiff_is_eight_bits_deep() -> None:
    ramp = 65535 - np.arange(256, dtype=np.uint16) * 257
    found = pixels_of(tiff(GREY, photometric="palette", colormap=np.repeat(ramp[None], 3, axis=0)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, 255 - GREY)


@pytest.mark.parametrize("reduced", [False, True])
def test_a_ring_of_tiff_directories_is_corrupt_and_no_endless_loop(reduced: bool) -> None:
    data = bytearray(tiff(np.stack([GREY, GREY]), photometric="minisblack", subfiletype=int(reduced)))
    first, last = (page.offset for page in tifffile.TiffFile(BytesIO(bytes(data))).pages)
    count = struct.unpack_from("<H", data, last)[0]
    struct.pack_into("<I", data, last + 2 + 12 * count, first)
    assert code_of(bytes(data)) is ErrorCode.CORRUPT


@pytest.mark.parametrize("space", ["CMYK", "YCCK"])
def test_cmyk_jpeg_is_shown_as_pillow_shows_it(space: str) -> None:
    four = np.dstack([SMOOTH, 255 - SMOOTH[..., 0] // 2])
    data = imagecodecs.jpeg8_encode(four, level=98, colorspace="CMYK", outcolorspace=space)
    assert np.abs(pixels_of(data).astype(int) - by_pillow(data)).max() <= 2


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True, "subsampling": 0}, {"subsampling": 2}])
def test_jpeg_of_every_process_is_what_pillow_reads(options: dict[str, Any]) -> None:
    out = BytesIO()
    Image.fromarray(SMOOTH).save(out, "JPEG", quality=95, **options)
    assert np.abs(pixels_of(out.getvalue()).astype(int) - by_pillow(out.getvalue())).max() <= 1


def test_lossless_and_12_bit_jpeg_keep_their_depth() -> None:
    np.testing.assert_array_equal(
        pixels_of(imagecodecs.jpeg8_encode(DEEP >> 4, bitspersample=12, lossless=True)), DEEP >> 4
    )
    smooth = cv2.resize(DEEP[:4, :6] >> 4, (96, 64), interpolation=cv2.INTER_LINEAR)
    found = pixels_of(imagecodecs.jpeg8_encode(smooth, level=98, bitspersample=12))
    assert found.dtype == np.uint16
    assert np.abs(found.astype(int) - smooth).max() < 64
