"""PNG, JPEG, TIFF and BMP of every depth and mode, written by Pillow, OpenCV or tifffile."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import cv2
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


def pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    out = BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    return decode(data, CONFIG).pixels


def code_of(data: bytes, config: DecodeConfig = CONFIG) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        decode(data, config)
    return caught.value.code


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_eight_bit_grey_and_colour_come_back_as_written(kind: str) -> None:
    np.testing.assert_array_equal(pixels_of(pillow(Image.fromarray(GREY), kind)), GREY[None])
    np.testing.assert_array_equal(pixels_of(pillow(Image.fromarray(COLOUR), kind)), COLOUR[None])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG"])
def test_grey_content_in_colour_channels_is_grey(kind: str) -> None:
    image = decode(pillow(Image.fromarray(np.repeat(GREY[..., None], 3, axis=2)), kind), CONFIG)
    assert image.pixels.shape == (1, 24, 40)
    assert image.source_format == kind.lower()


def test_sixteen_bit_grey_keeps_its_depth() -> None:
    encoded = cv2.imencode(".png", DEEP)[1].tobytes()
    for data in (encoded, tiff(DEEP), tiff(DEEP, compression="zlib", predictor=True), tiff(DEEP, byteorder=">")):
        np.testing.assert_array_equal(pixels_of(data), DEEP[None])
        assert pixels_of(data).dtype == np.uint16


def test_sixteen_bit_colour_is_cut_to_eight() -> None:
    deep = np.random.default_rng(3).integers(0, 65536, (24, 40, 3), dtype=np.uint16)
    png = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    for data in (png, tiff(deep, photometric="rgb")):
        np.testing.assert_array_equal(pixels_of(data)[0], deep >> 8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(kind: str) -> None:
    expected = np.where(GREY > 127, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(pixels_of(pillow(Image.fromarray(GREY > 127), kind)), expected[None])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_palette_is_looked_up(kind: str) -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    np.testing.assert_array_equal(pixels_of(pillow(palette, kind))[0], np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_blended_on_black(kind: str) -> None:
    alpha = np.full((24, 40, 1), 255, np.uint8)
    alpha[:12] = 51
    expected = COLOUR.copy()
    expected[:12] = np.rint(COLOUR[:12] * 0.2)
    data = pillow(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)), kind)
    np.testing.assert_array_equal(pixels_of(data)[0], expected)
    grey = pillow(Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=2)), kind)
    np.testing.assert_array_equal(pixels_of(grey)[0][12:], GREY[12:])


def test_jpeg_colour_is_rgb_as_pillow_reads_it() -> None:
    smooth = cv2.resize(COLOUR, (80, 48), interpolation=cv2.INTER_CUBIC)
    data = pillow(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0)
    difference = pixels_of(data)[0].astype(int) - np.asarray(Image.open(BytesIO(data))).astype(int)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_jpeg_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = pillow(Image.fromarray(cv2.resize(GREY, (80, 48))), "JPEG", exif=exif)
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))).astype(int)
    assert np.abs(pixels_of(data)[0] - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied(orientation: int) -> None:
    data = tiff(GREY, extratags=[(274, "H", 1, orientation, True)])
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    np.testing.assert_array_equal(pixels_of(data)[0], expected)


def test_a_white_is_zero_tiff_is_shown_inverted() -> None:
    image = decode(tiff(GREY, photometric="miniswhite"), CONFIG)
    assert image.display.invert
    np.testing.assert_array_equal(image.pixels[0], GREY)


def test_tiff_pages_are_frames_and_pages_of_other_sizes_are_refused() -> None:
    stack = np.random.default_rng(4).integers(0, 256, (3, 24, 40), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(tiff(stack, photometric="minisblack")), stack)
    out = BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(GREY)
        writer.write(GREY[:10])
    assert code_of(out.getvalue()) is ErrorCode.UNSUPPORTED_SHAPE


def test_float_tiff_keeps_its_values() -> None:
    values = np.random.default_rng(5).normal(size=(24, 40)).astype(np.float32)
    np.testing.assert_array_equal(pixels_of(tiff(values))[0], values)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = pillow(Image.fromarray(COLOUR), kind)
    assert code_of(data[: int(len(data) * share)]) in (ErrorCode.TRUNCATED, ErrorCode.CORRUPT)


def test_a_jpeg_with_a_thumbnail_but_without_its_own_end_is_truncated() -> None:
    exif = Image.Exif()
    exif[270] = "x"
    data = pillow(Image.fromarray(COLOUR), "JPEG", exif=exif)
    inside = data.replace(b"Exif\0\0", b"Exif\xff\xd9", 1)
    assert code_of(inside[:-2]) is ErrorCode.TRUNCATED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_dimensions_over_the_limit_are_refused_before_decoding(kind: str) -> None:
    data = pillow(Image.new("L", (400, 300)), kind)
    assert code_of(data, DecodeConfig(max_frame_pixels=100_000)) is ErrorCode.TOO_LARGE
