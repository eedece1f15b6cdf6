"""Random changes of image and mask together, each image of a batch with its own draw; a whole batch at once.

The draws are torchvision's own (`v2` on the CPU); the changes are made to all images of a batch in a few calls, on
whatever device it lies on: one after another they took 11 ms an image on a CPU, and a GPU would wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from medvision_ray.config import AugmentConfig

Augment = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]

_KNOTS = 6  # control points along each side of an elastic deformation
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's, ITU-R BT.601


def build_augment(config: AugmentConfig, size: tuple[int, int]) -> Augment:
    """The augmentation of the train split.

    Geometry moves image (bilinear) and mask (nearest) by the same draw and fills with black; brightness, contrast, gamma,
    noise and erasing change the image only. An amount of 0 leaves its step out, so with all at 0 a batch comes back as it went in.

    Args:
        config: chances and ranges.
        size: rows and columns of the images, in pixels.

    Returns:
        A function of images uint8 `(N, C, H, W)` with C 1 or 3, masks uint8 `(N, H, W)` or None, and a seed, which gives
        both on the device they came on. The same seed changes a batch in the same way, but for the pattern of the noise,
        which is each kind of device's own; the global random state is left as it was.
    """
    flips = _flips(config)
    affine = _affine(config)
    jitter = v2.ColorJitter(config.brightness, config.contrast) if config.brightness or config.contrast else None
    changes = flips or affine or jitter or config.elastic_pixels or config.gamma or config.noise or config.erase

    def augment(images: Tensor, masks: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        if tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(f"Expected images of {size} pixels, but got {tuple(images.shape[-2:])}.")
        if not changes:
            return images, masks
        with torch.random.fork_rng(devices=[]):  # v2 draws from the global generator of the CPU
            torch.default_generator.manual_seed(seed)
            draws = [_draw(flips, affine, config.aspect, jitter, images[:1]) for _ in range(len(images))]
            field = _displacement(config.elastic_pixels, len(images), size) if config.elastic_pixels else None
            tones = _Tones.draw(config, len(images))
            erased = _rectangles(config.erase, images) if config.erase else None
        axes = [axis for axis, _ in flips]
        moved, masks = _change(
            images, masks, draws, axes, moves=affine is not None, colours=jitter is not None, field=field
        )
        toned = tones.apply(moved)
        return toned if erased is None else toned.masked_fill(erased.to(toned.device, non_blocking=True), 0), masks

    return augment


def _displacement(pixels: float, n: int, size: tuple[int, int]) -> Tensor:
    """Shifts of the control points in `affine_grid`'s coordinates, columns first, `(N, 2, knots, knots)`."""
    return (
        (2.0 * torch.rand(n, 2, _KNOTS, _KNOTS) - 1.0)
        * torch.tensor([size[1], size[0]]).reciprocal()[:, None, None]
        * (2.0 * pixels)
    )


def _rectangles(chance: float, images: Tensor) -> Tensor:
    """Where an image of a batch turns black, `(N, 1, H, W)`."""
    erasing = v2.RandomErasing()
    found = torch.zeros(len(images), 1, *images.shape[-2:], dtype=torch.bool)
    for place in found:
        if torch.rand(1) < chance:
            drawn = erasing.make_params([images[:1]])
            if drawn["v"] is not None:  # None where ten draws did not fit into the image
                place[:, drawn["i"] : drawn["i"] + drawn["h"], drawn["j"] : drawn["j"] + drawn["w"]] = True
    return found


@dataclass(frozen=True)
class _Tones:
    """Gamma and noise of a batch: the exponent and the standard deviation of each image, `(N,)`; None where off."""

    exponents: Tensor | None
    deviations: Tensor | None
    noise_seed: int

    @staticmethod
    def draw(config: AugmentConfig, n: int) -> _Tones:
        bound = math.log1p(config.gamma)
        exponents = torch.empty(n).uniform_(-bound, bound).exp() if config.gamma else None
        if not config.noise:
            return _Tones(exponents, None, 0)
        return _Tones(exponents, 255.0 * config.noise * torch.rand(n), int(torch.randint(2**62, ())))

    def apply(self, images: Tensor) -> Tensor:
        if self.exponents is None and self.deviations is None:
            return images
        device, pixels = images.device, images.float()
        if self.exponents is not None:
            pixels = 255.0 * (pixels / 255.0) ** self.exponents.to(device, non_blocking=True)[:, None, None, None]
        if self.deviations is not None:
            here = torch.Generator(device).manual_seed(self.noise_seed)
            pattern = torch.randn(pixels.shape, generator=here, device=device)
            pixels = pixels + pattern * self.deviations.to(device, non_blocking=True)[:, None, None, None]
        return pixels.round().clamp(0, 255).to(images.dtype)


@dataclass(frozen=True)
class _Draw:
    """What happens to one image: flips by axis, the inverse affine map, brightness and contrast and which comes first."""

    flips: tuple[bool, ...]
    inverse: tuple[tuple[float, float, float], tuple[float, float, float]]
    brightness: float
    contrast: float
    contrast_first: bool


_STAY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def _flips(config: AugmentConfig) -> list[tuple[int, float]]:
    """Axis and chance."""
    return [(axis, chance) for axis, chance in ((-1, config.horizontal_flip), (-2, config.vertical_flip)) if chance]


def _affine(config: AugmentConfig) -> v2.RandomAffine | None:
    if not (config.rotate_degrees or config.translate or config.scale != (1.0, 1.0) or config.aspect):
        return None
    return v2.RandomAffine(config.rotate_degrees, (config.translate, config.translate), config.scale)


def _draw(
    flips: list[tuple[int, float]],
    affine: v2.RandomAffine | None,
    aspect: float,
    jitter: v2.ColorJitter | None,
    image: Tensor,
) -> _Draw:
    """Draws in the order of `v2.Compose([flips, affine, jitter])`; an aspect is drawn after the affine map."""
    flipped = tuple(bool(torch.rand(1) < chance) for _, chance in flips)
    moved = _STAY if affine is None else _inverse(affine.make_params([image]), *image.shape[-2:])
    if aspect:
        bound = math.log1p(aspect)
        wider = math.exp(float(torch.empty(()).uniform_(-bound, bound)) / 2)
        across, down = moved
        moved = (_times(across, 1 / wider), _times(down, wider))
    colour = {} if jitter is None else jitter.make_params([image])
    brightness, contrast = colour.get("brightness_factor"), colour.get("contrast_factor")
    order = [] if jitter is None else colour["fn_idx"].tolist()
    return _Draw(
        flipped,
        moved,
        1.0 if brightness is None else brightness,
        1.0 if contrast is None else contrast,
        bool(order) and order.index(1) < order.index(0),
    )


def _inverse(
    drawn: dict[str, object], rows: int, columns: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Rotation, scale and shift about the centre, from the new image to the old, in `affine_grid`'s coordinates."""
    angle, (right, down), scale = drawn["angle"], drawn["translate"], drawn["scale"]  # type: ignore[misc]
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale  # type: ignore[arg-type,operator]
    return (
        (cos, sin * rows / columns, -(cos * right + sin * down) * 2 / columns),  # type: ignore[has-type]
        (-sin * columns / rows, cos, (sin * right - cos * down) * 2 / rows),  # type: ignore[has-type]
    )


def _times(row: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    return (row[0] * factor, row[1] * factor, row[2] * factor)


def _change(
    images: Tensor,
    masks: Tensor | None,
    draws: list[_Draw],
    axes: list[int],
    *,
    moves: bool,
    colours: bool,
    field: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The drawn changes, made to all images of a batch.

    Args:
        axes: of the draws' flips.
        moves: whether there are affine maps.
        colours: whether there are brightness and contrast.
        field: of `_displacement`.
    """

    def each(values: list[object], *shape: int) -> Tensor:
        return torch.tensor(values).to(images.device, non_blocking=True).view(len(draws), *shape)

    pixels = images.float()
    marks = None if masks is None else masks[:, None].float()
    for place, axis in enumerate(axes):
        flipped = each([draw.flips[place] for draw in draws], 1, 1, 1)
        pixels = torch.where(flipped, pixels.flip(axis), pixels)
        marks = None if marks is None else torch.where(flipped, marks.flip(axis), marks)
    if moves or field is not None:
        theta = each([draw.inverse for draw in draws], 2, 3)
        grid = F.affine_grid(theta, [len(images), 1, *images.shape[-2:]], align_corners=False)
        if field is not None:
            knots = field.to(images.device, non_blocking=True)
            shifts = F.interpolate(knots, images.shape[-2:], mode="bilinear", align_corners=True)
            grid = grid + shifts.permute(0, 2, 3, 1)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False).round()
        marks = None if marks is None else F.grid_sample(marks, grid, mode="nearest", align_corners=False)
    if colours:
        brightness = each([draw.brightness for draw in draws], 1, 1, 1)
        contrast = each([draw.contrast for draw in draws], 1, 1, 1)
        contrast_first = each([draw.contrast_first for draw in draws], 1, 1, 1)
        pixels = torch.where(
            contrast_first,
            _brighten(_contrast(pixels, contrast), brightness),
            _contrast(_brighten(pixels, brightness), contrast),
        )
    return pixels.to(images.dtype), None if masks is None or marks is None else marks[:, 0].to(masks.dtype)


def _brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 255).floor()


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean of the image's luma, or towards it."""
    luma = pixels
    if pixels.shape[1] == 3:
        luma = (pixels * pixels.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).floor()
    mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    return (pixels * factor + mean * (1 - factor)).clamp(0, 255).floor()
