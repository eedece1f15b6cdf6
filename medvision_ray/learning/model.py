"""HybridCNN: one shared encoder, a classification head and a U-Net decoder for the mask."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.base import ClassificationHead, SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn

from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import ConfigError
from medvision_ray.learning.mask_pooling import MaskGuidedHead

_MAX_STAGES = 5
_PROBE_PIXELS = 64
_FLIP_AXES = {"horizontal": -1, "vertical": -2}


class HybridOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: class logits `(N, classes)`; None without a classification head.
        mask_logits: mask logits `(N, H, W)` on the input's grid; None without a decoder.
    """

    logits: Tensor | None
    mask_logits: Tensor | None


class HybridCNN(nn.Module):
    """A shared encoder with either or both of two heads; takes pixels as they are prepared and normalises inside.

    Attributes:
        encoder: feature maps at strides 1, 2, 4, ...
        decoder: U-Net decoder, None without segmentation.
        encoder_trainable: names of the encoder's parameters that reach an output; the others never ask for a gradient.
        encoder_frozen: the encoder stays in evaluation mode through `train()`, so that its normalisation statistics
            stay as they are; see `optim.freeze_encoder`.
        flip_axes: axes along which images are mirrored besides, in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, preprocess: PreprocessConfig, n_classes: int) -> None:
        super().__init__()
        depth = len(config.decoder_channels)
        self.in_channels = config.in_channels
        self.flip_axes = tuple(_FLIP_AXES[name] for name in config.test_time_flips)
        self.encoder_frozen = False
        self.encoder_trainable: frozenset[str] = frozenset()
        self.encoder = _build_encoder(config, depth)
        self.decoder: nn.Module | None = None
        self.segmentation_head: nn.Module | None = None
        self.classification_head: nn.Module | None = None
        channels: list[int] = self.encoder.out_channels
        if config.segmentation:
            self.decoder = UnetDecoder(channels, config.decoder_channels, n_blocks=depth)
            self.segmentation_head = SegmentationHead(config.decoder_channels[-1], 1)
            initialize_decoder(self.decoder)
            initialize_head(self.segmentation_head)
        if config.classification:
            if config.pooling == "mask_guided":
                self.classification_head = MaskGuidedHead(channels, n_classes, config.dropout)
            else:
                self.classification_head = ClassificationHead(channels[-1], n_classes, dropout=config.dropout)
            initialize_head(self.classification_head)
        # Not persistent: preprocessing travels in the bundle's configuration, the weights file holds what is learnt.
        shape = (1, len(preprocess.mean), 1, 1)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> HybridOutput:
        """Score a batch; in evaluation mode each image also mirrored as `test_time_flips` says, the logits averaged.

        Args:
            x: pixels 0 to 255, uint8 or float, `(N, C, H, W)` with C 1, 3 or 5, H and W multiples of 32.
        """
        if self.training or not self.flip_axes:
            return self._score(x)
        # One batch, so that every layer is called once: what looks at calls (folding, probes) sees the network as it is.
        views = self._score(torch.cat([x, *[x.flip(axis) for axis in self.flip_axes]]))
        logits = mask_logits = None
        if views.logits is not None:
            logits = torch.stack(views.logits.chunk(1 + len(self.flip_axes))).mean(dim=0)
        if views.mask_logits is not None:
            plain, *mirrored = views.mask_logits.chunk(1 + len(self.flip_axes))
            back = [mask.flip(axis) for mask, axis in zip(mirrored, self.flip_axes, strict=True)]
            mask_logits = torch.stack([plain, *back]).mean(dim=0)
        return HybridOutput(logits, mask_logits)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(N, C, h, w)` of pixels as `forward` takes them, not mirrored, deepest last."""
        x = (x.to(self.mean.dtype) / 255.0 - self.mean) / self.std
        if x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        features: list[Tensor] = self.encoder(x)
        return features

    def score_features(self, features: list[Tensor]) -> HybridOutput:
        """What the heads make of the feature maps of `encode`."""
        logits = mask_logits = None
        if self.decoder is not None and self.segmentation_head is not None:
            mask_logits = self.segmentation_head(self.decoder(features)).squeeze(1)
        if isinstance(self.classification_head, MaskGuidedHead):
            logits = self.classification_head(features, mask_logits)
        elif self.classification_head is not None:
            logits = self.classification_head(features[-1])
        return HybridOutput(logits, mask_logits)

    def _score(self, x: Tensor) -> HybridOutput:
        return self.score_features(self.encode(x))

    def train(self, mode: bool = True) -> HybridCNN:
        """Set training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self


def build_model(
    config: ModelConfig, preprocess: PreprocessConfig, n_classes: int, *, for_training: bool = True
) -> HybridCNN:
    """Build the hybrid CNN with random weights, or with published ones where `weights: imagenet` and a download are allowed.

    A weights file named in `config.weights` is loaded by `weights.load_encoder_weights`, not here.

    Args:
        config: architecture.
        preprocess: normalisation of the input, which happens inside the model.
        n_classes: outputs of the classification head.
        for_training: find out which parameters get gradients; it costs a second of CPU that inference can save.

    Raises:
        ConfigError: no such encoder, or it cannot be built with this depth, or no classes to tell apart.
    """
    if config.classification and n_classes < 1:
        raise ConfigError(
            "Expected at least one class for the classification head, but the labels have none. Give a label column, or "
            "set `model.classification: false`."
        )
    if preprocess.channels != config.in_channels and (preprocess.channels, config.in_channels) != (1, 3):
        raise ConfigError(
            f"Expected `model.in_channels` of {preprocess.channels}, which is what `preprocess` makes with its `color` and "
            f"`slices`, but it is {config.in_channels}."
        )
    model = HybridCNN(config, preprocess, n_classes)
    if for_training:
        _retire_unused(model)
    return model


def _retire_unused(model: HybridCNN) -> None:
    """Take parameters that reach no output out of training: DDP waits for a gradient of each that asks for one.

    EfficientNet's head convolution is one, and any stage below the deepest feature map that the decoder takes.
    """
    model.eval()  # random weights or not, statistics and random state stay as they are
    with torch.enable_grad():
        output = model(torch.zeros(1, model.in_channels, _PROBE_PIXELS, _PROBE_PIXELS))
        parameters = list(model.parameters())
        total = torch.stack([part.sum() for part in output if part is not None]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.encoder_trainable = frozenset(name for name, value in model.encoder.named_parameters() if value.requires_grad)
    model.train()


def batch_norm_eps(module: nn.Module) -> float | None:
    """The epsilon that all batch normalisations of a module share; None where they differ or there are none."""
    found = {layer.eps for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)}
    return found.pop() if len(found) == 1 else None


def set_batch_norm_eps(module: nn.Module, eps: float) -> None:
    """Set the epsilon of all batch normalisations: weights from another framework need the one they were made with."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = eps


def _build_encoder(config: ModelConfig, depth: int) -> Any:
    name = config.encoder
    _check_name(name)
    download = config.weights == "imagenet" and config.allow_download
    # timm encoders take True for "the published weights", the others their name.
    weights = (True if name.startswith("tu-") else "imagenet") if download else None
    try:
        return smp.encoders.get_encoder(name, config.in_channels, depth=depth, weights=weights)
    except (ValueError, TypeError, AttributeError, AssertionError):
        raise ConfigError(
            f"Expected encoder `{name}` to give {depth} stages of features (one a width in `model.decoder_channels`, at "
            f"most {_MAX_STAGES}), but it cannot be built so. Change the number of widths, or take another encoder."
        ) from None


def _check_name(name: str) -> None:
    prefix = "tu-" if name.startswith("tu-") else ""
    plain = name.removeprefix("tu-")
    if prefix and timm.is_model(plain.split(".")[0]):
        return
    known: list[str] = timm.list_models() if prefix else smp.encoders.get_encoder_names()
    if plain in known:
        return
    near = difflib.get_close_matches(plain, known, n=3)
    hint = f"Did you mean {' or '.join(f'`{prefix}{item}`' for item in near)}? " if near else ""
    raise ConfigError(
        f"Expected `model.encoder` to be an encoder of segmentation_models_pytorch, or `tu-` and a timm model, but got "
        f"{name!r}. {hint}Try `mobilenet_v2`, `resnet34` or `tu-convnext_tiny`."
    )
