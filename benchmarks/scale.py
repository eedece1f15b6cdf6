"""Cost per image at 1k, 10k and 100k objects: flat within 15 % is the goal.

Tiny PNG files (32 x 32, seeded) and the small CNN at 32 pixels, so that what the pipeline itself costs shows. The
peer is a multiprocessing pool over the same read, decode, preprocess and forward, which writes nothing.

    python benchmarks/scale.py [--sizes 1000 10000 100000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine, print_table, write_results

_STATE: dict[str, Any] = {}


def make_images(folder: Path, count: int) -> None:
    """Distinct tiny images in folders of 1,000."""
    import cv2

    noise = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number % 1000:03d}.png"), noise.integers(0, 255, (32, 32), np.uint8))


def make_bundle(folder: Path) -> str:
    """A small model for small images."""
    import torch

    from medvision_ray.bundle import save_bundle
    from medvision_ray.config import ModelConfig, PreprocessConfig
    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    architecture = ModelConfig(encoder="tu-mobilenetv3_small_050", segmentation=False)
    preprocess = PreprocessConfig(size=(32, 32))
    facts: dict[str, Any] = {"trained": {}, "metrics": {}, "train_digest": (), "thresholds": (), "mask_threshold": 0.5}
    model = build_model(architecture, preprocess, 2)
    place = str(folder / "bundle")
    save_bundle(
        place,
        name="tiny",
        architecture=architecture,
        preprocess=preprocess,
        classes=("a", "b"),
        multi_label=False,
        model=model,
        **facts,
    )
    return place


def project(archive: str, bundle: str, output: str) -> dict[str, float]:
    """One whole run."""
    settings = {"archive.uri": archive, "bundle": bundle, "output": output, "privacy.demo_key": "true"}
    settings["ray.num_cpus"] = str(os.cpu_count())
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    started = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - started
    summary = json.loads(done.stdout.splitlines()[-1])
    return {
        "ms_per_image": 1000 / summary["images_per_second"],
        "whole_run_seconds": seconds,
        "list_seconds": summary["seconds"]["list"],
        "publish_seconds": summary["seconds"]["publish"],
        "scored": summary["scored"],
    }


def _begin(bundle: str) -> None:
    import cv2
    import torch

    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import DecodeConfig
    from medvision_ray.native import reuse_freed_memory
    from medvision_ray.scoring.objects import ObjectReader
    from medvision_ray.scoring.predictor import Predictor

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    reuse_freed_memory()
    loaded = load_bundle(bundle)
    _STATE["reader"] = ObjectReader(DecodeConfig(), loaded.preprocess, None)
    _STATE["predictor"] = Predictor(loaded, "auto", "cpu")


def _batch(uris: list[str]) -> int:
    from medvision_ray.scoring.objects import Effort

    reader = _STATE["reader"]
    pixels = [reader.prepare(reader.read(uri, "", Effort()), Effort()).pixels[0] for uri in uris]
    _STATE["predictor"].predict(np.stack(pixels))
    return len(uris)


def pool(uris: list[str], bundle: str) -> float:
    """Milliseconds an image of a pool of processes, after its start."""
    batches = [uris[start : start + 16] for start in range(0, len(uris), 16)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _begin, (bundle,)) as workers:
        workers.map(_batch, batches[:8], chunksize=1)
        started = time.monotonic()
        count = sum(workers.imap_unordered(_batch, batches, chunksize=8))
        return 1000 * (time.monotonic() - started) / count


def main() -> None:
    """Each size once; the pool beside the middle one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = make_bundle(Path(scratch))
        for size in options.sizes:
            archive = Path(scratch) / f"archive-{size}"
            make_images(archive, size)
            found[str(size)] = project(str(archive), bundle, str(Path(scratch) / f"output-{size}"))
            uris = sorted(str(path) for path in archive.rglob("*.png"))[:10_000]
            found[str(size)]["pool_ms_per_image"] = pool(uris, bundle)
            sys.stderr.write(f"{size}: {found[str(size)]}\n")
    costs = [case["ms_per_image"] for case in found.values()]
    spread = max(costs) / min(costs) - 1
    write_results(
        "scale", {"sizes": found, "spread": round(spread, 3), "goal": 0.15, "machine": machine("ray", "torch")}
    )
    print_table(
        ("objects", "ms an image", "pool", "of the pool's speed", "list s", "publish s", "whole run s"),
        [
            (
                size,
                *(round(case["ms_per_image"], 2), round(case["pool_ms_per_image"], 2)),
                round(case["pool_ms_per_image"] / case["ms_per_image"], 2),
                *(round(case[name], 1) for name in ("list_seconds", "publish_seconds", "whole_run_seconds")),
            )
            for size, case in found.items()
        ],
    )
    sys.stdout.write(f"spread {spread:.0%}, goal 15 %\n")


if __name__ == "__main__":
    main()
