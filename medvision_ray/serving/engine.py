"""What the HTTP side needs of what predicts; tests put their own in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from medvision_ray.serving.answers import Answer, ModelFacts


@dataclass(frozen=True)
class PredictOptions:
    """What a request asks for.

    Attributes:
        request_id: the request's own id.
        model: id or name of a model; None is the default.
        mask: how the mask comes beside its contours.
        explain: how the likeliest class of the key frame is explained; None leaves it out.
    """

    request_id: str
    model: str | None = None
    mask: Literal["none", "rle", "png"] = "none"
    explain: Literal["gradcam"] | None = None


class Engine(Protocol):
    """What predicts. Each method raises `DecodeError` or `RequestError`, whose texts hold nothing of the object."""

    async def predict(self, data: bytes, options: PredictOptions) -> Answer:
        """Score one object: the bytes of a file."""
        ...

    async def isolated(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Run a task of `serving.tasks` on one object in a decoding process; answers its facts and bytes."""
        ...

    async def models(self) -> list[ModelFacts]:
        """The models that are served, the default one first."""
        ...

    async def card(self, model: str) -> str:
        """The model card of a model, as Markdown."""
        ...

    def ready(self) -> bool:
        """Whether requests can be answered now."""
        ...
