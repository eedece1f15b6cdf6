"""From a decoded image to the model's grid, and masks both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from medvision_ray.config import ClaheConfig, DecodeConfig, PreprocessConfig
from medvision_ray.imaging import preprocess
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.grid import fit
from medvision_ray.imaging.image import Display, MedicalImage, Window
from medvision_ray.imaging.preprocess import prepare, preprocess_id

SMALL = PreprocessConfig(size=(64, 64))


def raster(pixels: np.ndarray[Any, Any], **fields: Any) -> MedicalImage:
    return MedicalImage(pixels, source_format="png", **fields)


def test_padding_keeps_the_aspect_centred_on_black() -> None:
    prepared = prepare(raster(np.full((1, 100, 50), 200, np.uint8)), SMALL)
    assert prepared.pixels.shape == (1, 1, 64, 64)
    transform = prepared.transform
    assert (transform.top, transform.left, transform.height, transform.width) == (0, 16, 64, 32)
    expected = np.zeros((64, 64), np.uint8)
    expected[:, 16:48] = 200
    np.testing.assert_array_equal(prepared.pixels[0, 0], expected)


def test_stretching_fills_the_grid() -> None:
    prepared = prepare(raster(np.full((1, 100, 50), 200, np.uint8)), PreprocessConfig(size=(64, 32), resize="stretch"))
    assert (prepared.pixels == 200).all()


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (1, 1)])
def test_extreme_aspects_keep_a_pixel(shape: tuple[int, int]) -> None:
    assert prepare(raster(np.full((1, *shape), 255, np.uint8)), SMALL).pixels.max() > 0


def test_eight_bit_raster_images_are_shown_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(90, 110, (2, 64, 64), dtype=np.uint8)
    np.testing.assert_array_equal(prepare(raster(pixels), SMALL).pixels[:, 0], pixels)
    inverted = prepare(raster(pixels, display=Display(invert=True)), SMALL)
    np.testing.assert_array_equal(inverted.pixels[:, 0], 255 - pixels)


def test_ct_takes_its_window_in_hounsfield_units() -> None:
    stored = np.array([[[0, 864, 1064, 1264]]], np.uint16).repeat(4, axis=1)
    file_window = Display(intercept=-1024, window=Window(0, 10))
    image = MedicalImage(stored, modality="CT", display=file_window)
    shown = prepare(image, PreprocessConfig(size=(32, 32), resize="stretch", interpolation="area")).pixels[0, 0]
    assert shown[0, 0] == 0
    assert shown[0, -1] == 255
    assert shown[0].tolist() == sorted(shown[0].tolist())
    level = prepare(MedicalImage(np.full((1, 4, 4), 1064, np.uint16), modality="CT", display=file_window), SMALL)
    assert level.pixels.max() == 128  # 40 HU lies in the middle of 40/400


def test_ct_without_a_fixed_window_takes_the_files() -> None:
    display = Display(intercept=-1024, window=Window(100, 10))
    image = MedicalImage(np.full((1, 4, 4), 1064, np.uint16), modality="CT", display=display)
    assert prepare(image, SMALL.model_copy(update={"ct_window_hu": None})).pixels.max() == 0


def test_ct_from_a_raster_file_has_no_hounsfield_units() -> None:
    pixels = np.full((1, 64, 64), 77, np.uint8)
    assert (prepare(raster(pixels, modality="CT"), SMALL).pixels == 77).all()


def test_percentiles_are_of_the_whole_object_not_of_a_frame() -> None:
    pixels = np.zeros((2, 64, 64), np.uint16)
    pixels[0, :, 32:], pixels[1, :, 32:] = 1000, 500
    shown = prepare(MedicalImage(pixels, modality="MR"), PreprocessConfig(size=(64, 64), percentiles=(0, 100)))
    assert shown.pixels[0].max() == 255
    assert shown.pixels[1].max() == 128


def test_colour_becomes_luma_or_stays_and_grey_is_repeated() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    luma = colour[0] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(prepare(raster(colour), SMALL).pixels[0, 0] - luma).max() <= 1
    rgb = PreprocessConfig(size=(64, 64), color="rgb")
    np.testing.assert_array_equal(prepare(raster(colour), rgb).pixels[0], colour[0].transpose(2, 0, 1))
    grey = prepare(raster(colour[..., 0]), rgb).pixels[0]
    assert (grey == grey[0]).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("denoise", ["median", "tv"])
def test_denoising_takes_noise_away_and_keeps_the_level(denoise: str, kind: Any) -> None:
    noise = np.random.default_rng(0).normal(0, 10, (1, 64, 64))
    pixels = (np.clip(128 + noise, 0, 255) * (1 if kind == np.uint8 else 16)).astype(kind)
    image = MedicalImage(pixels, display=Display(window=Window(2048, 4096)), source_format="png")
    before = prepare(image, SMALL).pixels
    after = prepare(image, SMALL.model_copy(update={"denoise": denoise})).pixels
    assert after.std() < 0.6 * before.std()
    assert abs(float(after.mean()) - float(before.mean())) < 2


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 64, 64, 3)])
def test_clahe_spreads_a_narrow_range(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(100, 120, shape, dtype=np.uint8)
    config = PreprocessConfig(size=(64, 64), color="rgb", clahe=ClaheConfig(clip_limit=40.0))
    assert prepare(raster(pixels), config).pixels.std() > 2 * pixels.std()


def test_masks_go_to_the_model_and_back() -> None:
    mask = np.zeros((300, 200), np.uint8)
    cv2.circle(mask, (90, 170), 50, 1, -1)
    transform = fit(mask.shape, (64, 64), keep_aspect=True)
    there = transform.mask_to_model(mask)
    assert set(np.unique(there)) == {0, 1}
    for probability in (there.astype(np.float32), there * np.uint8(255)):
        back = transform.mask_to_source(probability, 0.5)
        assert back.shape == mask.shape
        assert 2 * (back & (mask > 0)).sum() / (back.sum() + mask.sum()) > 0.97


def test_a_mask_follows_its_image_into_the_grid() -> None:
    mask = np.zeros((100, 50), np.uint8)
    mask[20:60, 10:30] = 1
    prepared = prepare(raster(mask[None] * np.uint8(255)), SMALL)
    np.testing.assert_array_equal(prepared.transform.mask_to_model(mask), prepared.pixels[0, 0] >= 128)


def test_small_lesions_keep_a_pixel_each() -> None:
    mask = np.zeros((512, 512), bool)
    mask[100:102, 100:102] = mask[400, 37] = True
    mask[200:300, 200:300] = True
    there = fit(mask.shape, (64, 64), keep_aspect=True).mask_to_model(mask)
    assert there[12, 12] == 1
    assert there[50, 4] == 1
    assert cv2.connectedComponents(there)[0] - 1 == 3


def test_an_empty_mask_stays_empty() -> None:
    transform = fit((100, 50), (64, 64), keep_aspect=True)
    assert not transform.mask_to_model(np.zeros((100, 50), np.uint8)).any()
    assert not transform.mask_to_source(np.zeros((64, 64), np.float32), 0.5).any()


def test_a_mask_on_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        fit((100, 50), (64, 64), keep_aspect=True).mask_to_model(np.zeros((50, 100)))


def test_a_defect_is_an_error_of_the_preprocess_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(preprocess, "fit", fail)
    with pytest.raises(DecodeError) as caught:
        prepare(raster(np.zeros((1, 8, 8), np.uint8)), SMALL)
    assert (caught.value.code, caught.value.stage) == (ErrorCode.OUT_OF_MEMORY, Stage.PREPROCESS)


def test_the_id_changes_with_every_field_and_with_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    others: dict[str, Any] = {
        "size": (32, 64), "color": "rgb", "ct_window_hu": None, "use_file_window": False, "percentiles": (1.0, 99.0),
        "denoise": "tv", "clahe": ClaheConfig(), "resize": "stretch", "interpolation": "linear", "mean": (0.4,),
        "std": (0.4,), "slices": 3,
    }  # fmt: skip
    assert set(others) == set(PreprocessConfig.model_fields)
    configs = [PreprocessConfig(), *(PreprocessConfig(**{name: value}) for name, value in others.items())]
    ids = [preprocess_id(config) for config in configs]
    assert len(set(ids)) == len(ids)
    assert all(len(x) == 12 and set(x) <= set("0123456789abcdef") for x in ids)
    assert preprocess_id(PreprocessConfig()) == ids[0]
    monkeypatch.setattr(preprocess, "VERSION", preprocess.VERSION + 1)
    assert preprocess_id(PreprocessConfig()) != ids[0]


def test_real_chest_ct_is_prepared_with_air_black_and_bone_white(data_dir: Path) -> None:
    file = min((data_dir / "chest_ct_dicom").glob("*.dcm"))
    shown = prepare(decode(file.read_bytes(), DecodeConfig()), PreprocessConfig()).pixels
    assert shown.shape == (1, 1, 224, 224)
    assert (shown == 0).mean() > 0.2
    assert shown.max() == 255


def stack_of(frames: int, order: tuple[int, ...]) -> MedicalImage:
    """Frames that are grey all over, brighter by 10 from one to the next in the file."""
    values = np.arange(frames, dtype=np.uint8)[:, None, None] * 10
    pixels = np.broadcast_to(values, (frames, 32, 32)).copy()
    return MedicalImage(pixels=pixels, source_format="png", slice_order=order)


@pytest.mark.parametrize(
    ("order", "slices", "expected"),
    [
        ((0, 1, 2, 3), 3, [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]),
        ((0, 1, 2, 3), 5, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]),
        ((2, 0, 3, 1), 3, [[2, 0, 3], [3, 1, 1], [2, 2, 0], [0, 3, 1]]),  # neighbours in space, not in the file
        ((), 3, [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]),
    ],
)
def test_neighbouring_slices_are_channels(order: tuple[int, ...], slices: int, expected: list[list[int]]) -> None:
    config = PreprocessConfig(size=(32, 32), slices=slices)
    ready = prepare(stack_of(4, order), config)
    assert ready.pixels.shape == (4, slices, 32, 32)
    np.testing.assert_array_equal(ready.pixels[:, :, 7, 5], np.array(expected) * 10)


def test_one_slice_is_the_default_and_keeps_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PreprocessConfig().slices == 1
    monkeypatch.setattr("medvision_ray.imaging.preprocess.VERSION", 1)
    before_the_option_came = "79e7973a3940"
    assert preprocess_id(PreprocessConfig()) == preprocess_id(PreprocessConfig(slices=1)) == before_the_option_came
    assert (
        preprocess_id(PreprocessConfig(slices=3))
        != preprocess_id(PreprocessConfig(slices=5))
        != preprocess_id(PreprocessConfig())
    )


def test_neighbours_take_the_channels_of_colour() -> None:
    with pytest.raises(ValueError, match="needs `color: grey`"):
        PreprocessConfig(color="rgb", slices=3)
