"""Tables with a few nights in them, of real phantom objects, written without a run."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medvision_ray import tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.imaging.errors import SENTENCES, ErrorCode
from medvision_ray.scoring.masks import encode_mask

CLASSES = ("cavity", "consolidation", "pleural effusion")
MODEL = "phantom-0123456789ab"
NEWEST = datetime(2026, 11, 24, 2, 30, tzinfo=timezone.utc)


def entries(files: list[Path]) -> list[dict[str, Any]]:
    """Inventory rows of files."""
    rows: list[dict[str, Any]] = list_uris([str(file) for file in files]).objects.to_pylist()
    return rows


def prediction(entry: dict[str, Any], label: str, probability: float, **more: Any) -> dict[str, Any]:
    """A row; the other classes share the rest, the mask is a box of rows 10 to 19 and columns 20 to 49."""
    mask = np.zeros((256, 256), bool)
    mask[10:20, 20:50] = True
    encoded = encode_mask(mask)
    rest = (1 - probability) / (len(CLASSES) - 1)
    return {
        **{name: entry[name] for name in ("image_id", "uri", "etag")},
        "modality": "CT",
        "height": 256,
        "width": 256,
        "frames": 1,
        "predicted_label": label,
        "predicted_probability": probability,
        **{tables.probability_column(name): probability if name == label else rest for name in CLASSES},
        "key_frame": 0,
        "mask_fraction": encoded.fraction,
        "mask_area_mm2": 300.0,
        "mask_box": list(encoded.box or ()),
        "mask": encoded.data,
        "frame_results": [],
        "preprocess_id": "0123456789ab",
        "patient_key": "zeemk22tgvmkcvmczie2fkmxj4",
        **more,
    }


def failure(entry: dict[str, Any], code: ErrorCode) -> dict[str, Any]:
    return {
        **{name: entry[name] for name in ("image_id", "uri", "etag")},
        "stage": "decode",
        "error_code": code.value,
        "error": SENTENCES[code],
        "attempts": 1,
    }


def commit_run(
    output: str,
    run_key: str,
    scored: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    *,
    days_ago: int = 0,
    model_id: str = MODEL,
) -> None:
    """Commit a run's rows to `predictions`, `failures` and `runs`."""
    when = NEWEST - timedelta(days=days_ago)
    run = {"run_key": run_key, "run_date": when.date(), "model_id": model_id}
    for name, rows, schema, stamp in (
        ("predictions", scored, tables.predictions_schema(CLASSES), "scored_at"),
        ("failures", failed, tables.FAILURES, "failed_at"),
    ):
        whole = [{**run, stamp: when, **row} for row in rows]
        tables.commit(output, name, schema, pa.Table.from_pylist(whole, schema).to_batches(), run_key)
    facts = {
        "run_key": run_key,
        "job": "score",
        "model_id": model_id,
        "scored": len(scored),
        "failed": len(failed),
        "started_at": when - timedelta(minutes=5),
        "finished_at": when + timedelta(minutes=5),
        "state": "complete",
    }
    tables.commit(output, "runs", tables.RUNS, pa.Table.from_pylist([facts], tables.RUNS).to_batches(), run_key)
