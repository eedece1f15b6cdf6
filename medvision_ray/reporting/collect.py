"""The report job: collect from the tables what `report.render` shows, and write the page."""

from __future__ import annotations

import io
import json
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from medvision_ray import listing, storage, tables
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import DecodeConfig, ReportJob
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.privacy import HASHED
from medvision_ray.reporting.overlays import Example
from medvision_ray.reporting.report import ReportContent, render
from medvision_ray.scoring.masks import decode_mask


def build_report(job: ReportJob) -> str:
    """Write one self-contained HTML file about a model; returns its address.

    Raises:
        BundleError: there is no such model.
    """
    bundle = load_bundle(job.bundle)
    details = _details(job, bundle)
    truth = _truth(bundle, details) if details is not None and bundle.classes else None
    content = ReportContent(
        title=job.title,
        generated_at=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        model=_facts(bundle),
        classes=bundle.classes,
        runs=_rows(job, bundle, "runs"),
        metrics=_metrics(job, bundle),
        history=_history(job, bundle),
        labels=truth[0] if truth else None,
        predicted=truth[1] if truth else None,
        probabilities=truth[2] if truth else None,
        failures=_failures(job, bundle),
        examples=_examples(job, bundle, details),
    )
    place = job.file or storage.join(job.output, "reports", f"{bundle.model_id}.html")
    storage.write_bytes(place, render(content).encode())
    return storage.absolute(place)


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    architecture, preprocess = bundle.architecture, bundle.preprocess
    heads = [name for name in ("classification", "segmentation") if getattr(architecture, name)]
    facts = [
        ("Model", bundle.model_id),
        ("Encoder", architecture.encoder),
        ("Heads", " and ".join(heads)),
        ("Classes", ", ".join(bundle.classes) or "none"),
        ("Input", f"{preprocess.size[0]} x {preprocess.size[1]} px, {preprocess.color}"),
    ]
    known = [name for name in ("epochs", "best_epoch", "seed") if name in bundle.trained]
    return facts + [(name.replace("_", " ").capitalize(), str(bundle.trained[name])) for name in known]


def _rows(job: ReportJob, bundle: Bundle, name: str) -> pd.DataFrame | None:
    rows = tables.read(job.output, name, None, pads.field("model_id") == bundle.model_id)
    if rows is None or rows.num_rows == 0:
        return None
    frame: pd.DataFrame = rows.to_pandas()
    return frame.sort_values("started_at") if "started_at" in frame else frame


def _metrics(job: ReportJob, bundle: Bundle) -> pd.DataFrame | None:
    frame = _rows(job, bundle, "metrics")
    if frame is None:
        return None
    newest = frame.groupby(["dataset", "split"])["measured_at"].transform("max")
    return frame[frame["measured_at"] == newest].rename(columns={"class": "class_name"})


def _history(job: ReportJob, bundle: Bundle) -> pd.DataFrame | None:
    place = storage.join(job.output, "training", bundle.name, "metrics.jsonl")
    if not storage.exists(place):
        return None
    lines = storage.read_bytes(place).decode().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines if line.strip()])


def _failures(job: ReportJob, bundle: Bundle) -> pd.Series[int] | None:
    if _rows(job, bundle, "runs") is None:
        return None
    frame = _rows(job, bundle, "failures")
    return frame["error_code"].value_counts() if frame is not None else pd.Series(dtype=int)


def _details(job: ReportJob, bundle: Bundle) -> pd.DataFrame | None:
    """Truth and prediction of the evaluated images: the test split where there is one."""
    folder = storage.join(job.output, "evaluations", bundle.model_id)
    if not storage.exists(folder):
        return None
    found = sorted(item.uri for item in listing.list_objects(folder) if item.path.endswith(".parquet"))
    if not found:
        return None
    place = next((uri for uri in found if uri.endswith("-test.parquet")), found[0])
    frame: pd.DataFrame = pq.read_table(io.BytesIO(storage.read_bytes(place))).to_pandas()
    return frame


def _truth(bundle: Bundle, details: pd.DataFrame) -> tuple[Any, Any, Any]:
    probabilities = details[tables.probability_columns(bundle.classes)].to_numpy(np.float64)
    if bundle.multi_label:
        truth = np.stack([details.get(f"t_{n}", pd.Series(np.nan, details.index)) for n in bundle.classes], axis=1)
        return truth.astype(float), None, probabilities
    index = {name: place for place, name in enumerate(bundle.classes)}
    labels = details["true_label"].map(index).fillna(-1).to_numpy(np.int64)
    return labels, details["predicted_label"].map(index).to_numpy(np.int64), probabilities


def _examples(job: ReportJob, bundle: Bundle, details: pd.DataFrame | None) -> list[Example]:
    """Single-frame images spread over the Dice range, worst and best among them, so that nothing flatters."""
    if details is None or job.examples == 0 or details["uri"].str.startswith(HASHED).all():
        return []  # images of pseudonyms can't be read
    single = details[details["frames"] == 1].sort_values(["dice", "image_id"])
    places = np.unique(np.linspace(0, len(single) - 1, min(job.examples, len(single))).round().astype(int))
    shown = [_example(bundle, row) for row in single.iloc[places].itertuples()]
    return [example for example in shown if example is not None]


def _example(bundle: Bundle, row: Any) -> Example | None:
    limits = DecodeConfig()
    shape = (int(row.height), int(row.width))
    try:
        ready = prepare(decode(storage.read_bytes(row.uri, max_bytes=limits.max_bytes), limits), bundle.preprocess)
    except DecodeError:
        return None
    box = tuple(int(v) for v in row.mask_box) if row.mask_box is not None else None
    predicted = ready.transform.mask_to_model(decode_mask(row.mask, box, shape)).astype(bool)
    true = None
    if isinstance(row.mask_uri, str):
        pixels = decode(storage.read_bytes(row.mask_uri, max_bytes=limits.max_bytes), limits).pixels[0]
        true = ready.transform.mask_to_model(pixels != 0).astype(bool)
    dice = f", Dice {row.dice:.2f}" if row.dice == row.dice else ""
    said = f"true {row.true_label}, predicted {row.predicted_label}" if bundle.classes else "mask only"
    return Example(
        image=np.ascontiguousarray(ready.pixels[0, 0]),
        predicted=predicted if bundle.architecture.segmentation else None,
        true=true,
        caption=f"{said}{dice}",
    )
