"""Metric rows to the metrics table: one commit a measurement, once a key."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.dataset as pads

from medvision_ray import tables
from medvision_ray.evaluation.measure import MetricRow


def commit_metrics(
    output: str, rows: Sequence[MetricRow], *, key: str, model_id: str, dataset: str, split: str
) -> None:
    """Commit a measurement; with a key that is committed already nothing happens.

    Args:
        output: folder or prefix that holds tables/.
        rows: what was found.
        key: names the measurement in `run_key`.
        model_id: what was measured.
        dataset: name of what it was measured on.
        split: of the dataset.
    """
    now = datetime.now(timezone.utc)
    table = pa.Table.from_pylist(
        [
            {
                "run_key": key,
                "model_id": model_id,
                "dataset": dataset,
                "split": split,
                "subgroup": row.subgroup,
                "class": row.class_name,
                "metric": row.metric,
                "value": row.value,
                "ci_low": row.ci_low,
                "ci_high": row.ci_high,
                "n_images": row.n_images,
                "n_patients": row.n_patients,
                "measured_at": now,
                "subgroup_value": row.subgroup_value,
            }
            for row in rows
        ],
        schema=tables.METRICS,
    )
    tables.commit(output, "metrics", tables.METRICS, table.to_batches(), key)


def latest_key(output: str, key: str, model_id: str, dataset: str, split: str) -> str:
    """The key under which a measurement is the newest of its model, dataset and split.

    Pages and cards show the newest. What is measured again after something else was, such as other labels that turned out
    wrong, is committed again, under `KEY-2` and so on; what is the newest already keeps its key, and nothing is committed.
    """
    same = (pads.field("model_id") == model_id) & (pads.field("dataset") == dataset) & (pads.field("split") == split)
    rows = tables.read(output, "metrics", ["run_key", "measured_at"], same & pads.field("run_key").is_valid())
    measured = {
        row["run_key"]: row["measured_at"]
        for row in (rows.to_pylist() if rows is not None else [])
        if row["run_key"].startswith("metrics-") and row["measured_at"] is not None
    }
    ours = [one for one in measured if one == key or one.rpartition("-")[0] == key]
    newest = max(measured, key=lambda one: measured[one], default=None)
    if newest in ours:
        return str(newest)
    return key if not ours else f"{key}-{len(ours) + 1}"
