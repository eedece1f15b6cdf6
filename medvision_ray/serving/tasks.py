"""What a decoding process does with one object, and the process itself (`python -m medvision_ray.serving.tasks`).

It reads one JSON line of limits, then for each request a JSON line and the object's bytes on standard input, and
answers with facts as JSON and raw bytes. Nothing is pickled. The process that answers requests never parses an object:
what a hostile file does to a decoder happens here, with limits on time and memory.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from medvision_ray.config import DecodeConfig, PreprocessConfig, PrivacyConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode, Stage
from medvision_ray.imaging.preprocess import show_frame
from medvision_ray.privacy import Pseudonymiser, load_pseudonymiser
from medvision_ray.scoring.objects import Effort, ObjectReader
from medvision_ray.scoring.pipes import OUT_OF_MEMORY_STATUS, answer_with, limit_memory, own_stdout
from medvision_ray.serving.pixel_task import pixels

_GRACE_SECONDS = 5.0  # past the parent's own limit, for a child whose parent is gone
Task = Callable[[bytes, dict[str, Any], DecodeConfig], tuple[dict[str, Any], bytes]]


def prepare(data: bytes, options: dict[str, Any], limits: DecodeConfig) -> tuple[dict[str, Any], bytes]:
    """Decode and prepare: the same function as the batch job's.

    Args:
        options: `preprocess`, JSON of the bundle's; `privacy`, JSON of the site's policy where rows are kept.

    Returns:
        `PreparedObject.facts` with `effort`, and the prepared pixels.
    """
    effort = Effort(bytes_read=len(data))
    reader = ObjectReader(limits, _preprocess(options["preprocess"]), _pseudonymiser(options.get("privacy")))
    ready = reader.prepare(data, effort)
    facts = {**ready.facts(), "effort": dataclasses.asdict(effort)}
    return facts, np.ascontiguousarray(ready.pixels).tobytes()


def overlay(data: bytes, options: dict[str, Any], limits: DecodeConfig) -> tuple[dict[str, Any], bytes]:
    """A frame with the mask's outline on it, as PNG on the source's grid.

    Args:
        options: `preprocess`, `frame`, and `contours` in `[row, column]`.
    """
    from medvision_ray.serving.drawing import draw_overlay

    shown = show_frame(decode(data, limits), _preprocess(options["preprocess"]), options["frame"])
    return {}, draw_overlay(shown, options["contours"])


def segment(data: bytes, options: dict[str, Any], limits: DecodeConfig) -> tuple[dict[str, Any], bytes]:
    """The masks as a DICOM SEG object.

    Args:
        options: `model_id`, `rows`, `columns`, and `masks`, the run lengths of every frame.
    """
    from medvision_ray.serving.segmentation import masks_of, segmentation

    masks = masks_of(options["masks"], options["rows"], options["columns"])
    return {}, segmentation(data, masks, options["model_id"], limits)


TASKS: Mapping[str, Task] = {"prepare": prepare, "overlay": overlay, "segment": segment, "pixels": pixels}
"""Every task by its name; a new one is added here."""


@lru_cache(maxsize=32)
def _preprocess(text: str) -> PreprocessConfig:
    return PreprocessConfig.model_validate_json(text)


@lru_cache(maxsize=1)
def _pseudonymiser(policy: str | None) -> Pseudonymiser | None:
    """The site's key is read here, from where the policy says, and does not travel."""
    return load_pseudonymiser(PrivacyConfig.model_validate_json(policy)) if policy else None


def _serve() -> None:
    out = own_stdout()
    import cv2

    cv2.setNumThreads(1)
    limits = DecodeConfig.model_validate_json(sys.stdin.buffer.readline())
    limit_memory(limits.max_memory_bytes)
    answer_with(out, {"ready": True})
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            data = sys.stdin.buffer.read(request["bytes"])
        except MemoryError:
            os._exit(OUT_OF_MEMORY_STATUS)
        faulthandler.dump_traceback_later(limits.max_seconds + _GRACE_SECONDS, exit=True, file=nowhere)
        facts, payload = _done(request, data, limits)
        faulthandler.cancel_dump_traceback_later()
        answer_with(out, {"payload": len(payload), "facts": facts}, payload)


def _done(request: dict[str, Any], data: bytes, limits: DecodeConfig) -> tuple[dict[str, Any], bytes]:
    try:
        return TASKS[request["task"]](data, request["options"], limits)
    except DecodeError as error:
        return {"code": error.code.value, "stage": error.stage.value, "facts": error.facts}, b""
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)
    except (Exception, SystemExit) as error:  # a defect of a decoder; its text may hold a name
        kind = type(error).__name__[:64]
        return {"code": ErrorCode.INTERNAL_ERROR.value, "stage": Stage.DECODE.value, "facts": {"exception": kind}}, b""


if __name__ == "__main__":
    _serve()
