"""Training speed: the train job beside a plain torch DDP script with a DataLoader, and beside that without reading.

Brain MRI with masks, a MobileNetV2 hybrid, two processes of one core each, the same images, network, loss, augmentation, optimizer and
precision. The peer reads and decodes each image in each epoch, in a loader process a rank, as such scripts do. `limit` is what the two
cores can do: the same loop with all images prepared in memory beforehand, and with what makes the train job's steps fast (gradients of
some depthwise convolutions in float32, `learning/depthwise.py`, a fused optimizer, memory that is kept). The first epoch of the train job
stands beside the seconds that it spent on decoding before; the peer's first epoch has its decoding inside. Runs are interleaved; medians.

    python benchmarks/train_vs_ddp.py [--images 480] [--size 128] [--epochs 3] [--repeats 2]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import machine, print_table, write_results

DATA = Path(os.environ.get("MEDVISION_DATA", "../shared/data")) / "brain_mri"
WORKERS, BATCH, VAL_IMAGES = 2, 16, 32
KINDS = ("project", "peer", "limit")
MODEL = {"encoder": "mobilenet_v2"}


def label_table(images: int, folder: Path) -> str:
    """So many train images of the brain MRI table, and a few of val, with absolute paths."""
    with (DATA / "labels.csv").open() as source:
        rows = [row for row in csv.DictReader(source) if row["mask"] and _is_there(row)]
    kept = []
    for split, count in (("train", images), ("val", VAL_IMAGES)):
        of_split = [row for row in rows if row["split"] == split]
        kept += of_split[:: max(1, len(of_split) // count)][:count]
    place = folder / "labels.csv"
    with place.open("w", newline="") as target:
        out = csv.writer(target)
        out.writerow(("image", "mask", "label", "patient_id", "split"))
        for row in kept:
            paths = ((DATA / row[name]).resolve() for name in ("image", "mask"))
            out.writerow((*paths, row["label"], row["patient_id"], row["split"]))
    return str(place)


def _is_there(row: dict[str, str]) -> bool:
    """Whether image and mask are what their names say; copies of the data set can hold pointers in their place."""
    with (DATA / row["image"]).open("rb") as image, (DATA / row["mask"]).open("rb") as mask:
        return image.read(2) == b"\xff\xd8" and mask.read(4) == b"\x89PNG"


def settings(table: str, output: str, size: int, epochs: int) -> dict[str, Any]:
    """The train job; the peer takes its network, loss and augmentation from it."""
    return {
        "output": output,
        "name": "bench",
        "labels": {"table": table, "near_duplicates": "off"},
        "preprocess": {"size": [size, size]},
        "model": MODEL,
        "epochs": epochs,
        "batch_size": BATCH,
        "workers": WORKERS,
        "ema_decay": 0.0,
        "warmup_epochs": 0.0,
        "calibration": {"method": "none"},
        "privacy": {"demo_key": True},
    }


def run_project(table: str, size: int, epochs: int) -> dict[str, Any]:
    """The train job; rates are of the training part of an epoch, as everywhere."""
    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.train import train

    with tempfile.TemporaryDirectory() as output:
        found = train(build_job(TrainJob, settings(table, output, size, epochs), "the benchmark"))
    rates = [line["images_per_second"] for line in found.history]
    images = found.summary["labels"]["train"]["images"]
    waits = [line["wait_seconds"] / (images / line["images_per_second"]) for line in found.history]
    return {
        "images_per_second": rates,
        "wait_share": waits,
        "decode_seconds": found.summary["seconds"]["decode"],
        "loss": found.history[-1]["train_loss"],
    }


def run_script(table: str, size: int, epochs: int, *, cached: bool) -> dict[str, Any]:
    """Two ranks of `rank_main`; what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--table", table, "--size", str(size), "--epochs", str(epochs)]
    command += ["--run", "limit" if cached else "peer", "--rank"]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(WORKERS)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("the DDP script failed")
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def rank_main(  # noqa: PLR0915  # one script, to be read from top to bottom as its peers are
    rank: int, table: str, size: int, epochs: int, *, cached: bool
) -> dict[str, Any]:
    """One rank of the plain script."""
    import cv2
    import numpy as np
    import torch
    from torch import distributed as dist
    from torch.utils.data import DataLoader, Dataset, DistributedSampler

    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.augment import build_augment
    from medvision_ray.learning.depthwise import speed_up_depthwise
    from medvision_ray.learning.losses import MultiTaskLoss, balanced_class_weights
    from medvision_ray.learning.model import build_model
    from medvision_ray.learning.optim import parameter_groups
    from medvision_ray.native import reuse_freed_memory
    from medvision_ray.precision import runs_in_bf16

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = build_job(TrainJob, settings(table, "unused", size, epochs), "the benchmark")
    with Path(table).open() as source:
        rows = list(csv.DictReader(source))
    classes = sorted({row["label"] for row in rows})
    rows = [row for row in rows if row["split"] == "train"]

    class Images(Dataset[Any]):
        """Reads, decodes and resizes, or gives what it has prepared."""

        def __init__(self) -> None:
            self._kept = [self._read(row) for row in rows] if cached else None

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            return self._kept[index] if self._kept is not None else self._read(rows[index])

        @staticmethod
        def _read(row: dict[str, str]) -> Any:
            image = cv2.imread(row["image"], cv2.IMREAD_GRAYSCALE)
            mask = cv2.imread(row["mask"], cv2.IMREAD_GRAYSCALE)
            assert image is not None
            assert mask is not None
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)
            lesion = (mask > 0).astype(np.uint8)
            return torch.from_numpy(image[None]), torch.from_numpy(lesion), classes.index(row["label"])

    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    images = Images()
    sampler = DistributedSampler(images, WORKERS, rank)
    loading: dict[str, Any] = {} if cached else {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4}
    loader = DataLoader(images, BATCH, sampler=sampler, **loading)
    model = build_model(job.model, job.preprocess, len(classes)).to(memory_format=torch.channels_last)
    if cached:
        reuse_freed_memory()
        speed_up_depthwise(model)
    network = torch.nn.parallel.DistributedDataParallel(model)
    groups = parameter_groups(model, job.learning_rate, job.layer_decay, job.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, fused=cached)
    labels = torch.tensor([classes.index(row["label"]) for row in rows])
    criterion = MultiTaskLoss(job.loss, balanced_class_weights(labels, len(classes)), False)
    augment = build_augment(job.augment, job.preprocess.size)
    bf16 = runs_in_bf16(job.precision, "cpu")
    rates, waits, loss = [], [], torch.zeros(())
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        network.train()
        started, waited, seen = time.perf_counter(), 0.0, 0
        batches = iter(loader)
        for step in range(len(loader)):
            before = time.perf_counter()
            pixels, masks, truth = next(batches)
            waited += time.perf_counter() - before
            pixels, drawn = augment(pixels, masks, 1000 * epoch + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = network(pixels.contiguous(memory_format=torch.channels_last))
            loss = criterion(output, truth, None, drawn, torch.ones(len(truth), dtype=torch.bool)).total
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.gradient_clip)
            optimizer.step()
            seen += len(truth)
        seconds = time.perf_counter() - started
        rates.append(WORKERS * seen / seconds)
        waits.append(waited / seconds)
    dist.destroy_process_group()
    return {"images_per_second": rates, "wait_share": waits, "loss": loss.item()}


def run_once(kind: str, table: str, size: int, epochs: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--run", kind, "--table", table, "--size", str(size), "--epochs", str(epochs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(runs: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """Medians over runs: the first epoch, and all epochs after it."""
    later = [rate for run in runs for rate in run["images_per_second"][1:]]
    first = [images / (run.get("decode_seconds", 0.0) + images / run["images_per_second"][0]) for run in runs]
    return {
        "later_images_per_second": round(statistics.median(later), 1),
        "first_images_per_second_with_decoding": round(statistics.median(first), 1),
        "first_images_per_second": round(statistics.median(run["images_per_second"][0] for run in runs), 1),
        "later_wait_share": round(statistics.median(share for run in runs for share in run["wait_share"][1:]), 4),
        "runs": runs,
    }


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    for name in ("--run", "--table", "--rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = (options.table, options.size, options.epochs)
    if options.rank is not None:
        sys.stdout.write(json.dumps(rank_main(int(options.rank), *case, cached=options.run == "limit")) + "\n")
        return
    if options.run:
        found = run_project(*case) if options.run == "project" else run_script(*case, cached=options.run == "limit")
        sys.stdout.write(json.dumps(found) + "\n")
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        table = label_table(options.images, Path(folder))
        with Path(table).open() as source:
            images = sum(row["split"] == "train" for row in csv.DictReader(source))
        for repeat in range(options.repeats):
            for kind in KINDS if repeat % 2 == 0 else reversed(KINDS):
                runs[kind].append(run_once(kind, table, options.size, options.epochs))
                sys.stderr.write(f"{kind}: {runs[kind][-1]}\n")
    found = {kind: summarise(of_kind, images) for kind, of_kind in runs.items()}
    ours = found["project"]
    result = {
        "images": images,
        "size": options.size,
        "epochs": options.epochs,
        "repeats": options.repeats,
        "workers": WORKERS,
        "batch_size": BATCH,
        "model": MODEL,
        **found,
        "ratio_to_peer": round(ours["later_images_per_second"] / found["peer"]["later_images_per_second"], 3),
        "ratio_to_limit": round(ours["later_images_per_second"] / found["limit"]["later_images_per_second"], 3),
        "goals": {"ratio_to_peer": 1.0, "later_wait_share": 0.03},
        "machine": machine("ray", "torch", "segmentation-models-pytorch", "medvision-ray"),
    }
    write_results("train_vs_ddp", result)
    header = ("", "first epoch with decoding", "first epoch", "later epochs, images/s", "waiting for data")
    names = ("first_images_per_second_with_decoding", "first_images_per_second", "later_images_per_second")
    rows = [(kind, *(found[kind][name] for name in names), f"{found[kind]['later_wait_share']:.1%}") for kind in KINDS]
    print_table(header, rows)


if __name__ == "__main__":
    main()
