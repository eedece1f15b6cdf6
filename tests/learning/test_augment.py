"""Augmentation: image and mask move together, by the seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from medvision_ray.config import AugmentConfig
from medvision_ray.learning.augment import build_augment

SIZE = (64, 64)
NOTHING = {
    "horizontal_flip": 0.0,
    "rotate_degrees": 0.0,
    "translate": 0.0,
    "scale": (1.0, 1.0),
    "brightness": 0.0,
    "contrast": 0.0,
}


def squares(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright square on black, off the centre, and its mask."""
    masks = torch.zeros(n, *SIZE, dtype=torch.uint8)
    masks[:, 18:40, 12:30] = 1
    return masks.unsqueeze(1) * 200, masks


def test_the_mask_moves_with_its_image() -> None:
    images, masks = squares()
    moved_images, moved_masks = build_augment(AugmentConfig(brightness=0.0, contrast=0.0), SIZE)(images, masks, 7)
    assert moved_masks is not None
    assert not torch.equal(moved_masks, masks)
    bright = moved_images[:, 0] > 100
    overlap = (bright & (moved_masks > 0)).sum() / (bright | (moved_masks > 0)).sum()
    assert overlap > 0.97  # bilinear against nearest: the outline may differ by a pixel here and there


def test_masks_keep_their_values_and_types_stay() -> None:
    images, masks = squares()
    moved_images, moved_masks = build_augment(AugmentConfig(rotate_degrees=30.0), SIZE)(images, masks * 255, 3)
    assert moved_masks is not None
    assert set(moved_masks.unique().tolist()) == {0, 255}
    assert moved_images.dtype == moved_masks.dtype == torch.uint8
    assert (moved_images.shape, moved_masks.shape) == (images.shape, masks.shape)
    assert type(moved_images) is type(moved_masks) is torch.Tensor


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    images, masks = squares()
    augment = build_augment(AugmentConfig(), SIZE)
    state = torch.get_rng_state()
    first, again, other = (augment(images, masks, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_each_image_of_a_batch_has_its_own_draw() -> None:
    images, masks = squares()
    moved, _ = build_augment(AugmentConfig(), SIZE)(images, masks, 1)
    assert len({image.numpy().tobytes() for image in moved}) == len(images)


def test_without_any_amount_a_batch_comes_back_as_it_was() -> None:
    images, masks = squares()
    moved_images, moved_masks = build_augment(AugmentConfig.model_validate(NOTHING), SIZE)(images, masks, 1)
    assert torch.equal(moved_images, images)
    assert moved_masks is not None
    assert torch.equal(moved_masks, masks)


def test_brightness_changes_the_image_and_not_the_mask() -> None:
    images, masks = squares()
    config = AugmentConfig.model_validate({**NOTHING, "brightness": 0.5})
    moved_images, moved_masks = build_augment(config, SIZE)(images, masks, 1)
    assert not torch.equal(moved_images, images)
    assert moved_masks is not None
    assert torch.equal(moved_masks, masks)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_rgb_images_without_masks_work(channels: int) -> None:
    images = torch.randint(0, 256, (2, channels, *SIZE), dtype=torch.uint8)
    moved, masks = build_augment(AugmentConfig(vertical_flip=1.0), SIZE)(images, None, 1)
    assert moved.shape == images.shape
    assert masks is None


def test_a_certain_vertical_flip_is_torchs_flip() -> None:
    images, masks = squares()
    config = AugmentConfig.model_validate({**NOTHING, "vertical_flip": 1.0})
    moved_images, moved_masks = build_augment(config, SIZE)(images, masks, 1)
    assert torch.equal(moved_images, images.flip(-2))
    assert moved_masks is not None
    assert torch.equal(moved_masks, masks.flip(-2))


def _one_after_another(config: AugmentConfig, images: torch.Tensor, masks: torch.Tensor, seed: int) -> torch.Tensor:
    """torchvision's own transforms, an image at a time: images and masks, `(N, C + 1, H, W)`."""
    steps = v2.Compose(
        [
            v2.RandomHorizontalFlip(config.horizontal_flip),
            v2.RandomVerticalFlip(config.vertical_flip),
            v2.RandomAffine(
                config.rotate_degrees,
                (config.translate, config.translate),
                config.scale,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=None,
            ),
            v2.ColorJitter(config.brightness, config.contrast),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pairs = [
            steps(tv_tensors.Image(image), tv_tensors.Mask(mask)) for image, mask in zip(images, masks, strict=True)
        ]
    return torch.stack([torch.cat([image, mask[None]]).as_subclass(torch.Tensor) for image, mask in pairs])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_a_batch_changes_as_torchvision_changes_its_images(channels: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand((24, channels, size[0] // 8, size[1] // 8), generator=generator)
    images = (255 * torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")).to(torch.uint8)
    masks = (images[:, 0] > 128).to(torch.uint8)
    config = AugmentConfig(vertical_flip=0.5, rotate_degrees=25.0, translate=0.1, brightness=0.4, contrast=0.4)
    moved_images, moved_masks = build_augment(config, size)(images, masks, 11)
    assert moved_masks is not None
    expected = _one_after_another(config, images, masks, 11)
    difference = (moved_images.int() - expected[:, :-1].int()).abs()
    # The maps' sums are rounded in another order: a grey level here and there, which brightness and contrast may double.
    assert difference.max() <= 3
    assert (difference > 0).float().mean() < 0.01
    assert (moved_masks != expected[:, -1]).float().mean() < 0.001


def test_gamma_is_torchvisions_for_some_exponent_in_the_range() -> None:
    image = torch.randint(20, 200, (1, 1, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got, _ = build_augment(AugmentConfig.model_validate({**NOTHING, "gamma": 0.3}), SIZE)(image, None, 5)
    assert not torch.equal(got, image)
    exponents = np.geomspace(1 / 1.3, 1.3, 601)
    worst = [int((v2.functional.adjust_gamma(image, float(f)).int() - got.int()).abs().max()) for f in exponents]
    assert min(worst) <= 1  # torchvision cuts to whole numbers, this rounds


def test_noise_differs_by_pixel_and_keeps_the_mean() -> None:
    image = torch.full((8, 1, *SIZE), 128, dtype=torch.uint8)
    got, _ = build_augment(AugmentConfig.model_validate({**NOTHING, "noise": 0.1}), SIZE)(image, None, 2)
    deviations = got.float().std(dim=(1, 2, 3))
    assert got.float().mean().item() == pytest.approx(128, abs=1)
    assert 3 < deviations.max().item() <= 0.1 * 255 * 1.1
    assert len(set(deviations.tolist())) == 8


def test_elastic_displacement_is_smooth_bounded_and_moves_image_and_mask_alike() -> None:
    images, masks = squares()
    config = AugmentConfig.model_validate({**NOTHING, "elastic_pixels": 4.0})
    moved_images, moved_masks = build_augment(config, SIZE)(images, masks, 3)
    assert moved_masks is not None
    assert not torch.equal(moved_masks, masks)
    bright = moved_images[:, 0] > 100
    assert (bright & (moved_masks > 0)).sum() / (bright | (moved_masks > 0)).sum() > 0.97
    # Nothing moves further than 4 pixels: what was 6 pixels inside is lesion still, 6 pixels outside is not.
    assert moved_masks[:, 24:34, 18:24].all()
    assert not moved_masks[:, :12].any()
    assert not moved_masks[:, 46:].any()


def _extent(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and rows that are bright, of each image."""
    bright = images[:, 0] > 100
    return bright.any(1).sum(1).float(), bright.any(2).sum(1).float()


def test_aspect_widens_or_narrows_image_and_mask_alike_and_keeps_the_area() -> None:
    masks = torch.zeros(200, *SIZE, dtype=torch.uint8)
    masks[:, 22:42, 22:42] = 1
    images = masks.unsqueeze(1) * 200
    moved, moved_masks = build_augment(AugmentConfig.model_validate({**NOTHING, "aspect": 0.5}), SIZE)(images, masks, 3)
    assert moved_masks is not None
    assert ((moved[:, 0] > 100) != (moved_masks > 0)).float().mean() < 0.005
    wide, high = _extent(moved)
    ratios = wide / high
    assert 1.35 < ratios.max() < 1.5 * 1.1
    assert 1 / 1.5 / 1.1 < ratios.min() < 1 / 1.35
    assert ratios.log().mean().abs() < 0.06  # neither way is the likelier one
    assert ((wide * high - 400).abs() < 400 * 0.12).all()


def test_aspect_stretches_along_the_images_own_axes_before_it_turns() -> None:
    """What was distorted when it was made is undone: a stretched image stretched back is the turned original."""
    config = AugmentConfig.model_validate({**NOTHING, "rotate_degrees": 40.0, "translate": 0.1, "aspect": 0.5})
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    stripes = (columns.abs() < 0.1).to(torch.uint8) * 200  # along the rows: stretching leaves them straight and upright
    moved, _ = build_augment(config, SIZE)(stripes.expand(40, 1, *SIZE).contiguous(), None, 9)
    for image in moved[:, 0].float():
        points = torch.stack([columns[image > 100], rows[image > 100]])
        values, vectors = torch.linalg.eigh(torch.cov(points))
        assert values[0] < 0.02 * values[1]  # a straight line
        degrees = math.degrees(math.atan2(float(vectors[0, 1]), float(vectors[1, 1]))) % 180  # 0 and 180 are upright
        assert min(degrees, 180 - degrees) < 42


def test_erasing_blackens_one_rectangle_by_its_chance_and_leaves_the_mask() -> None:
    images = torch.full((400, 3, *SIZE), 200, dtype=torch.uint8)
    masks = torch.ones(400, *SIZE, dtype=torch.uint8)
    got, got_masks = build_augment(AugmentConfig.model_validate({**NOTHING, "erase": 0.5}), SIZE)(images, masks, 4)
    assert got_masks is not None
    assert torch.equal(got_masks, masks)
    assert set(got.unique().tolist()) == {0, 200}
    black = (got == 0).all(1)
    assert torch.equal(black, (got == 0).any(1))
    erased = black[black.any(2).any(1)]
    assert 0.4 < len(erased) / 400 < 0.6
    shares = erased.float().mean(dim=(1, 2))
    assert 0.015 < shares.min() < 0.1
    assert 0.25 < shares.max() < 0.35
    for one in erased:
        assert one.sum() == one.any(0).sum() * one.any(1).sum()  # a rectangle


def test_what_is_not_asked_for_draws_nothing() -> None:
    """A training that began before there was an option goes on with the same images."""
    images, masks = squares()
    plain = build_augment(AugmentConfig(noise=0.02, elastic_pixels=2.0), SIZE)(images, masks, 5)
    erased = build_augment(AugmentConfig(noise=0.02, elastic_pixels=2.0, erase=1.0), SIZE)(images, masks, 5)
    kept = (erased[0] == plain[0]) | (erased[0] == 0)
    assert kept.all()
    assert not torch.equal(erased[0], plain[0])
