"""The Ray Data graph of a scoring pass: read the to-do list, score, write rows under a checkpoint.

Why it looks as it does (measured on Ray 2.60): the list is read with `read_parquet`, because
checkpointing over in-memory sources records ids but filters nothing; with the first data source
version, because the second starts 32 footer readers and dies with a node; and written with append.
The checkpoint is used for its two-phase commit of files. What is left to do is computed from the
committed rows by the caller, so a pass never needs the checkpoint filter and its actor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from medvision_ray import storage
from medvision_ray.cluster import cluster_cpus, cluster_gpus
from medvision_ray.config import ScoringConfig
from medvision_ray.errors import MedVisionError
from medvision_ray.retry import retrying
from medvision_ray.scoring.settings import WorkerSettings

# Reading and writing need a share of a CPU that no actor takes, or the job waits for ever.
_TASK_CPUS = 0.1
_NO_PROGRESS_SECONDS = 1800


@dataclass(frozen=True)
class Placement:
    """Which actors a pass runs on, and what each reserves.

    Attributes:
        scorers: actors with a model, each with `scorer_gpus`; in the fused plan they do everything.
        preparers: actors that read, decode and preprocess for them; 0 is the fused plan.
        cpus: share of a CPU of each actor.
    """

    scorers: int
    preparers: int
    cpus: float
    scorer_gpus: int

    def sentence(self) -> str:
        """For a person."""
        gpus = " with a GPU each" if self.scorer_gpus else ""
        if not self.preparers:
            return f"fused: {self.scorers} actors{gpus}"
        return f"staged: {self.preparers} actors prepare, {self.scorers}{gpus} predict"


def plan(scoring: ScoringConfig, objects: int) -> Placement:
    """Shares that fit the connected cluster together with the read and write tasks.

    Raises:
        MedVisionError: the cluster is too small.
    """
    cpus, gpus = cluster_cpus(), cluster_gpus()
    blocks = max(1, math.ceil(objects / scoring.block_rows))
    staged = scoring.placement == "staged" or (scoring.placement == "auto" and gpus > 0)
    if staged:
        scorers = min(scoring.actors or max(1, gpus), blocks)
        preparers = min(max(1, int(cpus) - scorers), blocks)
    else:
        scorers, preparers = min(scoring.actors or gpus or max(1, int(cpus)), blocks), 0
    actors = scorers + preparers
    share = math.floor(min(1.0, (cpus - 2 * _TASK_CPUS) / actors) * 100) / 100
    if share <= 0:
        raise MedVisionError(
            f"Expected a cluster with CPUs for {actors} scoring actors and their read and write tasks, but it has "
            f"{cpus:g}. Lower `scoring.actors` or add CPUs."
        )
    return Placement(scorers, preparers, share, 1 if gpus else 0)


def score_pass(todo_uri: str, attempt_folder: str, settings: WorkerSettings, placement: Placement, blocks: int) -> None:
    """Score the objects of a to-do list into ATTEMPT/rows, with commits in ATTEMPT/checkpoint.

    Raises:
        ray.exceptions.RayError: workers were lost faster than they could be replaced.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    from medvision_ray.scoring.worker import PredictWorker, PrepareWorker, ScoringWorker  # loads every decoder

    context = DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
    # Every file goes through this package's filesystem: Ray's own for s3:// gives up on a throttled footer.
    filesystem, checkpoint = storage.filesystem(_place(attempt_folder, "checkpoint"))
    context.checkpoint_config = CheckpointConfig(
        "image_id", checkpoint, override_filesystem=filesystem, delete_checkpoint_on_success=False
    )

    def through(data: Any, worker: type, actors: int, gpus: int) -> Any:
        return data.map_batches(
            worker,
            fn_constructor_args=(settings,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=placement.cpus,
            num_gpus=gpus,
        )

    try:
        path = storage.filesystem(todo_uri)[1]
        data = ray.data.read_parquet(path, filesystem=filesystem, override_num_blocks=blocks, num_cpus=_TASK_CPUS)
        if placement.preparers:
            data = through(data, PrepareWorker, placement.preparers, 0)
            data = through(data, PredictWorker, placement.scorers, placement.scorer_gpus)
        else:
            data = through(data, ScoringWorker, placement.scorers, placement.scorer_gpus)
        data.write_parquet(
            storage.filesystem(_place(attempt_folder, "rows"))[1],
            filesystem=filesystem,
            mode="append",
            ray_remote_args={"num_cpus": _TASK_CPUS},
            concurrency=1,
        )
    finally:
        context.checkpoint_config = None


def _place(folder: str, name: str) -> str:
    place = storage.join(folder, name)
    storage.make_folder(place)
    return place


class CommittedRows:
    """The rows of a run's attempts that the checkpoints list as committed.

    A file without its checkpoint is a leftover of a worker that died, or of one that outlived its
    run. Where two attempts committed the same object, the first file in name order counts.
    """

    def __init__(self, run_folder: str) -> None:
        self._fs, root = storage.filesystem(storage.join(run_folder, "attempts"))
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        found = retrying(lambda: self._fs.get_file_info(selector), run_folder)
        paths = sorted(item.path for item in found if item.path.endswith(".parquet"))
        parts = [(path, *path[len(root) :].lstrip("/").split("/")) for path in paths]
        committed = {
            (attempt, rest[-1].removesuffix(".parquet"))
            for _, attempt, *rest in parts
            if rest[0] == "checkpoint" and not rest[-1].endswith(".pending.parquet")
        }
        self.files = [
            path
            for path, attempt, *rest in parts
            if rest[0] == "rows" and any((attempt, prefix) in committed for prefix in _prefixes(rest[-1]))
        ]

    def dataset(self, schema: pa.Schema) -> Any:
        """The rows as a pyarrow dataset, in file order."""
        return pads.dataset(self.files, schema=schema, filesystem=self._fs, format="parquet")


def _prefixes(name: str) -> list[str]:
    """Names under which a checkpoint may list a data file: `a_b_000001-0.parquet` is listed as `a_b_000001`."""
    stem = name.removesuffix(".parquet")
    return [stem, stem.rsplit("-", 1)[0]]
