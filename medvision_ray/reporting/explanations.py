"""The explain job: what a bundle says of single images and why, as pictures and one JSON file an image."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import ExplainJob
from medvision_ray.errors import UsageError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.logs import Reporter
from medvision_ray.operating_points import named_class
from medvision_ray.privacy import address_pseudonymiser
from medvision_ray.reporting.overlays import Example, draw, draw_heat
from medvision_ray.scoring.objects import Effort, Failure, ObjectReader, PreparedObject
from medvision_ray.scoring.rows import FrameResult, decide, frame_result

if TYPE_CHECKING:
    from medvision_ray.scoring.predictor import Predictor

_MOST_PIXELS = 1024
"""Longer side of a picture that is written, at most."""
_LEAST_PIXELS = 384


@dataclass(frozen=True)
class Explained:
    """What was written.

    Attributes:
        written: JSON files, one an image.
        failed: images that could not be read or prepared: number in the order given, code and sentence.
    """

    written: tuple[str, ...]
    failed: tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class _Scored:
    """One frame of an object with what the model says of it."""

    ready: PreparedObject
    data: bytes
    frame: int
    result: FrameResult
    class_index: int | None


def explain_images(job: ExplainJob, say: Reporter) -> Explained:
    """Explain a bundle's prediction of each image.

    Files are named by `image_id`, as in the tables: a file name can hold a patient's.

    Raises:
        UsageError: the bundle has no such class, or an image no such frame.
        StorageError: nothing can be read or written.
    """
    from medvision_ray.scoring.predictor import Predictor

    bundle = load_bundle(job.bundle)
    if job.class_name is not None and job.class_name not in bundle.classes:
        raise UsageError(f"Expected `class_name` to be one of {', '.join(bundle.classes) or 'no classes'}.")
    listed = list_uris(job.images, address_pseudonymiser(job.privacy)).objects.to_pylist()
    predictor = Predictor(bundle)
    reader = ObjectReader(job.decode, bundle.preprocess, None)
    written: list[str] = []
    failed: list[dict[str, Any]] = []
    for number, entry in enumerate(listed):
        found = _explained(job, bundle, predictor, reader, entry)
        if isinstance(found, Failure):
            failed.append({"image": number, "image_id": entry["image_id"], **vars(found)})
        else:
            written.append(found)
        say(f"{number + 1} of {len(listed)}: {found.error if isinstance(found, Failure) else 'explained.'}")
    return Explained(tuple(written), tuple(failed))


def _explained(
    job: ExplainJob, bundle: Bundle, predictor: Predictor, reader: ObjectReader, entry: dict[str, Any]
) -> str | Failure:
    try:
        data = reader.read(entry["uri"], entry["etag"], Effort())
        scored = _score(job, bundle, predictor, reader.prepare(data, Effort()), data)
        return _write(job, bundle, predictor, scored, entry["image_id"])
    except DecodeError as error:
        return Failure.of(error)


def _score(job: ExplainJob, bundle: Bundle, predictor: Predictor, ready: PreparedObject, data: bytes) -> _Scored:
    prediction = predictor.predict(ready.pixels)
    results = [
        frame_result(
            bundle,
            ready,
            prediction.probabilities[index] if prediction.probabilities is not None else None,
            prediction.masks[index] if prediction.masks is not None else None,
        )
        for index in range(len(ready.pixels))
    ]
    index = bundle.classes.index(job.class_name) if job.class_name is not None else None
    frame = _frame(job, results, index)
    probabilities = results[frame].probabilities
    if index is None and probabilities is not None:
        index = int(named_class(probabilities, bundle.class_offsets))  # of findings the likeliest
    return _Scored(ready, data, frame, results[frame], index)


def _frame(job: ExplainJob, results: list[FrameResult], class_index: int | None) -> int:
    """The frame asked for, else the one with the largest mask, else the one with the largest probability."""
    if job.frame is not None:
        if job.frame >= len(results):
            raise UsageError(f"Expected `frame` below {len(results)}, the frames of the image, but got {job.frame}.")
        return job.frame
    masks = [result.mask.pixels if result.mask else 0 for result in results]
    if any(masks):
        return int(np.argmax(masks))
    each = [result.probabilities for result in results]
    likely = [0.0 if row is None else float(row.max() if class_index is None else row[class_index]) for row in each]
    return int(np.argmax(likely))


def _write(job: ExplainJob, bundle: Bundle, predictor: Predictor, scored: _Scored, image_id: int) -> str:
    named = bundle.classes[scored.class_index] if scored.class_index is not None else "mask"
    stem = f"{image_id}-{scored.frame}-{re.sub(r'[^A-Za-z0-9._-]', '_', named)[:40]}"
    mask, heat = _mask(scored), _heat(predictor, scored)
    image = _picture(job, bundle, scored)
    size = (image.shape[1], image.shape[0])
    side = min(max(_LEAST_PIXELS, *image.shape), _MOST_PIXELS)
    shown = cv2.resize(mask.astype(np.float32), size) > 0.5 if mask is not None else None
    panels = [draw(Example(image, shown, None, ""), side)]
    if heat is not None:
        panels.append(draw_heat(image, np.asarray(cv2.resize(heat, size), np.float32), side))
        _write_png(storage.join(job.output, f"{stem}-map.png"), np.rint(heat * 255).astype(np.uint8))
    _write_png(storage.join(job.output, f"{stem}.png"), np.hstack(panels))
    place = storage.join(job.output, f"{stem}.json")
    facts = _facts(bundle, scored, mask, heat, stem) | {"image_id": image_id}
    storage.write_bytes(place, json.dumps(facts, indent=1, allow_nan=False).encode())
    return storage.absolute(place)


def _mask(scored: _Scored) -> NDArray[np.bool_] | None:
    from medvision_ray.scoring.masks import decode_mask

    found = scored.result.mask
    return None if found is None else decode_mask(found.data, found.box, scored.ready.transform.source_shape)


def _heat(predictor: Predictor, scored: _Scored) -> NDArray[np.float32] | None:
    """The class's map on the image's own grid."""
    from medvision_ray.scoring.explain import to_source

    if scored.class_index is None:
        return None
    pixels = scored.ready.pixels[scored.frame : scored.frame + 1]
    return to_source(predictor.explain(pixels, scored.class_index)[0], scored.ready.transform)


def _picture(job: ExplainJob, bundle: Bundle, scored: _Scored) -> NDArray[np.uint8]:
    """The frame as the model's display chain shows it, but as large as it is (at most 1024 px)."""
    rows, columns = scored.ready.transform.source_shape
    scale = min(1.0, _MOST_PIXELS / max(rows, columns))
    size = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    large = bundle.preprocess.model_copy(update={"size": size, "resize": "stretch", "slices": 1, "color": "grey"})
    return np.ascontiguousarray(prepare(decode(scored.data, job.decode), large).pixels[scored.frame, 0])


def _facts(
    bundle: Bundle, scored: _Scored, mask: NDArray[np.bool_] | None, heat: NDArray[np.float32] | None, stem: str
) -> dict[str, Any]:
    from medvision_ray.scoring.explain import mask_outlines

    probabilities = scored.result.probabilities
    label, _ = decide(bundle, probabilities)
    rows, columns = scored.ready.transform.source_shape
    facts: dict[str, Any] = {
        "model_id": bundle.model_id,
        "frame": scored.frame,
        "frames": len(scored.ready.pixels),
        "rows": rows,
        "columns": columns,
        "overlay": f"{stem}.png",
        "predicted_label": label,
    }
    if probabilities is not None and scored.class_index is not None and heat is not None:
        strongest = np.unravel_index(int(heat.argmax()), heat.shape) if heat.any() else None
        facts |= {
            "probabilities": dict(zip(bundle.classes, probabilities.tolist(), strict=True)),
            "class": bundle.classes[scored.class_index],
            "method": "hires_cam",
            "map": f"{stem}-map.png",
            "strongest_row_column": None if strongest is None else [int(place) for place in strongest],
        }
    if mask is not None:
        facts["mask"] = {
            "threshold": bundle.mask_threshold,
            "fraction": float(mask.mean()),
            "outlines_column_row": mask_outlines(mask),
        }
    return facts


def _write_png(uri: str, picture: NDArray[np.uint8]) -> None:
    _, encoded = cv2.imencode(".png", picture)
    storage.write_bytes(uri, encoded.tobytes())
