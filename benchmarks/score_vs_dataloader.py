"""Scoring images/s beside a plain torch DataLoader loop with 2 workers, interleaved in one run.

Both read, decode and preprocess with this package's functions and run the same bundle in bf16 and
channels_last at the same batch size. The peer stops at probabilities and mask maps; the project also
carries masks back to the source grid, compresses them, and commits rows. Each figure is the median
over repeats. Steady state is, for the project, the middle three fifths of the rows by their own time stamps;
for the peer, everything after its first batch. Start-up is what else the run took (Ray, actors, model loading,
the last blocks, publishing; for the peer, worker start and model loading). Writes benchmarks/results/score_vs_dataloader.json.

    python benchmarks/score_vs_dataloader.py --bundle URI --archive FOLDER [--objects 2000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "score_vs_dataloader.json"
BATCH = 16


def peer(bundle_uri: str, listing: str, limit_only: bool) -> dict[str, float]:
    """The DataLoader loop; with `limit_only`, decode, preprocess and forward in this one process and thread."""
    started = time.monotonic()
    import cv2
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import DecodeConfig
    from medvision_ray.scoring.objects import Effort, ObjectReader
    from medvision_ray.scoring.predictor import Predictor

    cv2.setNumThreads(1)
    bundle = load_bundle(bundle_uri)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    uris = json.loads(Path(listing).read_text())

    class Images(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(uris)

        def __getitem__(self, index: int) -> Any:
            effort = Effort()
            return reader.prepare(reader.read(uris[index], "", effort), effort).pixels[0]

    if limit_only:
        torch.set_num_threads(1)
    predictor = Predictor(bundle, "bf16", "cpu")
    loader = DataLoader(
        Images(),
        batch_size=BATCH,
        num_workers=0 if limit_only else 2,
        collate_fn=np.stack,
        worker_init_fn=lambda _: cv2.setNumThreads(1),
    )
    batches = iter(loader)
    first = next(batches)
    predictor.predict(first)
    begun, cpu = time.monotonic(), time.process_time()
    images = 0
    for batch in batches:
        predictor.predict(batch)
        images += len(batch)
    seconds = time.monotonic() - begun
    used = time.process_time() - cpu
    return {"images_per_second": images / seconds, "startup_seconds": begun - started, "cpu_per_image": used / images}


def project(bundle_uri: str, folder: str) -> dict[str, float]:
    """One whole scoring run with a Ray of its own and empty tables."""
    from medvision_ray import tables
    from medvision_ray.config import ScoreJob, build_job
    from medvision_ray.logs import silent
    from medvision_ray.scoring.run import score

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "archive": {"uri": folder},
            "bundle": bundle_uri,
            "output": output,
            "privacy": {"demo_key": True},
            "scoring": {"batch_size": BATCH, "block_rows": 128},
        }
        summary = score(build_job(ScoreJob, settings, "the benchmark"), silent)
        total = time.monotonic() - started
        rows = tables.read(output, "predictions", ["scored_at"])
    times = sorted(moment.timestamp() for moment in rows["scored_at"].to_pylist()) if rows is not None else []
    low, high = len(times) // 5, 4 * len(times) // 5
    steady = (high - low) / (times[high] - times[low])
    return {
        "images_per_second": steady,
        "images_per_second_of_the_pass": summary.images_per_second or 0.0,
        "startup_seconds": total - len(times) / steady,
        "failed": float(summary.failed),
    }


def _child(*arguments: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _sample(archive: str, objects: int, folder: Path) -> str:
    """Links to evenly spread images of the archive, and their list."""
    images = sorted(
        p for p in Path(archive).resolve().rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm")
    )
    chosen = images[:: max(1, len(images) // objects)][:objects]
    (folder / "archive").mkdir()
    for number, path in enumerate(chosen):
        (folder / "archive" / f"{number:06d}{path.suffix}").symlink_to(path)
    listing = folder / "list.json"
    listing.write_text(json.dumps([str(path) for path in chosen]))
    return str(listing)


def main() -> None:
    """Interleave the three and write medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--archive")
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("peer", "limit", "project"))
    parser.add_argument("--input")
    options = parser.parse_args()
    if options.child:
        result = (
            project(options.bundle, options.input)
            if options.child == "project"
            else peer(options.bundle, options.input, options.child == "limit")
        )
        sys.stdout.write(json.dumps(result) + "\n")
        return
    runs: dict[str, list[dict[str, float]]] = {"project": [], "peer": [], "limit": []}
    with tempfile.TemporaryDirectory() as scratch:
        listing = _sample(options.archive, options.objects, Path(scratch))
        places = {"project": str(Path(scratch) / "archive"), "peer": listing, "limit": listing}
        for _ in range(options.repeats):
            for name, found in runs.items():
                found.append(_child("--bundle", options.bundle, "--child", name, "--input", places[name]))
                sys.stderr.write(f"{name}: {found[-1]}\n")
    cores = os.cpu_count() or 1
    table = {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        for name, found in runs.items()
    }
    limit = cores / table["limit"]["cpu_per_image"]
    pairs = [
        a["images_per_second"] / b["images_per_second"] for a, b in zip(runs["project"], runs["peer"], strict=True)
    ]
    result = {
        "medians": table,
        "ratio_to_peer": round(statistics.median(pairs), 3),
        "limit_images_per_second": round(limit, 1),
        "ratio_to_limit": round(table["project"]["images_per_second"] / limit, 3),
        "objects": options.objects,
        "repeats": options.repeats,
        "machine": {
            "cores": cores,
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
