"""Three workers of a training over gloo: one that goes on from a checkpoint is one that was never stopped, to the bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from medvision_ray.config import TrainJob, build_job
from medvision_ray.learning.feed import Examples, Truth
from medvision_ray.learning.ingest import SCHEMA
from medvision_ray.learning.loop import TrainPlan, Worker, new_state

pytestmark = pytest.mark.integration
WORLD = 3
SIZE = (64, 64)


def _plan(folder: str) -> TrainPlan:
    job = build_job(
        TrainJob,
        {
            "output": folder,
            "labels": {"table": f"{folder}/labels.csv"},
            "preprocess": {"size": list(SIZE)},
            "model": {"encoder": "tu-resnet10t", "decoder_channels": [8, 8, 8, 8, 8]},
            "epochs": 2,
            "batch_size": 4,
            "precision": "float32",
        },
        "the test",
    )
    rows = np.arange(30)
    return TrainPlan(job, folder, job.model, ("a", "b"), Truth(rows % 2, None), rows[:24], rows[24:], None)


def _images() -> pa.Table:
    generator = np.random.default_rng(0)
    rows = [
        {
            "index": row,
            "pixels": generator.integers(0, 256, (1, *SIZE)).astype(np.uint8).tobytes(),
            "mask": (generator.random(SIZE) > 0.7).astype(np.uint8).tobytes(),
            "digest": "",
            "error_code": "",
        }
        for row in range(30)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def _work(rank: int, port: int, folder: str, resume: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    cpu, plan = torch.device("cpu"), _plan(folder)
    state = new_state(plan, cpu, with_weights=True)
    if resume:
        state.load(f"{folder}/after-1")
    worker = Worker(plan, Examples([_images()], plan.truth, 1, SIZE), state, device=cpu, rank=rank, world=WORLD)
    while not worker.finished:
        epoch = worker.run_epoch()["epoch"]
        if rank == 0 and not resume and epoch == 1:
            state.save(f"{folder}/after-1")
    if rank == 0:
        kept = {name: value.contiguous() for name, value in state.model.state_dict().items()}
        safetensors.torch.save_file(kept, f"{folder}/{'resumed' if resume else 'whole'}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def test_three_workers_go_on_from_a_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "after-1").mkdir()
    for resume in (False, True):
        command = [sys.executable, __file__, str(_free_port()), str(tmp_path), "resume" if resume else ""]
        workers = [subprocess.Popen([*command, str(rank)]) for rank in range(WORLD)]
        try:
            assert [worker.wait(timeout=240) for worker in workers] == [0] * WORLD
        finally:
            for worker in workers:  # the others wait for one that died
                worker.kill()
    whole, resumed = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


if __name__ == "__main__":
    _work(int(sys.argv[4]), int(sys.argv[1]), sys.argv[2], bool(sys.argv[3]))
