"""The model card of a bundle: facts of the training, and headings that the owner fills in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def model_card(document: Mapping[str, Any], metrics: Mapping[str, Any], n_train_images: int) -> str:
    """Write the card as Markdown (headings after Mitchell et al., Model Cards for Model Reporting, 2019).

    Args:
        document: content of `bundle.yaml`.
        metrics: validation metrics.
        n_train_images: images that were trained on.
    """
    architecture, preprocess = document["architecture"], document["preprocess"]
    kind = "findings that may occur together" if document["multi_label"] else "one of these classes"
    outputs = []
    if architecture["classification"]:
        outputs.append(f"- Classification, {kind}: {', '.join(document['classes'])}.")
    if architecture["segmentation"]:
        outputs.append(
            f"- Segmentation: a mask; pixels from probability {document['mask_threshold']:g} count as lesion."
        )
    rows, columns = preprocess["size"]
    return "\n".join(
        [
            f"# Model card: {document['model_id']}",
            "",
            "**Not a medical device.** This model has no regulatory clearance. Its output is not a diagnosis and must not",
            "decide on a patient's care.",
            "",
            "## Intended use",
            "To be filled in by the owner: purpose, users, modality and body part, population, and uses that are ruled out.",
            "",
            "## Model",
            f"- Encoder `{architecture['encoder']}`, {architecture['in_channels']} input channel(s), "
            f"{rows} x {columns} pixels, {preprocess['color']}.",
            *outputs,
            f"- Weights: sha256 `{document['weights_sha256']}`.",
            "",
            "## Training",
            f"{n_train_images} images. Facts recorded by the training job:",
            *_facts(document["trained"]),
            "",
            "## Validation metrics",
            "On the split that chose this model, so they are better than on new patients. Test metrics are in the metrics",
            "table, from the evaluate job.",
            *_facts(metrics),
            "",
            "## Preprocessing",
            *_facts(preprocess),
            "",
            "## Limits",
            "To be filled in by the owner: groups of patients, scanners and sites that it was not tested on.",
            "",
        ]
    )


def _facts(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return ["None recorded."]
    return ["```yaml", yaml.safe_dump(dict(facts), sort_keys=False, width=100).rstrip(), "```"]
