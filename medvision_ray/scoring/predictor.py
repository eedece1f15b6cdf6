"""From a bundle to predictions for a batch of prepared inputs; batch jobs and serving share it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medvision_ray.bundle import Bundle
from medvision_ray.native import LARGEST_REUSED_BYTES
from medvision_ray.precision import exact_float32, runs_in_bf16
from medvision_ray.scoring.explain import grad_cam
from medvision_ray.scoring.voting import inference_model


@dataclass(frozen=True)
class Prediction:
    """Predictions for a batch.

    Attributes:
        probabilities: shape `(N, K)` in [0, 1]; rows sum to 1 unless the bundle is multi-label;
            None without a classification head.
        masks: lesion probability on the model's grid, shape `(N, H, W)`; None without a
            segmentation decoder.
    """

    probabilities: NDArray[np.float32] | None
    masks: NDArray[np.float32] | None


class Predictor:
    """A loaded model on one device.

    Args:
        precision: `bf16` runs the network under autocast, `float32` does not, `auto` chooses by the device.
        device: torch device name; None takes a GPU where there is one.
        batch_frames: on a GPU, smaller batches are filled up to so many frames: each new size costs a search for
            kernels, and other kernels may round otherwise, so that a frame's result would hang on its company.

    Attributes:
        bf16: the network runs under autocast.
        part_frames: frames that go through the network at once: on a CPU so few that the memory of activations is
            reused and not mapped anew, on a GPU what its memory held; None where a batch goes as it is.
    """

    def __init__(
        self, bundle: Bundle, precision: str = "auto", device: str | None = None, batch_frames: int | None = None
    ) -> None:
        self.bundle = bundle
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = runs_in_bf16(precision, self.device.type)
        probe = torch.zeros(1, bundle.preprocess.channels, *bundle.preprocess.size, dtype=torch.uint8)
        probe[..., ::2] = 255
        ready = inference_model(bundle, probe)
        self._model = ready.network.to(self.device).to(memory_format=torch.channels_last)
        self.part_frames: int | None = None
        if self.device.type == "cpu":
            activation_bytes = ready.activation_bytes // (2 if self.bf16 else 1)
            self.part_frames = max(1, LARGEST_REUSED_BYTES // max(activation_bytes, 1))
        self._gpu = None if self.device.type == "cpu" else _Copies(self.device)
        self._batch_frames = batch_frames

    def predict(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Predict.

        Args:
            pixels: prepared inputs, shape `(N, C, H, W)`, 0 to 255.
        """
        return next(self.stream([pixels]))[0]

    def explain(
        self, pixels: NDArray[np.uint8], classes: int | NDArray[np.integer] | None = None
    ) -> NDArray[np.float32]:
        """Where in each input the evidence for a class lies: `explain.grad_cam` of this model.

        Args:
            pixels: prepared inputs, shape `(N, C, H, W)`, 0 to 255.
            classes: index of the class, one for all or one an input; None takes each input's likeliest.

        Returns:
            Shape `(N, H, W)` in [0, 1], see `explain.grad_cam`.
        """
        return grad_cam(self._model, pixels, classes)

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[Prediction, float]]:
        """Predictions of successive batches in order, each with the seconds that it took.

        On a GPU a batch's results are fetched only after the next batch has been copied and
        queued, so that copying, computing and the caller's own work overlap.
        """
        before: tuple[_Queued, float] | None = None
        for pixels in batches:
            started = time.perf_counter()
            queued = self._queue(pixels)
            if self.device.type == "cpu":
                yield queued.fetch(), time.perf_counter() - started
                continue
            if before is not None:
                yield before[0].fetch(), time.perf_counter() - before[1]
            before = queued, started
        if before is not None:
            yield before[0].fetch(), time.perf_counter() - before[1]

    def _queue(self, pixels: NDArray[np.uint8]) -> _Queued:
        """Start on a batch, in parts; where a GPU's memory does not hold one, this and later batches go in halves."""
        parts = np.array_split(pixels, -(-len(pixels) // (self.part_frames or len(pixels))))
        try:
            return _Queued([self._forward(part) for part in parts])
        except torch.OutOfMemoryError:
            if len(parts[0]) == 1:
                raise
        self.part_frames = -(-len(parts[0]) // 2)
        torch.cuda.empty_cache()
        return self._queue(pixels)

    @torch.inference_mode()
    def _forward(self, pixels: NDArray[np.uint8]) -> _Part:
        if self._gpu is None:
            probabilities, masks = self._compute(torch.from_numpy(pixels))
            return _Part(probabilities, masks, None)
        filled = max(min(self._batch_frames or 0, self.part_frames or sys.maxsize), len(pixels))
        probabilities, masks = self._compute(self._gpu.to_device(pixels, filled))
        return self._gpu.to_host(probabilities, masks, len(pixels))

    def _compute(self, batch: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Probabilities and masks of uint8 pixels, all on the device."""
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), exact_float32(self.device.type):
            output = self._model(batch)
        probabilities = masks = None
        if output.logits is not None:
            logits = output.logits.float()
            probabilities = logits.sigmoid() if self.bundle.multi_label else logits.softmax(dim=1)
        if output.mask_logits is not None:
            masks = output.mask_logits.float().sigmoid()
        return probabilities, masks


class _Copies:
    """Copies to and from a GPU, each way on a stream of its own, so that the network computes meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_device(self, pixels: NDArray[np.uint8], frames: int) -> torch.Tensor:
        """Pixels, filled up with black frames; whatever is queued next waits for them."""
        source = torch.empty((frames, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
        source[: len(pixels)] = torch.from_numpy(pixels)
        source[len(pixels) :] = 0
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward):
            batch = source.to(self._device, non_blocking=True)
        computing.wait_stream(self._inward)
        batch.record_stream(computing)
        return batch

    def to_host(self, probabilities: torch.Tensor | None, masks: torch.Tensor | None, frames: int) -> _Part:
        """The first frames' results, on their way to pinned memory."""
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            part = _Part(self._fetch(probabilities, frames), self._fetch(masks, frames), torch.cuda.Event())  # type: ignore[no-untyped-call]
            part.done.record(self._outward)  # type: ignore[union-attr]
        return part

    def _fetch(self, values: torch.Tensor | None, frames: int) -> torch.Tensor | None:
        if values is None:
            return None
        values.record_stream(self._outward)
        host = torch.empty((frames, *values.shape[1:]), dtype=values.dtype, pin_memory=True)
        return host.copy_(values[:frames], non_blocking=True)


@dataclass(frozen=True)
class _Part:
    """Results on the host; on a GPU they are there once `done` has happened."""

    probabilities: torch.Tensor | None
    masks: torch.Tensor | None
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class _Queued:
    """A batch that the device works on, in one part or several."""

    parts: list[_Part]

    def fetch(self) -> Prediction:
        """Wait for the results."""
        for part in self.parts:
            if part.done is not None:
                part.done.synchronize()
        return Prediction(
            _joined([part.probabilities for part in self.parts]), _joined([part.masks for part in self.parts])
        )


def _joined(parts: list[torch.Tensor | None]) -> NDArray[np.float32] | None:
    arrays = [part.numpy() for part in parts if part is not None]
    if not arrays:
        return None
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
