"""One self-contained HTML page about a model: how it learned, how good it is, and what its runs did."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medvision_ray.imaging.errors import SENTENCES, ErrorCode
from medvision_ray.reporting import figures
from medvision_ray.reporting.overlays import Example, overlay
from medvision_ray.reporting.summary import METRIC_COLUMNS, headline, metric_tables, number

RUN_COLUMNS = (
    "run_key",
    "started_at",
    "listed",
    "already_done",
    "scored",
    "failed",
    "seconds",
    "images_per_second",
)
_RUN_HEADS = (
    "Run",
    "Started",
    "Listed",
    "Already done",
    "Scored",
    "Failed",
    "Seconds",
    "Images per second",
)
_OTHER_CODE = "A reason that this version does not know."


@dataclass(frozen=True, eq=False)
class ReportContent:
    """Everything that the page shows. A part that is None or empty is replaced by a sentence that says so.

    Nothing here may name a patient: the page is made to be handed on.

    Attributes:
        title: title of the page.
        generated_at: when the page was made, as text.
        model: facts about the model as name and value, in order.
        classes: class names in the order of the arrays below.
        runs: a row per run with `RUN_COLUMNS`.
        metrics: a row per metric with `summary.METRIC_COLUMNS`.
        history: a row per epoch, see `figures.training_curves`.
        labels: class index, shape `(n,)`, negative where blank; or 0, 1 or NaN per finding, shape
            `(n, classes)`.
        predicted: predicted class index, shape `(n,)`; None for findings.
        probabilities: shape `(n, classes)`.
        failures: number of failed objects by error code.
        examples: images with their masks.
    """

    title: str
    generated_at: str
    model: Sequence[tuple[str, str]] = ()
    classes: Sequence[str] = ()
    runs: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None
    history: pd.DataFrame | None = None
    labels: NDArray[np.number] | None = None
    predicted: NDArray[np.integer] | None = None
    probabilities: NDArray[np.floating] | None = None
    failures: pd.Series | None = None
    examples: Sequence[Example] = ()


def render(content: ReportContent) -> str:
    """The page as HTML: no script, no external resource, every text escaped.

    Raises:
        ValueError: the runs or metrics lack a column.
    """
    metrics = _checked(content.metrics, METRIC_COLUMNS, "metrics")
    basis, tiles = headline(metrics) if metrics is not None else ("", [])
    template = _template()
    return template.render(
        content=content,
        basis=basis,
        tiles=tiles,
        tables=metric_tables(metrics) if metrics is not None else [],
        run_heads=_RUN_HEADS,
        runs=_run_rows(_checked(content.runs, RUN_COLUMNS, "runs")),
        failures=_failure_rows(content.failures),
        figures=_draw(content),
        examples=[(_data_uri(overlay(example), "image/png"), example.caption) for example in content.examples],
    )


def _template() -> jinja2.Template:
    source = resources.files("medvision_ray.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _checked(table: pd.DataFrame | None, columns: tuple[str, ...], name: str) -> pd.DataFrame | None:
    if table is None or table.empty:
        return None
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"Expected the {name} of a report to have the columns {columns}, but {missing} are missing.")
    return table


def _draw(content: ReportContent) -> dict[str, str]:
    """Data URIs of the figures that there is material for."""
    drawn: dict[str, bytes] = {}
    labels, predicted, probabilities = content.labels, content.predicted, content.probabilities
    if content.history is not None and len(content.history):
        drawn["training"] = figures.training_curves(content.history)
    if labels is not None and labels.size and content.classes:
        if predicted is not None and labels.ndim == 1:
            drawn["confusion"] = figures.confusion_matrix(labels.astype(np.int64), predicted, content.classes)
        if probabilities is not None:
            drawn["roc"] = figures.roc_curves(labels, probabilities, content.classes)
            drawn["precision_recall"] = figures.precision_recall_curves(labels, probabilities, content.classes)
    if content.failures is not None and len(content.failures):
        drawn["failures"] = figures.failures_by_reason(content.failures)
    return {name: _data_uri(svg, "image/svg+xml") for name, svg in drawn.items()}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _run_rows(runs: pd.DataFrame | None) -> list[list[str]]:
    if runs is None:
        return []
    rows = []
    for _, run in runs.iterrows():
        counts = [number(run[name], 0) for name in ("listed", "already_done", "scored", "failed")]
        speed = [number(run[name], 1) for name in ("seconds", "images_per_second")]
        rows.append([str(run["run_key"]), _moment(run["started_at"]), *counts, *speed])
    return rows


def _moment(value: object) -> str:
    return f"{value:%Y-%m-%d %H:%M}" if isinstance(value, pd.Timestamp) and not pd.isna(value) else str(value)


def _failure_rows(failures: pd.Series | None) -> list[tuple[str, str, str]]:
    """Error code, its sentence and its count, most frequent first."""
    if failures is None:
        return []
    sentences = {code.value: sentence for code, sentence in SENTENCES.items()}
    ordered = failures.sort_values(ascending=False, kind="stable")
    names = [code.value if isinstance(code, ErrorCode) else str(code) for code in ordered.index]
    return [
        (name, sentences.get(name, _OTHER_CODE), number(int(count), 0))
        for name, count in zip(names, ordered, strict=True)
    ]
