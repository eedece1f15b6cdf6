"""An engine that answers with fixed probabilities, an ellipse for a mask and a spot for an explanation."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.serving.answers import (
    Answer,
    ClassResult,
    Explanation,
    FrameAnswer,
    ImageFacts,
    MaskFacts,
    ModelFacts,
    OperatingPoint,
    Timing,
)
from medvision_ray.serving.drawing import contours
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.pixel_task import pixels
from medvision_ray.serving.problems import RequestError

MODEL = "phantom-318decb708e3"
CARD = """# Model card: phantom

**Not a medical device.** Output is not a diagnosis.

## Model
- Encoder `resnet18`, 1 input channel(s), <b>128</b> x 128 pixels, grey.

```yaml
accuracy: 0.9
```
"""
_PROBABILITIES = {"cavity": (0.04, 0.06), "consolidation": (0.83, 0.76), "nodule": (0.13, 0.18)}
_THRESHOLD = 0.31


class FakeEngine:
    """Stands in for a model; what it is sent is decoded, so that damaged objects are refused as they should be."""

    def __init__(self) -> None:
        self.asked: list[PredictOptions] = []

    async def predict(self, data: bytes, options: PredictOptions) -> Answer:
        self.asked.append(options)
        return answer(decode(data, DecodeConfig()), options)

    async def isolated(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        assert task == "pixels"
        return pixels(data, options, DecodeConfig())

    async def models(self) -> list[ModelFacts]:
        return [
            ModelFacts(
                id=MODEL,
                name="phantom",
                default=True,
                loaded=True,
                classes=list(_PROBABILITIES),
                multi_label=False,
                segmentation=True,
                mask_threshold=0.5,
                input_size=[128, 128],
                preprocess_id="644b165fb487",
                calibrated=True,
            )
        ]

    async def card(self, model: str) -> str:
        if model != MODEL:
            raise RequestError(404, "unknown_model", "There is no such model.")
        return CARD

    def ready(self) -> bool:
        return True


def answer(image: MedicalImage, options: PredictOptions) -> Answer:
    rows, columns = image.shape
    classes = [
        ClassResult(
            name=name,
            probability=raw,
            calibrated_probability=calibrated,
            operating_points=[
                OperatingPoint(name="sensitivity_95", threshold=_THRESHOLD, positive=calibrated >= _THRESHOLD)
            ],
        )
        for name, (raw, calibrated) in _PROBABILITIES.items()
    ]
    whole: dict[str, Any] = {"predicted_label": "consolidation", "predicted_probability": 0.83, "classes": classes}
    middle = image.frames // 2
    masks = [_mask(image, 1.0 - abs(index - middle) / (image.frames + 1)) for index in range(image.frames)]
    several = image.frames > 1
    return Answer(
        request_id=options.request_id,
        model_id=MODEL,
        preprocess_id="644b165fb487",
        image=ImageFacts(
            height=rows,
            width=columns,
            frames=image.frames,
            modality=image.modality,
            spacing_mm=list(image.spacing_mm) if image.spacing_mm else None,
            spacing_source=image.spacing_source.value,
            format=image.source_format,
        ),
        **whole,
        key_frame=middle,
        mask=masks[middle],
        frames=[FrameAnswer(frame=index, **whole, mask=mask) for index, mask in enumerate(masks)] if several else [],
        explanation=Explanation(kind="gradcam", class_name="consolidation", png=_heat(rows, columns)),
        timing=Timing(decode_ms=8, preprocess_ms=2, predict_ms=20, total_ms=31),
    )


def _mask(image: MedicalImage, size: float) -> MaskFacts:
    rows, columns = image.shape
    mask = np.zeros((rows, columns), np.uint8)
    axes = (max(2, round(columns / 9 * size)), max(2, round(rows / 7 * size)))
    cv2.ellipse(mask, (int(columns * 0.38), int(rows * 0.52)), axes, 20, 0, 360, 1, -1)
    inside = np.argwhere(mask)
    true = image.spacing_mm is not None and image.spacing_source.true_in_patient
    return MaskFacts(
        fraction=float(mask.mean()),
        area_mm2=float(mask.sum() * np.prod(image.spacing_mm)) if image.spacing_mm and true else None,
        pixels=int(mask.sum()),
        box=[int(value) for value in (*inside.min(axis=0), *(inside.max(axis=0) + 1))],
        contours=contours(mask.astype(bool)),
    )


def _heat(rows: int, columns: int) -> str:
    y, x = np.mgrid[0:rows, 0:columns]
    heat = np.exp(-(((x / columns - 0.4) / 0.2) ** 2 + ((y / rows - 0.5) / 0.2) ** 2))
    _, png = cv2.imencode(".png", np.rint(heat * 255).astype(np.uint8))
    return base64.b64encode(png.tobytes()).decode()
