"""Random changes of image and mask together, each image of a batch with its own draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from medvision_ray.config import AugmentConfig

Augment = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]


def build_augment(config: AugmentConfig, size: tuple[int, int]) -> Augment:
    """The augmentation of the train split.

    Geometry moves image (bilinear) and mask (nearest) by the same draw and fills with black; brightness and contrast
    change the image only. An amount of 0 leaves its step out, so with all at 0 a batch comes back as it went in.

    Args:
        config: chances and ranges.
        size: rows and columns of the images, in pixels.

    Returns:
        A function of images uint8 `(N, C, H, W)` with C 1 or 3, masks uint8 `(N, H, W)` or None, and a seed. The same
        seed changes a batch in the same way; the global random state is left as it was.
    """
    steps = _steps(config)

    def augment(images: Tensor, masks: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        if tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(f"Expected images of {size} pixels, but got {tuple(images.shape[-2:])}.")
        if not steps:
            return images, masks
        changed = []
        with torch.random.fork_rng(devices=[]):  # v2 draws from the global generator of the CPU
            torch.default_generator.manual_seed(seed)
            for number in range(len(images)):
                mask = None if masks is None else tv_tensors.Mask(masks[number])
                changed.append(_apply(steps, tv_tensors.Image(images[number]), mask))
        moved = None if masks is None else torch.stack([mask for _, mask in changed if mask is not None])
        return torch.stack([image for image, _ in changed]), moved

    return augment


def _apply(steps: list[v2.Transform], image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    for step in steps:
        image, mask = step(image, mask)
    return image.as_subclass(Tensor), None if mask is None else mask.as_subclass(Tensor)


def _steps(config: AugmentConfig) -> list[v2.Transform]:
    steps: list[v2.Transform] = []
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    if config.rotate_degrees or config.translate or config.scale != (1.0, 1.0):
        affine = v2.RandomAffine(
            degrees=config.rotate_degrees,
            translate=(config.translate, config.translate),
            scale=config.scale,
            interpolation=v2.InterpolationMode.BILINEAR,  # masks are moved with nearest whatever is said here
            fill=None,  # black as well, and in half the time of fill=0, which moves a second image to know where to fill
        )
        steps.append(affine)
    if config.brightness or config.contrast:
        steps.append(v2.ColorJitter(brightness=config.brightness, contrast=config.contrast))
    return steps
