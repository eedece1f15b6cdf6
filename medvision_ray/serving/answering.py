"""From a row, as the batch job writes it to the predictions table, to an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np

from medvision_ray.bundle import Bundle
from medvision_ray.scoring.masks import decode_mask
from medvision_ray.scoring.objects import Effort
from medvision_ray.serving.answers import (
    Answer,
    ClassResult,
    Explanation,
    FrameAnswer,
    ImageFacts,
    MaskFacts,
    OperatingPoint,
    RunLengths,
    Timing,
)
from medvision_ray.serving.drawing import contours, png_base64, run_lengths
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.tables import calibrated_columns, probability_columns

MaskForm = Literal["none", "rle", "png"]


def answer_of(
    bundle: Bundle,
    row: dict[str, Any],
    options: PredictOptions,
    *,
    image_format: str,
    effort: Effort,
    started: float,
    explanation: Explanation | None = None,
) -> Answer:
    """The answer that a scored row is; every number of it is the row's.

    Args:
        started: `time.perf_counter` when the whole body was there.
    """
    has_classes = bool(bundle.classes)
    probabilities = [row[name] for name in probability_columns(bundle.classes)] if has_classes else []
    calibrated = [row.get(name) for name in calibrated_columns(bundle.classes)] if has_classes else []
    shape = (row["height"], row["width"])
    return Answer(
        request_id=options.request_id,
        model_id=bundle.model_id,
        preprocess_id=row["preprocess_id"],
        image=ImageFacts(
            height=row["height"],
            width=row["width"],
            frames=row["frames"],
            modality=row["modality"],
            spacing_mm=row["spacing_mm"],
            spacing_source=row["spacing_source"],
            format=cast(Any, image_format),
        ),
        predicted_label=row["predicted_label"],
        predicted_probability=row["predicted_probability"],
        classes=_classes(bundle, probabilities, calibrated),
        key_frame=row["key_frame"],
        mask=_mask(row, shape, options.mask),
        frames=[_frame(bundle, item, shape, options.mask) for item in row["frame_results"]],
        explanation=explanation,
        timing=Timing(
            decode_ms=1000 * effort.decode_seconds,
            preprocess_ms=1000 * effort.preprocess_seconds,
            predict_ms=1000 * effort.predict_seconds,
            total_ms=1000 * (time.perf_counter() - started),
        ),
    )


def _classes(bundle: Bundle, raw: list[float], calibrated: Sequence[float | None]) -> list[ClassResult]:
    return [
        ClassResult(
            name=name,
            probability=raw[index],
            calibrated_probability=calibrated[index] if calibrated else None,
            operating_points=[
                OperatingPoint(name=point, threshold=threshold, positive=bool(np.float32(raw[index]) >= threshold))
                for point, threshold in _thresholds(bundle, index)
            ],
        )
        for index, name in enumerate(bundle.classes)
        if raw
    ]


def _thresholds(bundle: Bundle, index: int) -> Iterator[tuple[str, float]]:
    """Named thresholds of a class on raw probabilities, rounded to float32 as the batch job compares."""
    if bundle.multi_label:
        yield "default", float(np.float32(bundle.thresholds[index]))
    for point in bundle.operating_points:
        one = point.thresholds[index]
        if one is not None:
            yield point.name, float(np.float32(one.threshold))


def _frame(bundle: Bundle, item: dict[str, Any], shape: tuple[int, int], form: MaskForm) -> FrameAnswer:
    return FrameAnswer(
        frame=item["frame"],
        predicted_label=item["predicted_label"],
        predicted_probability=item["predicted_probability"],
        classes=_classes(bundle, item["probabilities"] or [], item["calibrated"] or []),
        mask=_mask(item, shape, form),
    )


def _mask(columns: dict[str, Any], shape: tuple[int, int], form: MaskForm) -> MaskFacts | None:
    """The mask columns of a row or of a frame, drawn."""
    if columns["mask_fraction"] is None:
        return None
    box = columns["mask_box"]
    mask = decode_mask(columns["mask"], box, shape)
    lines: list[list[list[float]]] = []
    if box:
        top, left, bottom, right = box
        lines = contours(mask[top:bottom, left:right])
        lines = [[[row + top, column + left] for row, column in line] for line in lines]
    return MaskFacts(
        fraction=columns["mask_fraction"],
        area_mm2=columns["mask_area_mm2"],
        pixels=int(np.count_nonzero(mask)),
        box=box,
        contours=lines,
        rle=RunLengths(size=list(shape), counts=run_lengths(mask)) if form == "rle" else None,
        png=png_base64(mask.astype(np.uint8) * 255) if form == "png" else None,
    )
