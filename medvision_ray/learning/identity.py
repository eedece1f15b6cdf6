"""What a training is known by: a hash over its configuration and label table, that options added later leave as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from medvision_ray import storage
from medvision_ray.config import Section, TrainJob

_BESIDE = ("ray", "privacy", "output", "name", "on_finish", "logging")
_ONLY_LOOKED_AT = ("near_duplicates", "acquisition_columns")

Known = Mapping[str, "Known | None"]


def _options(names: str, **sections: Known) -> Known:
    return {**dict.fromkeys(names.split()), **sections}


# Options whose value has always been hashed. One that is not here is hashed only where it is set to another value than
# its default, so that a training which began before there was the option is still the same one. Nothing is added here.
_ALWAYS = _options(
    "sampling epochs batch_size learning_rate layer_decay weight_decay warmup_epochs freeze_epochs ema_decay patience "
    "gradient_clip precision workers use_gpu cpus_per_worker max_failure_fraction max_restarts seed",
    labels=_options("table root label_column findings classes patient_column split_column fractions seed"),
    preprocess=_options(
        "size color slices ct_window_hu use_file_window percentiles denoise resize interpolation mean std",
        clahe=_options("clip_limit tiles"),
    ),
    decode=_options(
        "max_bytes max_frame_pixels max_frames max_decoded_bytes max_tiles max_seconds max_memory_bytes isolation reduced "
        "for_processing volume_index"
    ),
    model=_options(
        "encoder in_channels classification segmentation decoder_channels dropout pooling test_time_flips weights allow_download"
    ),
    augment=_options(
        "horizontal_flip vertical_flip rotate_degrees translate scale brightness contrast gamma noise elastic_pixels"
    ),
    loss=_options(
        "classification_weight classification focal_gamma asymmetric_gammas asymmetric_margin segmentation_weight class_weights "
        "label_smoothing"
    ),
    calibration=_options("method min_patients min_class_patients only_if_better"),
    operating_points=_options("at_specificity at_sensitivity f1 cost positive_class min_class_patients decide_at"),
)


def config_hash_of(job: TrainJob) -> str:
    """sha256 over what decides the weights: the configuration and the label table's content."""
    content = identity_of(job, _ALWAYS)
    for name in _BESIDE:
        content.pop(name, None)
    for name in _ONLY_LOOKED_AT:
        content["labels"].pop(name, None)
    table = hashlib.sha256(storage.read_bytes(job.labels.table)).hexdigest()
    return hashlib.sha256(json.dumps([content, table], sort_keys=True).encode()).hexdigest()


def identity_of(section: Section, always: Known) -> dict[str, Any]:
    """A section's options as JSON has them: those of `always`, and of the others what is not at its default."""
    found = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, known = getattr(section, name), always.get(name)
        if name not in always:
            if value == field.get_default(call_default_factory=True):
                del found[name]
            elif isinstance(value, Section):
                found[name] = identity_of(value, {})
        elif isinstance(value, Section) and known is not None:
            found[name] = identity_of(value, known)
    return found
