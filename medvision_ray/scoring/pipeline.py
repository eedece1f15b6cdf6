"""The Ray Data graph of a scoring pass: blocks of addresses over actors, which write their rows themselves.

Why it looks as it does (measured on Ray 2.60, two cores): an actor's rows are in the store, whole or not at all,
before its block counts as done, so nothing but a count crosses the object store, and no read or write task needs a
process of its own (2 CPU-seconds of imports, and a twentieth of the machine). What is left to do is computed from the
written files by the caller, so neither Ray's checkpoint nor its filter is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from medvision_ray import storage
from medvision_ray.cluster import cluster_cpus, cluster_gpus, worker_runtime_env
from medvision_ray.config import ScoringConfig
from medvision_ray.errors import MedVisionError
from medvision_ray.retry import retrying
from medvision_ray.scoring.actors import PredictActor, PrepareActor, ScoringActor
from medvision_ray.scoring.settings import WorkerSettings

_NO_PROGRESS_SECONDS = 1800
_SMALLEST_BLOCK = 16
"""Rows of the last blocks of a pass, about a batch: so that no actor waits long for the last one."""

_CPUS_A_SCORER, _MOST_SCORERS_A_GPU = 5, 4


@dataclass(frozen=True)
class Placement:
    """Which actors a pass runs on, and what each reserves.

    Attributes:
        scorers: actors with a model; in the fused plan they do everything.
        preparers: actors that read, decode and preprocess for them; 0 is the fused plan.
        cpus: share of a CPU of each actor.
        scorer_gpus: share of a GPU of each scorer.
    """

    scorers: int
    preparers: int
    cpus: float
    scorer_gpus: float

    def sentence(self) -> str:
        """For a person."""
        share = "a GPU" if self.scorer_gpus == 1 else f"{self.scorer_gpus:g} of a GPU"
        gpus = f" with {share} each" if self.scorer_gpus else ""
        if not self.preparers:
            return f"fused: {self.scorers} actors{gpus}"
        return f"staged: {self.preparers} actors prepare, {self.scorers}{gpus} predict"


def plan(scoring: ScoringConfig, objects: int) -> Placement:
    """Shares that fit the connected cluster.

    Raises:
        MedVisionError: the cluster is too small.
    """
    cpus, gpus = cluster_cpus(), cluster_gpus()
    blocks = max(1, math.ceil(objects / scoring.block_rows))
    staged = scoring.placement == "staged" or (scoring.placement == "auto" and gpus > 0)
    if staged:
        scorers = min(scoring.actors or _staged_scorers(cpus, gpus), blocks)
        preparers = min(max(1, int(cpus) - max(1, gpus)), blocks)
    else:
        scorers, preparers = min(scoring.actors or gpus or max(1, int(cpus)), blocks), 0
    actors = scorers + preparers
    share = math.floor(min(1.0, cpus / actors) * 100) / 100
    if share <= 0:
        raise MedVisionError(
            f"Expected a cluster with CPUs for {actors} scoring actors, but it has {cpus:g}. Lower `scoring.actors` "
            "or add CPUs."
        )
    return Placement(scorers, preparers, share, _gpu_share(gpus, scorers))


def _staged_scorers(cpus: float, gpus: int) -> int:
    """Several a GPU: one actor's rows and masks keep its thread busy (0.3 ms of CPU an image, of 1.9 in all).

    They take turns on the GPU, and hold their network each; they idle where the images take longer to decode.
    """
    if not gpus:
        return 1
    return gpus * max(1, min(_MOST_SCORERS_A_GPU, int(cpus) // gpus // _CPUS_A_SCORER))


def _gpu_share(gpus: int, scorers: int) -> float:
    """The same number of scorers on each GPU; one GPU each where there are enough."""
    return 1.0 / math.ceil(scorers / gpus) if gpus else 0.0


def score_pass(blocks: list[pa.Table], settings: WorkerSettings, placement: Placement) -> None:
    """Score the objects of some blocks into the run's rows; returns when every block is done.

    Raises:
        ray.exceptions.RayError: workers were lost faster than they could be replaced.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS

    def through(data: Any, worker: type, actors: int, gpus: float) -> Any:
        # Its public face refuses whole blocks where GPUs are asked for, and a block is what a marker stands for.
        # What goes onto a GPU at once is the predictor's affair.
        return data.map_batches_internal(
            worker,
            fn_constructor_args=(settings,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=placement.cpus,
            num_gpus=gpus,
            runtime_env=worker_runtime_env(),
        )

    data = ray.data.from_blocks(blocks)  # `from_arrow` runs a task for each, to count its rows
    if placement.preparers:
        data = through(data, PrepareActor, placement.preparers, 0)
        data = through(data, PredictActor, placement.scorers, placement.scorer_gpus)
    else:
        data = through(data, ScoringActor, placement.scorers, placement.scorer_gpus)
    data.materialize()


def cut_blocks(objects: pa.Table, block_rows: int, actors: int, marked: Mapping[int, int]) -> list[pa.Table]:
    """Blocks of objects, in order: full ones first, ever smaller ones at the end, and marked ones as they were.

    Args:
        objects: inventory rows without an outcome.
        block_rows: most rows of a block.
        actors: how many work on blocks at once.
        marked: rows of a block by the image_id of its first object: blocks that were begun before and not ended.
            They are cut alike again, so that whoever works on one finds its marker.
    """
    ids = objects["image_id"].to_numpy()
    first = np.flatnonzero(np.isin(ids, np.fromiter(marked, np.int64, len(marked))))
    edges = {0, len(ids), *(int(at) for at in first), *(min(int(at) + marked[int(ids[at])], len(ids)) for at in first)}
    cuts = sorted(edges)
    spans = [
        (start, size)
        for low, high in itertools.pairwise(cuts)
        for start, size in _spans(low, high, len(ids), block_rows, actors)
    ]
    return [objects.slice(start, size) for start, size in spans]


def _spans(low: int, high: int, total: int, block_rows: int, actors: int) -> Iterator[tuple[int, int]]:
    while low < high:
        share = max(math.ceil((total - low) / (2 * actors)), min(_SMALLEST_BLOCK, math.ceil(total / actors)))
        size = min(block_rows, share, high - low)
        yield low, size
        low += size


class CommittedRows:
    """The rows that a run's actors have written: each file is one block's, and there whole or not at all.

    A block that was done twice (its actor died after writing, or outlived its run) has two files; the first in name
    order counts.
    """

    def __init__(self, run_folder: str) -> None:
        self._fs, root = storage.filesystem(storage.join(run_folder, "rows"))
        selector = pafs.FileSelector(root, allow_not_found=True)
        found = retrying(lambda: self._fs.get_file_info(selector), run_folder)
        self.files = sorted(item.path for item in found if item.path.endswith(".parquet"))

    def dataset(self, schema: pa.Schema) -> Any:
        """The rows as a pyarrow dataset, in file order."""
        return pads.dataset(self.files, schema=schema, filesystem=self._fs, format="parquet")
