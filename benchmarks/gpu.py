"""Scoring and training images/s on a GPU, beside a plain torch DataLoader loop and what bounds both.

Real chest X-rays, a small CNN and a MobileNetV2 hybrid at 224 pixels (random weights from a seed: speed does not hang
on them). Without a GPU everything runs on the CPU, which tries the script and measures nothing.

- network: the forward pass alone, on frames that lie on the GPU, by CUDA events; median.
- predictor: this package's `Predictor`: also uint8 frames from the host's memory in and probabilities and maps back.
- prepare: CPU-seconds an image of reading, decoding and preprocessing, with one process a core at once.
- peer: a DataLoader with a worker a core but one, which read, decode and preprocess with this package's functions, and a
  plain torch loop: same network, precision and batch size, pinned memory, channels_last, inference mode. It stops at
  probabilities and mask maps in the host's memory. Everything after its tenth batch counts.
- project: `medvision score`, plan staged, as it comes: also masks back on the source grid, compressed, rows written.
  Steady state is the middle three fifths of the rows by their own time stamps.
- limit: the smaller of cores divided by the CPU-seconds of `prepare`, and the predictor's best rate in this precision.
- training: images/s of the loop (one worker, after its first epoch), decoding left out, as metrics.jsonl has it.

    python benchmarks/gpu.py [--objects 16000] [--part predictor --part score --part train]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import RESULTS, machine, print_table, write_results
from score_vs_dataloader import MODELS, make_bundle, sample

PRECISIONS = ("bf16", "float32")
BATCHES = (16, 64, 256)
BATCH = 128
TRAINING = (("small CNN", 16), ("MobileNetV2 hybrid", 64))
_SECONDS = 1.0
_WARM_UP = 10
CORES = os.cpu_count() or 1


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def predictor(bundle_uri: str, _: str) -> dict[str, Any]:
    """Rates of the network and of the predictor by precision and batch size."""
    from medvision_ray.bundle import load_bundle

    bundle = load_bundle(bundle_uri)
    return {precision: {str(batch): _rates(bundle, precision, batch) for batch in BATCHES} for precision in PRECISIONS}


def _rates(bundle: Any, precision: str, batch: int) -> dict[str, float]:
    import numpy as np

    from medvision_ray.scoring.predictor import Predictor

    model = Predictor(bundle, precision, device_name(), batch_frames=batch)
    shape = (batch, bundle.preprocess.channels, *bundle.preprocess.size)
    frames = [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in range(4)]
    for _ in model.stream(frames):  # kernels are chosen and memory is taken
        pass
    done = 0
    started = time.perf_counter()

    def until_time_is_up() -> Any:
        for number in range(1_000_000):
            if time.perf_counter() - started > _SECONDS:
                return
            yield frames[number % len(frames)]

    for prediction, _seconds in model.stream(until_time_is_up()):
        assert prediction.masks is None or prediction.masks.shape[0] == batch
        done += batch
    whole = done / (time.perf_counter() - started)
    return {"network": round(_network_rate(model, frames), 1), "predictor": round(whole, 1)}


def _network_rate(model: Any, frames: list[Any]) -> float:
    """Median of single passes."""
    import torch

    batches = [torch.from_numpy(part).to(model.device) for part in frames]
    times = []
    with torch.inference_mode():
        started = time.perf_counter()
        while time.perf_counter() - started < _SECONDS / 2:
            before = time.perf_counter()
            if model.device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                model._compute(batches[len(times) % len(batches)])
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last) / 1000)
            else:
                model._compute(batches[len(times) % len(batches)])
                times.append(time.perf_counter() - before)
    return len(frames[0]) / statistics.median(times)


def prepare(_: str, listing: str) -> dict[str, float]:
    """CPU-seconds an image of this one process, after it was told to begin."""
    import cv2

    from medvision_ray.config import DecodeConfig, PreprocessConfig
    from medvision_ray.native import reuse_freed_memory
    from medvision_ray.scoring.objects import Effort, ObjectReader

    cv2.setNumThreads(1)
    reuse_freed_memory()
    reader = ObjectReader(DecodeConfig(), PreprocessConfig(), None)
    uris = json.loads(Path(listing).read_text())

    def one(number: int) -> None:
        reader.prepare(reader.read(uris[number % len(uris)], "", Effort()), Effort())

    one(0)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begun, cpu, images = time.monotonic(), time.process_time(), 0
    while time.monotonic() - begun < 2 * _SECONDS:
        one(images)
        images += 1
    return {"cpu_per_image": (time.process_time() - cpu) / images}


def prepare_cost(listing: str) -> float:
    """Mean CPU-seconds an image, one process a core at once."""
    command = [sys.executable, __file__, "--child", "prepare", "--bundle", "-", "--input", listing]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(CORES)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    found = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    return statistics.mean(run["cpu_per_image"] for run in found)


def peer(bundle_uri: str, listing: str) -> dict[str, float]:
    """A DataLoader and a plain torch loop."""
    import cv2
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import DecodeConfig
    from medvision_ray.precision import runs_in_bf16
    from medvision_ray.scoring.objects import Effort, ObjectReader

    device = device_name()
    bundle = load_bundle(bundle_uri)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    uris = json.loads(Path(listing).read_text())

    class Images(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(uris)

        def __getitem__(self, index: int) -> Any:
            effort = Effort()
            return torch.from_numpy(
                np.ascontiguousarray(reader.prepare(reader.read(uris[index], "", effort), effort).pixels[0])
            )

    model = bundle.build_model().eval().to(device).to(memory_format=torch.channels_last)
    bf16 = runs_in_bf16("auto", device)

    @torch.inference_mode()
    def predict(pixels: Any) -> None:
        batch = pixels.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = model(batch)
        if output.logits is not None:
            output.logits.float().softmax(dim=1).cpu().numpy()
        if output.mask_logits is not None:
            output.mask_logits.float().sigmoid().cpu().numpy()

    loader = DataLoader(
        Images(),
        batch_size=BATCH,
        num_workers=max(1, CORES - 1),
        pin_memory=device == "cuda",
        worker_init_fn=lambda _: cv2.setNumThreads(1),
    )
    images, begun = 0, 0.0
    for number, batch in enumerate(loader):
        predict(batch)
        if number == min(_WARM_UP, len(loader) // 3):
            begun = time.monotonic()
        elif begun:
            images += len(batch)
    return {"images_per_second": images / (time.monotonic() - begun)}


def project(bundle_uri: str, folder: str) -> dict[str, Any]:
    """One whole scoring run, plan staged, with a Ray of its own and empty tables."""
    from medvision_ray import tables
    from medvision_ray.cluster import ray_session
    from medvision_ray.config import RayConfig, ScoreJob, build_job
    from medvision_ray.logs import silent
    from medvision_ray.scoring.pipeline import plan
    from medvision_ray.scoring.run import score

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as output, ray_session(RayConfig()):
        settings = {
            "archive": {"uri": folder},
            "bundle": bundle_uri,
            "output": output,
            "privacy": {"demo_key": True},
            "scoring": {"batch_size": BATCH, "placement": "staged"},
        }
        job = build_job(ScoreJob, settings, "the benchmark")
        sentence = plan(job.scoring, sum(1 for _ in Path(folder).iterdir())).sentence()
        summary = score(job, silent)
        total = time.monotonic() - started
        rows = tables.read(output, "predictions", ["scored_at"])
    times = sorted(moment.timestamp() for moment in rows["scored_at"].to_pylist()) if rows is not None else []
    low, high = len(times) // 5, 4 * len(times) // 5
    steady = (high - low) / (times[high] - times[low])
    return {
        "images_per_second": steady,
        "images_per_second_of_the_pass": summary.images_per_second or 0.0,
        "startup_seconds": total - len(times) / steady,
        "failed": summary.failed,
        "placement": sentence,
    }


def training(table: str, name: str, batch: int) -> dict[str, float]:
    """Median images/s of the epochs after the first."""
    from medvision_ray.config import TrainJob, build_job
    from medvision_ray.learning.train import train

    with tempfile.TemporaryDirectory() as output:
        settings = {
            "output": output,
            "name": "bench",
            "labels": {"table": table},
            "model": {**MODELS[name], "segmentation": False} if name == "small CNN" else MODELS[name],
            "epochs": 4,
            "batch_size": batch,
            "workers": 1,
            "privacy": {"demo_key": True},
        }
        history = train(build_job(TrainJob, settings, "the benchmark"), lambda line: None).history
    later = history[1:]
    return {
        "images_per_second": round(statistics.median(epoch["images_per_second"] for epoch in later), 1),
        "wait_share": round(statistics.median(epoch["wait_seconds"] / epoch["seconds"] for epoch in later), 3),
        "last_train_loss": round(history[-1]["train_loss"], 4),
    }


def label_table(data: Path, images: int, folder: Path) -> str:
    """A label table of some chest X-rays, no image twice; the splits are made by patient."""
    import csv

    seen: set[bytes] = set()
    with (data / "chest_xray" / "labels.csv").open() as source, (folder / "labels.csv").open("w") as target:
        rows = [row for row in csv.DictReader(source) if row["split"] == "train"]
        out = csv.writer(target)
        out.writerow(("image", "label", "patient_id"))
        for row in rows[:: max(1, len(rows) // images)][:images]:
            path = (data / "chest_xray" / row["image"]).resolve()
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in seen:
                out.writerow((path, row["label"], row["patient_id"]))
            seen.add(digest)
    return str(folder / "labels.csv")


def _child(*arguments: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.stderr.write(run.stderr[-3000:])
        raise SystemExit(f"{' '.join(arguments[:4])} failed")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def score_case(bundle: str, archive: str, objects: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Peer and project, interleaved; medians."""
    listing = sample(archive, objects, scratch)
    runs: dict[str, list[dict[str, Any]]] = {"project": [], "peer": []}
    for _ in range(repeats):
        for name, found in runs.items():
            place = str(scratch / "archive") if name == "project" else listing
            found.append(_child("--child", name, "--bundle", bundle, "--input", place))
            sys.stderr.write(f"{name}: {found[-1]}\n")
    medians = {name: statistics.median(run["images_per_second"] for run in found) for name, found in runs.items()}
    cost = prepare_cost(listing)
    return {
        "project": round(medians["project"], 1),
        "peer": round(medians["peer"], 1),
        "ratio_to_peer": round(medians["project"] / medians["peer"], 3),
        "prepare_cpu_seconds": cost,
        "cpu_limit": round(CORES / cost, 1),
        "objects": objects,
        "runs": runs,
    }


def _facts() -> dict[str, Any]:
    import torch

    from medvision_ray.precision import runs_in_bf16

    return {
        **machine("torch", "torchvision", "ray", "numpy", "imagecodecs"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "precision": "bf16" if runs_in_bf16("auto", device_name()) else "float32",
    }


def main() -> None:
    """Measure the parts that are asked for, and write and print them."""
    data = Path(os.environ.get("MEDVISION_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=16000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000, help="images of the training")
    parser.add_argument("--part", action="append", choices=("predictor", "score", "train"))
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("predictor", "prepare", "peer", "project", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "train":
        name, batch = TRAINING[int(options.bundle)]
        sys.stdout.write(json.dumps(training(options.input, name, batch)) + "\n")
        return
    if options.child:
        children = {"predictor": predictor, "prepare": prepare, "peer": peer, "project": project}
        sys.stdout.write(json.dumps(children[options.child](options.bundle, options.input)) + "\n")
        return
    parts = options.part or ["predictor", "score", "train"]
    place = RESULTS / "gpu.json"
    result: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    result["machine"] = _facts()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {name: make_bundle(name, Path(scratch)) for name in MODELS}
        if "predictor" in parts:
            result["predictor"] = {
                name: _child("--child", "predictor", "--bundle", uri, "--input", "-") for name, uri in bundles.items()
            }
            write_results("gpu", result)
        if "score" in parts:
            result["score"] = {}
            for name, uri in bundles.items():
                folder = Path(scratch) / f"score {name}"
                folder.mkdir()
                result["score"][name] = score_case(
                    uri, str(data / "chest_xray"), options.objects, options.repeats, folder
                )
                write_results("gpu", result)
        if "train" in parts:
            table = label_table(data, options.images, Path(scratch))
            result["train"] = {
                f"{name}, batch {batch}": _child("--child", "train", "--bundle", str(number), "--input", table)
                for number, (name, batch) in enumerate(TRAINING)
            }
    _bound(result)
    write_results("gpu", result)
    _print(result)


def _bound(result: dict[str, Any]) -> None:
    """The limit of each scored model, where its predictor was measured too."""
    for name, case in result.get("score", {}).items():
        rates = result.get("predictor", {}).get(name, {}).get(result["machine"]["precision"], {})
        best = max((rate["predictor"] for rate in rates.values()), default=None)
        case["limit"] = case["cpu_limit"] if best is None else min(case["cpu_limit"], best)
        case["ratio_to_limit"] = round(case["project"] / case["limit"], 3)


def _print(result: dict[str, Any]) -> None:
    print_table(
        ("model", "precision", "batch", "network/s", "predictor/s"),
        [
            (name, precision, batch, rate["network"], rate["predictor"])
            for name, by_precision in result.get("predictor", {}).items()
            for precision, rates in by_precision.items()
            for batch, rate in rates.items()
        ],
    )
    print_table(
        ("model", "ours", "peer", "ratio", "cpu limit", "limit", "share"),
        [
            (name, *(case[key] for key in ("project", "peer", "ratio_to_peer", "cpu_limit", "limit", "ratio_to_limit")))
            for name, case in result.get("score", {}).items()
        ],
    )
    print_table(
        ("training", "images/s", "wait share"),
        [(name, case["images_per_second"], case["wait_share"]) for name, case in result.get("train", {}).items()],
    )


if __name__ == "__main__":
    main()
