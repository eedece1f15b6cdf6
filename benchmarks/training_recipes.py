"""What `training.py` trains: a name, and the options of the train job."""

from __future__ import annotations

from typing import Any

BRAIN_AUGMENT = {
    "rotate_degrees": 20.0,
    "translate": 0.08,
    "scale": [0.85, 1.2],
    "brightness": 0.2,
    "contrast": 0.2,
    "gamma": 0.2,
    "noise": 0.02,
    "elastic_pixels": 6.0,
}
CHEST_AUGMENT = {**BRAIN_AUGMENT, "rotate_degrees": 15.0, "brightness": 0.3, "contrast": 0.3, "gamma": 0.3}
BRAIN: dict[str, Any] = {
    "preprocess": {"size": [256, 256]},
    "augment": BRAIN_AUGMENT,
    "loss": {"label_smoothing": 0.05},
    "epochs": 28,
    "freeze_epochs": 1,
    "warmup_epochs": 2.0,
    "batch_size": 32,
    "learning_rate": 0.001,
    "layer_decay": 0.9,
}
CHEST: dict[str, Any] = {
    "preprocess": {"size": [224, 224]},
    "augment": CHEST_AUGMENT,
    "loss": {"label_smoothing": 0.1},
    "epochs": 15,
    "batch_size": 64,
    "learning_rate": 0.001,
    "layer_decay": 0.9,
}
MODEL: dict[str, Any] = {"encoder": "mobilenet_v2", "weights": "imagenet file", "test_time_flips": ["horizontal"]}
HYBRID: dict[str, Any] = {**BRAIN, "model": MODEL, "loss": {**BRAIN["loss"], "segmentation_weight": 3.0}}
RECIPES: dict[str, dict[str, Any]] = {
    "brain_hybrid": HYBRID,
    "brain_classification": {**BRAIN, "model": {**MODEL, "segmentation": False}},
    "brain_segmentation": {**BRAIN, "model": {**MODEL, "classification": False}},
    "chest_transfer": {**CHEST, "model": {**MODEL, "segmentation": False}},
    "chest_random": {**CHEST, "model": {**MODEL, "segmentation": False, "weights": None}},
}
LITE_2: dict[str, Any] = {
    "encoder": "timm-tf_efficientnet_lite2",
    "weights": "lite2 file",
    "test_time_flips": ["horizontal"],
}
LITE: dict[str, dict[str, Any]] = {
    "brain_lite_hybrid": {**HYBRID, "epochs": 20, "model": LITE_2},
    "brain_lite_classification": {**BRAIN, "epochs": 20, "model": {**LITE_2, "segmentation": False}},
    "brain_lite_segmentation": {**BRAIN, "epochs": 20, "model": {**LITE_2, "classification": False}},
    "chest_lite": {**CHEST, "model": {**LITE_2, "segmentation": False}},
}
"""A stronger encoder whose weights `lite_weights.py` makes; run only where `--recipes` names them."""
_ON_CPU: dict[str, Any] = {
    "preprocess": {"size": [224, 224]},
    "epochs": 18,
    "batch_size": 16,
    "learning_rate": 0.0007,
    "warmup_epochs": 1.5,
}
CPU: dict[str, dict[str, Any]] = {
    "brain_hybrid_cpu": {**HYBRID, **_ON_CPU},
    "brain_classification_cpu": {**RECIPES["brain_classification"], **_ON_CPU},
    "brain_segmentation_cpu": {**RECIPES["brain_segmentation"], **_ON_CPU},
    "chest_cpu": {
        **RECIPES["chest_transfer"],
        "augment": {**CHEST_AUGMENT, "aspect": 0.35, "erase": 0.5},
        "epochs": 5,
        "batch_size": 32,
        "warmup_epochs": 0.5,
    },
}
"""What two cores train in twenty minutes; run only where it is named."""
_MASK_GUIDED = {**MODEL, "pooling": "mask_guided"}
_FIRST_HYBRID: dict[str, Any] = {**BRAIN, "epochs": 40, "model": _MASK_GUIDED}
_MASK_3: dict[str, Any] = {"loss": {**BRAIN["loss"], "segmentation_weight": 3.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "brain_hybrid_first": _FIRST_HYBRID,
    "brain_hybrid_mask3": {**_FIRST_HYBRID, **_MASK_3},
    "brain_hybrid_mask6": {**_FIRST_HYBRID, "loss": {**BRAIN["loss"], "segmentation_weight": 6.0}},
    "brain_hybrid_mask3_wide": {
        **_FIRST_HYBRID,
        **_MASK_3,
        "model": {**_MASK_GUIDED, "decoder_channels": [256, 128, 64, 32, 16]},
    },
    "brain_hybrid_mask3_batch16": {**_FIRST_HYBRID, **_MASK_3, "batch_size": 16, "learning_rate": 0.0007},
    "brain_hybrid_mask3_average": {**_FIRST_HYBRID, **_MASK_3, "model": MODEL},
    "chest_transfer_gentle": {
        **CHEST,
        "model": {**MODEL, "segmentation": False},
        "learning_rate": 0.0003,
        "weight_decay": 0.05,
    },
}
"""What the recipes were chosen from; run only where `--recipes` names them."""
KNOWN = {**RECIPES, **LITE, **CPU, **VARIANTS}
QUICK = {"preprocess": {"size": [64, 64]}, "epochs": 2, "batch_size": 16, "warmup_epochs": 1.0}
"""What `--quick` changes, to try the script on a CPU."""
