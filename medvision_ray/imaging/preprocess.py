"""MedicalImage to model input: display chain, colour, denoising, CLAHE, resizing, in this order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision_ray.config import PreprocessConfig
from medvision_ray.imaging.display import Bounds, frame_scalings, show
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.grid import GridTransform, fit
from medvision_ray.imaging.image import MedicalImage, Window

VERSION = 2
"""Raise it with every change of code that changes a prepared pixel: it is part of `preprocess_id`."""

_TV_WEIGHT = 0.1
_MEDIAN_SIDE = 3


@dataclass(frozen=True)
class ModelInput:
    """What the model sees.

    Attributes:
        pixels: shape `(frames, channels, H, W)`, 0 is black and 255 white; mean and standard
            deviation are not applied yet. With `slices` above 1 the channels are a frame's
            neighbours, from the lower to the higher one, with the frame itself in the middle.
        transform: the way back to the image's grid, the same for all frames.
    """

    pixels: NDArray[np.uint8]
    transform: GridTransform


def prepare(image: MedicalImage, config: PreprocessConfig) -> ModelInput:
    """Prepare all frames of an image.

    CT in HU takes `config.ct_window_hu`; other grey images the file's VOI LUT or window, else
    percentiles over the whole object; 8-bit raster images and colour are shown as they are.

    Raises:
        DecodeError: with stage PREPROCESS; OUT_OF_MEMORY, or INTERNAL_ERROR for a defect in here.
    """
    try:
        return _prepare(image, config)
    except MemoryError:
        raise DecodeError(ErrorCode.OUT_OF_MEMORY, Stage.PREPROCESS) from None
    except Exception as error:  # one bad object must not end a batch; the cause stays attached
        raise DecodeError(ErrorCode.INTERNAL_ERROR, Stage.PREPROCESS, kind=type(error).__name__) from error


def reducible_to(config: PreprocessConfig) -> tuple[int, int] | None:
    """The size for which a lower resolution may be decoded; None where a step before resizing needs all pixels."""
    return config.size if config.denoise == "none" and config.clahe is None else None


def preprocess_id(config: PreprocessConfig, *, reduced: bool = False) -> str:
    """12 hex digits that change with every option and with `VERSION`; written in every prediction row.

    Args:
        reduced: images may have been decoded at a lower resolution (`decode.reduced`).
    """
    options = config.model_dump(mode="json")
    if reduced and reducible_to(config) is not None:
        options["reduced"] = True
    if config.slices == 1:  # the option came later; what it leaves alone keeps its id
        del options["slices"]
    content = json.dumps({"version": VERSION, **options}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def show_frame(image: MedicalImage, config: PreprocessConfig, frame: int) -> NDArray[np.uint8]:
    """One frame as the model is shown it, before colour, denoising and resizing: `(rows, columns)` or with 3 for RGB.

    Raises:
        DecodeError: as `prepare`.
    """
    try:
        return _to_uint8(next(islice(_shown_frames(image, config), frame, None)))
    except MemoryError:
        raise DecodeError(ErrorCode.OUT_OF_MEMORY, Stage.PREPROCESS) from None


def _prepare(image: MedicalImage, config: PreprocessConfig) -> ModelInput:
    transform = fit(image.shape, config.size, keep_aspect=config.resize == "pad")
    own = config.channels if config.slices == 1 else 1
    pixels = np.zeros((image.frames, own, *config.size), dtype=np.uint8)
    rows = slice(transform.top, transform.top + transform.height)
    columns = slice(transform.left, transform.left + transform.width)
    for index, shown in enumerate(_shown_frames(image, config)):
        frame = _equalise(_denoise(_in_colour(shown, config), config), config)
        resized = _to_uint8(_resize(frame, transform, config))
        pixels[index, :, rows, columns] = resized if resized.ndim == 2 else np.moveaxis(resized, -1, 0)
    if config.slices > 1:
        pixels = pixels[:, 0][_neighbours(image, config.slices)]
    return ModelInput(pixels, transform)


def _neighbours(image: MedicalImage, slices: int) -> NDArray[np.intp]:
    """The frames that each frame's channels are, shape `(frames, slices)`.

    Neighbours in space, not in the file. At the edge of a stack the edge is repeated; a frame of no
    stack (a single image, a cine loop, several stacks in one object) has only itself.
    """
    if len(image.slice_order) != image.frames:
        return np.repeat(np.arange(image.frames)[:, None], slices, axis=1)
    order = np.array(image.slice_order, dtype=np.intp)
    around = np.arange(slices) - slices // 2
    found = np.empty((image.frames, slices), dtype=np.intp)
    found[order] = order[np.clip(np.arange(image.frames)[:, None] + around, 0, image.frames - 1)]
    return found


def _shown_frames(image: MedicalImage, config: PreprocessConfig) -> Iterator[NDArray[Any]]:
    """Frames after the display chain: uint8 or uint16, `(rows, columns)` or `(rows, columns, 3)`."""
    fixed: Window | Bounds | None = None
    if image.source_format not in ("dicom", "nifti") and image.pixels.dtype == np.uint8:
        fixed = Bounds(0.0, 255.0)
    elif _in_hounsfield(image) and config.ct_window_hu is not None:
        fixed = Window(*config.ct_window_hu)
    if image.pixels.ndim == 4 or (isinstance(fixed, Bounds) and not image.display.invert):
        yield from image.pixels
        return
    scalings = frame_scalings(image, config.use_file_window, config.percentiles, fixed)
    for index, scaling in enumerate(scalings):
        yield show(image.pixels[index], image.display_of(index), scaling)


def _in_hounsfield(image: MedicalImage) -> bool:
    return image.modality == "CT" and image.source_format == "dicom" and image.display.hounsfield


def _in_colour(frame: NDArray[Any], config: PreprocessConfig) -> NDArray[Any]:
    """Colour to Rec. 601 luma where the model sees grey; grey stays one channel, which is repeated at the end."""
    if frame.ndim == 3 and config.color == "grey":
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY))
    return frame


def _denoise(frame: NDArray[Any], config: PreprocessConfig) -> NDArray[Any]:
    if config.denoise == "median":
        return np.asarray(cv2.medianBlur(np.ascontiguousarray(frame), _MEDIAN_SIDE))
    if config.denoise == "tv":
        from skimage.restoration import denoise_tv_chambolle  # half a second to import; most jobs never need it

        top = np.iinfo(frame.dtype).max
        unit = frame.astype(np.float32) / top
        smooth = denoise_tv_chambolle(unit, weight=_TV_WEIGHT, channel_axis=-1 if frame.ndim == 3 else None)
        return np.asarray(np.rint(np.clip(smooth, 0, 1) * top).astype(frame.dtype))
    return frame


def _equalise(frame: NDArray[Any], config: PreprocessConfig) -> NDArray[Any]:
    """CLAHE of grey, or of the lightness of colour (CIELAB), so that hues stay."""
    if config.clahe is None:
        return frame
    clahe = cv2.createCLAHE(config.clahe.clip_limit, (config.clahe.tiles, config.clahe.tiles))
    if frame.ndim == 2:
        return np.asarray(clahe.apply(np.ascontiguousarray(frame)))
    lab = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2LAB)
    lab[..., 0] = clahe.apply(np.ascontiguousarray(lab[..., 0]))
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def _resize(frame: NDArray[Any], transform: GridTransform, config: PreprocessConfig) -> NDArray[Any]:
    height, width = transform.height, transform.width
    if frame.shape[:2] == (height, width):
        return frame
    shrinks = height <= frame.shape[0] and width <= frame.shape[1]
    interpolation = cv2.INTER_AREA if config.interpolation == "area" and shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(frame, (width, height), interpolation=interpolation))


def _to_uint8(frame: NDArray[Any]) -> NDArray[np.uint8]:
    """65535 becomes 255, rounded to the nearest."""
    if frame.dtype == np.uint8:
        return frame
    return ((frame.astype(np.uint32) + 128) // 257).astype(np.uint8)
