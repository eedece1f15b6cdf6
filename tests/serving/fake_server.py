"""The page and its routes beside a stand-in for the predicting API: answers of the right shape, nothing learned."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.serving.contours import contours_of
from medvision_ray.serving.page import page_router
from medvision_ray.serving.viewing import Problem, Viewing

TOKEN = "a-token-for-tests"
MODEL = "phantom-318decb708e3"
CARD = """# Model card: phantom

**Not a medical device.** Output is not a diagnosis.

## Model
- Encoder `resnet18`, 1 input channel(s), 128 x 128 pixels, grey.

```yaml
accuracy: 0.9
```
"""


class Tokens:
    """The token that is valid now; None lets everybody in."""

    def __init__(self, valid: str | None = None) -> None:
        self.valid = valid

    def admit(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return self.valid is None or hmac.compare_digest(given, self.valid)


def make_app(output: str | None, tokens: Tokens, decode_config: DecodeConfig | None = None) -> FastAPI:
    config = decode_config or DecodeConfig()
    viewing = Viewing(config, output)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Iterator[None]:
        yield
        viewing.close()

    app = FastAPI(lifespan=lifespan)

    @app.middleware("http")
    async def authorise(request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1/") and not tokens.admit(request):
            return Problem(401, "unauthorized", "Expected a valid bearer token.").response()
        return await call_next(request)

    @app.get("/v1/models")
    def models() -> Any:
        return {"models": [{"model_id": MODEL, "name": "phantom", "classes": ["cavity", "consolidation", "nodule"]}]}

    @app.get("/v1/models/{model_id}/card")
    def card(model_id: str) -> Any:
        return PlainTextResponse(CARD, media_type="text/markdown")

    @app.post("/v1/predict")
    async def predict(request: Request, explain: str | None = None) -> Any:
        try:
            image = decode(await request.body(), config)
        except DecodeError as error:
            return Problem(422, error.code.value, str(error)).response()
        return JSONResponse(answer(image, explain == "gradcam"))

    app.include_router(viewing.router)
    app.include_router(page_router())
    return app


def answer(image: MedicalImage, explain: bool) -> dict[str, Any]:
    """Fixed probabilities and an ellipse of a mask, in the API's form."""
    rows, columns = image.shape
    mask = np.zeros((rows, columns), np.uint8)
    centre, axes = (int(columns * 0.38), int(rows * 0.52)), (max(2, columns // 9), max(2, rows // 7))
    cv2.ellipse(mask, centre, axes, 20, 0, 360, 1, -1)
    contours = contours_of(mask.astype(bool))
    area = float(mask.sum() * np.prod(image.spacing_mm)) if image.spacing_mm and image.spacing_source.true_in_patient else None
    found = {
        "fraction": float(mask.mean()),
        "area_mm2": area,
        "pixels": int(mask.sum()),
        "box": [int(v) for v in (*np.argwhere(mask).min(0), *(np.argwhere(mask).max(0) + 1))],
        "contours": contours,
    }
    probabilities = {"cavity": (0.04, 0.06), "consolidation": (0.83, 0.76), "nodule": (0.13, 0.18)}
    classes = [
        {
            "name": name,
            "probability": raw,
            "calibrated_probability": calibrated,
            "operating_points": [{"name": "sensitivity 95 %", "threshold": 0.31, "positive": calibrated >= 0.31}],
        }
        for name, (raw, calibrated) in probabilities.items()
    ]
    whole = {"predicted_label": "consolidation", "predicted_probability": 0.83, "classes": classes}
    frames = [{"frame": index, **whole, "mask": {**found, "contours": contours}} for index in range(image.frames)]
    return {
        "request_id": "0190f2a4",
        "model_id": MODEL,
        "preprocess_id": "644b165fb487",
        "image": {
            "height": rows,
            "width": columns,
            "frames": image.frames,
            "modality": image.modality,
            "spacing_mm": image.spacing_mm,
            "spacing_source": image.spacing_source.value,
            "format": image.source_format,
        },
        **whole,
        "key_frame": image.frames // 2,
        "mask": found,
        "frames": frames if image.frames > 1 else [],
        "explanation": {"kind": "gradcam", "class": "consolidation", "png": _heat(rows, columns)} if explain else None,
        "timing": {"total_ms": 31.5},
    }


def _heat(rows: int, columns: int) -> str:
    y, x = np.mgrid[0:rows, 0:columns]
    heat = np.exp(-(((x / columns - 0.4) / 0.2) ** 2 + ((y / rows - 0.5) / 0.2) ** 2))
    _, png = cv2.imencode(".png", np.rint(heat * 255).astype(np.uint8))
    return base64.b64encode(png.tobytes()).decode()


if __name__ == "__main__":
    import os

    import uvicorn

    token = os.environ.get("TOKEN") or None
    uvicorn.run(make_app(os.environ.get("OUTPUT"), Tokens(token)), port=int(os.environ.get("PORT", "8765")), access_log=False)
