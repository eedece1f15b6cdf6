"""Both plans on a cluster that offers a GPU: they give identical rows.

Ray takes our word for the GPU, so that everything but the network's device is what it is with a real one; on a real
one `tests/scoring/test_gpu.py` goes further.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.logs import silent
from medvision_ray.scoring.pipeline import plan
from medvision_ray.scoring.run import score

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _job(archive: str, bundle: Bundle, output: Path, placement: str) -> ScoreJob:
    settings = {
        "archive": {"uri": archive},
        "bundle": bundle.uri,
        "output": str(output),
        "privacy": {"demo_key": True},
        "scoring": {"precision": "float32", "placement": placement, "block_rows": 8},
        "budget": {"max_failure_fraction": 1.0},
    }
    return build_job(ScoreJob, settings, "a test")


def _rows(output: Path) -> list[dict[str, Any]]:
    """Every row of an output by image, without what differs from run to run."""
    found: list[dict[str, Any]] = []
    for name in ("predictions", "failures"):
        rows = tables.read(str(output), name)
        assert rows is not None
        drop = {"run_key", "run_date", "scored_at", "failed_at"} & set(rows.column_names)
        found += rows.drop_columns(sorted(drop)).to_pylist()
    return sorted(found, key=lambda row: str(row["image_id"]))


@pytest.mark.usefixtures("cluster")
def test_staged_and_fused_plans_give_identical_rows(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    for placement in ("fused", "staged"):
        job = _job(phantom.night_2, bundle, tmp_path / placement, placement)
        assert plan(job.scoring, phantom.night_2_objects).scorer_gpus == 1.0
        score(job, silent)
    assert len(_rows(tmp_path / "fused")) == phantom.night_2_objects
    assert _rows(tmp_path / "staged") == _rows(tmp_path / "fused")
