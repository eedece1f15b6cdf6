"""How many actors a pass gets, and what each reserves."""

from __future__ import annotations

import pytest

from medvision_ray.config import ScoringConfig
from medvision_ray.scoring import pipeline
from medvision_ray.scoring.pipeline import Placement, plan

OBJECTS = 100_000


def _plan(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: int, objects: int = OBJECTS, **scoring: object
) -> Placement:
    monkeypatch.setattr(pipeline, "cluster_cpus", lambda: cpus)
    monkeypatch.setattr(pipeline, "cluster_gpus", lambda: gpus)
    return plan(ScoringConfig.model_validate(scoring), objects)


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 96])
@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("placement", ["auto", "fused", "staged"])
@pytest.mark.parametrize("actors", [None, 1, 3, 8])
def test_what_the_actors_reserve_fits_the_cluster(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, placement: str, actors: int | None
) -> None:
    found = _plan(monkeypatch, cpus, gpus, placement=placement, actors=actors)
    assert (found.scorers + found.preparers) * found.cpus <= cpus
    assert found.scorers >= 1
    assert (found.preparers > 0) is (placement == "staged" or (placement == "auto" and gpus > 0))
    if gpus:
        # Shares do not join across GPUs: each holds so many actors.
        assert 0 < found.scorer_gpus <= 1
        assert found.scorers <= gpus * int(1 / found.scorer_gpus + 1e-9)
    else:
        assert found.scorer_gpus == 0


def test_a_gpu_gets_several_scorers_where_many_cpus_feed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _plan(monkeypatch, 16, 1) == Placement(3, 15, 0.88, 1 / 3)
    assert _plan(monkeypatch, 4, 1) == Placement(1, 3, 1.0, 1.0)
    assert _plan(monkeypatch, 96, 8) == Placement(16, 88, 0.92, 0.5)
    assert _plan(monkeypatch, 16, 1, placement="staged", actors=1).scorer_gpus == 1.0


def test_a_person_reads_which_share_of_a_gpu_an_actor_has() -> None:
    assert (
        Placement(3, 15, 0.88, 1 / 3).sentence() == "staged: 15 actors prepare, 3 with 0.333333 of a GPU each predict"
    )
    assert Placement(2, 0, 1.0, 1.0).sentence() == "fused: 2 actors with a GPU each"
