"""Metric rows to the metrics table: one commit a measurement, once a key."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import pyarrow as pa

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
