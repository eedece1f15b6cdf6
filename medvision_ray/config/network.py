"""What is trained and how: the network, the changes of its images, the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medvision_ray.config.sections import Fraction, NonNegative, Positive, Section


class ModelConfig(Section):
    """The hybrid CNN: one encoder, a classification head, a segmentation decoder."""

    encoder: str = "mobilenet_v2"
    """Any encoder of segmentation_models_pytorch by name; `tu-NAME` for any timm backbone."""
    in_channels: Literal[1, 3, 5] = 1
    """Channels the encoder sees, as many as `preprocess.slices`; 1 sums the RGB weights of the first convolution, 3 repeats grey."""
    classification: bool = True
    """Have a classification head."""
    segmentation: bool = True
    """Have a segmentation decoder (U-Net)."""
    decoder_channels: tuple[Positive, ...] = (128, 64, 48, 32, 16)
    """Width of each decoder stage, deepest first; narrower is faster."""
    dropout: Fraction = 0.2
    """Dropout before the classification layer."""
    pooling: Literal["average", "mask_guided"] = "average"
    """What the classes are told from: `average` of the deepest features; `mask_guided` adds the features where the mask is."""
    test_time_flips: tuple[Literal["horizontal", "vertical"], ...] = ()
    """Also score each image mirrored so, and average the logits; travels in the bundle and costs a forward pass each."""
    weights: str | None = None
    """Initial encoder weights: path or URI of a safetensors file; null starts at random. `imagenet` needs `allow_download`."""
    allow_download: bool = False
    """Let the encoder library download published weights. Off: nothing is fetched at run time."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if not (self.classification or self.segmentation):
            raise ValueError("at least one of `classification` and `segmentation` must be true")
        if self.pooling == "mask_guided" and not (self.classification and self.segmentation):
            raise ValueError("`pooling: mask_guided` needs both `classification` and `segmentation`")
        if len(set(self.test_time_flips)) != len(self.test_time_flips):
            raise ValueError("`test_time_flips` names a flip twice")
        if self.weights == "imagenet" and not self.allow_download:
            raise ValueError(
                "`weights: imagenet` downloads; set `allow_download: true`, or give the path of a safetensors file"
            )
        return self


class AugmentConfig(Section):
    """Random changes of image and mask together, on the device that trains."""

    horizontal_flip: Fraction = 0.5
    """Chance of a left-right flip."""
    vertical_flip: Fraction = 0.0
    """Chance of an up-down flip."""
    rotate_degrees: NonNegative = 10.0
    """Largest rotation either way, in degrees."""
    translate: Fraction = 0.05
    """Largest shift as a fraction of each side."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.1)
    """Range of zoom."""
    aspect: NonNegative = 0.0
    """Largest change of width over height either way, area kept: 0.25 draws the ratio log-uniformly between 1/1.25 and 1.25."""
    brightness: NonNegative = 0.1
    """Largest relative change of brightness."""
    contrast: NonNegative = 0.1
    """Largest relative change of contrast."""
    gamma: NonNegative = 0.0
    """Largest gamma either way: 0.3 takes pixels in [0, 1] to a power between 1/1.3 and 1.3."""
    noise: Fraction = 0.0
    """Largest standard deviation of Gaussian noise, as a fraction of white."""
    elastic_pixels: NonNegative = 0.0
    """Largest displacement of a smooth elastic deformation, in pixels."""
    erase: Fraction = 0.0
    """Chance that a rectangle of 2 to 33 % of the image turns black (random erasing, Zhong 2020); the mask stays."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"`scale` is the smallest zoom and the largest, but {list(self.scale)} falls")
        return self


class LossConfig(Section):
    """The masked multi-task loss: a sample without a label or a mask adds nothing to that term."""

    classification_weight: NonNegative = 1.0
    """Weight of the classification term."""
    classification: Literal["cross_entropy", "focal", "asymmetric"] = "cross_entropy"
    """`focal` looks less at what is told well (Lin 2017); `asymmetric` does so for absent findings (multi-label; Ben-Baruch 2021)."""
    focal_gamma: Annotated[float, Field(ge=1)] = 2.0
    """Focusing of `focal`."""
    asymmetric_gammas: tuple[NonNegative, NonNegative] = (0.0, 4.0)
    """Focusing of `asymmetric` for findings that are there, and that are not."""
    asymmetric_margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """`asymmetric`: an absent finding of at most this probability costs nothing."""
    segmentation_weight: NonNegative = 1.0
    """Weight of the sum of binary cross entropy and soft Dice."""
    class_weights: Literal["none", "balanced"] | tuple[Annotated[float, Field(gt=0)], ...] = "balanced"
    """`balanced` weighs a class by the inverse of its share in train, a finding's positives by negatives over positives; or one a class."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Label smoothing of the single-label cross entropy."""

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.label_smoothing and self.classification != "cross_entropy":
            raise ValueError("`label_smoothing` goes with `classification: cross_entropy` only")
        return self
