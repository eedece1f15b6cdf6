"""What the worklist shows: rows of the `predictions` and `failures` tables, filtered, sorted and paged.

Addresses stay here: an address can hold a patient's name, and the page needs none.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medvision_ray import tables
from medvision_ray.scoring.masks import decode_mask
from medvision_ray.serving.drawing import contours
from medvision_ray.serving.online_runs import JOB as ONLINE_JOB

DEFAULT_NIGHTS = 30
Text = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
_RUN_COLUMNS = ("run_key", "job", "model_id", "scored", "failed", "finished_at", "started_at", "state")
_LISTED = [
    *("image_id", "run_key", "run_date", "model_id", "modality", "height", "width", "frames"),
    *("predicted_label", "predicted_probability", "mask_fraction", "mask_area_mm2", "scored_at"),
]
_FAILED = ["image_id", "run_key", "run_date", "model_id", "stage", "error_code", "error", "attempts", "failed_at"]
_KEY = ["image_id", "run_date"]
_WHEN = {"predictions": "scored_at", "failures": "failed_at"}
"""With `_KEY`, what names a row within a table."""
_HIDDEN = frozenset({"uri", "etag", "mask", "frame_results"})
"""Of a row of predictions; masks and frames leave as contours."""
_FINISHED = pads.field("scored").is_valid() & pads.field("finished_at").is_valid()


class Query(BaseModel):
    """Which rows, in which order."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    table: Literal["predictions", "failures"] = "predictions"
    """Which table."""
    run_key: Text | None = None
    """Rows of one run; without it those of the last `nights`."""
    nights: int = Field(DEFAULT_NIGHTS, ge=1, le=3660)
    """How many days, up to the newest run."""
    model_id: Text | None = None
    """Rows of one model."""
    label: Text | None = None
    """Predictions of this class; of findings, those that were present."""
    modality: Text | None = None
    """Predictions of one modality, by its DICOM code."""
    min_probability: Share | None = None
    """Least probability of `label`, else of the predicted class, in [0, 1]."""
    max_probability: Share | None = None
    """Largest likewise."""
    error_code: Text | None = None
    """Failures of one code."""
    order: Literal["newest", "probability", "uncertain"] = "newest"
    """`newest` first, or predictions by that probability from the highest, or from the lowest (`uncertain`)."""
    offset: int = Field(0, ge=0, le=10_000_000)
    """How many rows to skip."""
    limit: int = Field(50, ge=1, le=200)
    """How many rows to give at most."""


def choices(output: str, nights: int = DEFAULT_NIGHTS) -> dict[str, Any]:
    """What there is to filter by: the last runs, and models, labels, modalities and error codes of their rows."""
    since = _since(output, nights)
    found: dict[str, set[Any]] = {"models": set(), "modalities": set(), "labels": set(), "error_codes": set()}
    recent = pads.field("run_date") >= since if since else None
    for table, column, name in (
        ("predictions", "model_id", "models"),
        ("predictions", "modality", "modalities"),
        ("predictions", "predicted_label", "labels"),
        ("failures", "model_id", "models"),
        ("failures", "error_code", "error_codes"),
    ):
        rows = tables.read(output, table, [column], recent)
        if rows is not None:
            found[name].update(value for value in pc.unique(rows[column]).to_pylist() if value is not None)
    return {
        "runs": [_plain(run) for run in _runs(output, since)] if since else [],
        "labels": sorted({part for label in found.pop("labels") for part in label.split("|") if part}),
        **{name: sorted(values) for name, values in found.items()},
    }


def page(output: str, query: Query) -> dict[str, Any]:
    """One page of rows, and how many rows there are in all.

    Two reads: all that fit, but only what they are sorted by; then everything that is listed of the page's rows.
    """
    predictions = query.table == "predictions"
    probability = tables.probability_column(query.label) if query.label else "predicted_probability"
    when, sorts = _WHEN[query.table], [probability] if predictions else []
    condition = _condition(output, query, probability)
    found = tables.read(output, query.table, [*_KEY, when, *sorts], condition)
    if found is None or not found.num_rows:
        return {"total": 0, "rows": []}
    by_time = [(when, "descending"), ("image_id", "ascending")]
    direction = {"probability": "descending", "uncertain": "ascending"}.get(query.order)
    order = [(probability, direction), *by_time] if predictions and direction else by_time
    most = min(query.offset + query.limit, found.num_rows)
    chosen = found.take(pc.select_k_unstable(found, most, order)).slice(query.offset, query.limit)
    listed = _listed(output, query.table, chosen, [*(_LISTED if predictions else _FAILED), *sorts])
    for row in listed:
        row["probability"] = row.get(probability)
    return {"total": found.num_rows, "rows": [_plain(row) for row in listed]}


def _listed(output: str, table: str, chosen: pa.Table, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of these keys, in their order; one that a commit replaced meanwhile is left out."""
    if not chosen.num_rows:
        return []
    key = [*_KEY, _WHEN[table]]
    condition = pads.field("image_id").isin(chosen["image_id"]) & pads.field("run_date").isin(chosen["run_date"])
    found = tables.read(output, table, list(dict.fromkeys(columns)), condition)
    rows = {tuple(row[name] for name in key): row for row in found.to_pylist()} if found else {}
    places = zip(*(chosen[name].to_pylist() for name in key), strict=True)
    return [rows[place] for place in places if place in rows]


def record(output: str, image_id: int, model_id: str | None = None) -> dict[str, Any] | None:
    """Everything that the page shows of one row: the newest prediction of this image, else its failure; None of neither.

    Masks are contours; `frame_results` holds each frame's result of a volume or a multi-frame object. Classes have
    their names where they were predicted, else those of their columns, in which blanks are `_`.
    """
    row = _newest(output, "predictions", image_id, model_id)
    if row is None:
        failure = _newest(output, "failures", image_id, model_id)
        return None if failure is None else {"table": "failures", **_plain({n: failure.get(n) for n in _FAILED})}
    columns = [name for name in row if name.startswith("p_") and row[name] is not None]
    names = {tables.probability_column(name): name for name in (row["predicted_label"] or "").split("|")}
    shape = (row["height"], row["width"])
    facts = {name: value for name, value in row.items() if name not in _HIDDEN and not name.startswith("p_")}
    return {
        "table": "predictions",
        **_plain(facts),
        "classes": [{"name": names.get(name, name[2:]), "probability": row[name]} for name in columns],
        "mask": _mask(row, shape),
        "frame_results": [
            {
                "frame": frame["frame"],
                "predicted_label": frame["predicted_label"],
                "predicted_probability": frame["predicted_probability"],
                "probabilities": frame["probabilities"],
                "mask": _mask(frame, shape),
            }
            for frame in row["frame_results"] or ()
        ],
    }


def address(output: str, image_id: int) -> tuple[str, str] | None:
    """Address and etag of an image that a table names; None of one that no table names."""
    for table in ("predictions", "failures"):
        rows = tables.read(output, table, ["uri", "etag"], pads.field("image_id") == image_id)
        if rows is not None and rows.num_rows:
            return rows["uri"][0].as_py(), rows["etag"][0].as_py()
    return None


def _runs(output: str, since: date) -> list[dict[str, Any]]:
    """Finished runs of scoring since a day, the newest first; not those of single answers, of which there are many a day."""
    condition = _FINISHED & (pads.field("finished_at") >= pa.scalar(_midnight(since), tables.TIMESTAMP))
    rows = tables.read(output, "runs", _RUN_COLUMNS, condition & (pads.field("job") != ONLINE_JOB))
    runs = [] if rows is None else rows.to_pylist()
    return sorted(runs, key=lambda run: run["finished_at"], reverse=True)


def _since(output: str, nights: int) -> date | None:
    """First day of the last `nights`, counted back from the newest run; a run's rows carry the day it began."""
    runs = tables.read(output, "runs", ["started_at", "finished_at"], _FINISHED)
    if runs is None or not runs.num_rows:
        return None
    newest = runs.take(pc.select_k_unstable(runs, 1, [("finished_at", "descending")])).to_pylist()[0]
    day: date = min(newest["started_at"] or newest["finished_at"], newest["finished_at"]).date()
    return day - timedelta(days=nights - 1)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _condition(output: str, query: Query, probability: str) -> pads.Expression:
    condition = pads.scalar(True)
    if query.run_key:
        condition &= pads.field("run_key") == query.run_key
    else:
        since = _since(output, query.nights)
        condition &= pads.field("run_date") >= since if since else pads.scalar(True)
    if query.model_id:
        condition &= pads.field("model_id") == query.model_id
    if query.table == "failures":
        return condition & (pads.field("error_code") == query.error_code) if query.error_code else condition
    if query.modality:
        condition &= pads.field("modality") == query.modality
    if query.label:  # of findings, `predicted_label` joins the present ones by `|`
        pattern = rf"(^|\|){_quoted(query.label)}($|\|)"
        condition &= pc.match_substring_regex(pads.field("predicted_label"), pattern)
    if query.min_probability is not None:
        condition &= pads.field(probability) >= pa.scalar(query.min_probability, pa.float32())
    if query.max_probability is not None:
        condition &= pads.field(probability) <= pa.scalar(query.max_probability, pa.float32())
    return condition


def _quoted(text: str) -> str:
    """For RE2: every character that is no letter, digit or underscore escaped."""
    return "".join(char if char.isalnum() or char == "_" else f"\\x{{{ord(char):x}}}" for char in text)


def _newest(output: str, table: str, image_id: int, model_id: str | None) -> dict[str, Any] | None:
    """The whole row; masks are read of its night alone."""
    condition = pads.field("image_id") == image_id
    if model_id:
        condition &= pads.field("model_id") == model_id
    when = _WHEN[table]
    places = tables.read(output, table, [*_KEY, when], condition)
    if places is None or not places.num_rows:
        return None
    newest = places.take(pc.select_k_unstable(places, 1, [(when, "descending")])).to_pylist()[0]
    for name in (*_KEY, when):
        condition &= pads.field(name) == newest[name]
    rows = tables.read(output, table, None, condition)
    return dict(rows.to_pylist()[0]) if rows is not None and rows.num_rows else None


def _mask(result: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any] | None:
    """A stored mask as contours; `contours` is None where the run saved no masks."""
    if result["mask_fraction"] is None:
        return None
    box = result["mask_box"]
    saved = result["mask"] is not None or box is None
    return {
        "fraction": result["mask_fraction"],
        "area_mm2": result["mask_area_mm2"],
        "box": box,
        "contours": _outlines(decode_mask(result["mask"], box, shape), box) if saved else None,
    }


def _outlines(mask: NDArray[np.bool_], box: list[int] | None) -> list[list[list[float]]]:
    """Contours of a mask on the whole frame's grid; only its box is searched."""
    if not box:
        return []
    top, left, bottom, right = box
    lines = contours(mask[top:bottom, left:right])
    return [[[row + top, column + left] for row, column in line] for line in lines]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON can hold it: days and times in ISO form, ids as text (JavaScript's numbers end at 53 bits)."""
    plain = {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}
    if "image_id" in plain:
        plain["image_id"] = str(plain["image_id"])
    return plain
