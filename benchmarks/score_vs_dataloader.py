"""Scoring images/s beside a plain torch DataLoader loop, the field's own style, and the machine's limit.

Real chest X-rays and CT DICOM, a small CNN and a MobileNetV2 hybrid (random weights from a seed: speed does not
hang on them), interleaved in one run, medians. All run the same model on the same images:

The mask head's bias is set so that few pixels are lesion, as on a real archive; with `--dense-masks` it is left at
random, and every image gets a mask of noise, which is the most that carrying back and compressing can cost.

- project: `medvision score` as it comes: also masks back on the source grid, compressed, rows committed. Steady state
  is the middle three fifths of the rows by their own time stamps; start-up is what else the run took.
- peer: a DataLoader with 2 workers that reads, decodes and preprocesses with this package's functions, and a plain
  torch loop (the same network, precision and batch size, channels_last, inference mode) that stops at probabilities and
  mask maps. Everything after its first batch counts.
- field: float32, batch of 1, serial, scikit-image and pydicom for reading and resizing, in the style of
  TorchXRayVision's batch script; on a tenth of the images.
- limit: cores divided by the CPU-seconds an image of bare decode, preprocess and forward in one process and thread,
  with this package's predictor and allocator setting, while the other cores do the same: so many bare processes at
  once, which write nothing. `one_process_limit` is the same for one process on an otherwise idle machine.

The precision is `auto`: bf16 where the processor has its instructions, else float32; the results say which.

    python benchmarks/score_vs_dataloader.py [--objects 1000] [--repeats 2] [--archive FOLDER ...]
"""

from __future__ import annotations

import argparse
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

from medvision_ray.precision import runs_in_bf16

BATCH = 16
_BARE_SECONDS = 8.0
MODELS = {
    "small CNN": {"encoder": "tu-mobilenetv3_small_050", "decoder_channels": (16, 16, 8, 8, 8)},
    "MobileNetV2 hybrid": {"encoder": "mobilenet_v2", "decoder_channels": (128, 64, 48, 32, 16)},
}
ARCHIVES = ("chest_xray", "chest_ct_dicom")


def peer(bundle_uri: str, listing: str) -> dict[str, float]:
    """A DataLoader and a plain torch loop."""
    started = time.monotonic()
    import cv2
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import DecodeConfig
    from medvision_ray.precision import runs_in_bf16
    from medvision_ray.scoring.objects import Effort, ObjectReader

    bundle = load_bundle(bundle_uri)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    uris = json.loads(Path(listing).read_text())

    class Images(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(uris)

        def __getitem__(self, index: int) -> Any:
            effort = Effort()
            return reader.prepare(reader.read(uris[index], "", effort), effort).pixels[0]

    model = bundle.build_model().eval().to(memory_format=torch.channels_last)
    bf16 = runs_in_bf16("auto", "cpu")

    @torch.inference_mode()
    def predict(pixels: Any) -> None:
        batch = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(batch)
        if output.logits is not None:
            output.logits.float().softmax(dim=1).numpy()
        if output.mask_logits is not None:
            output.mask_logits.float().sigmoid().numpy()

    loader = DataLoader(
        Images(),
        batch_size=BATCH,
        num_workers=2,
        collate_fn=np.stack,
        worker_init_fn=lambda _: cv2.setNumThreads(1),
    )
    batches = iter(loader)
    predict(next(batches))
    begun = time.monotonic()
    images = 0
    for batch in batches:
        predict(batch)
        images += len(batch)
    return {"images_per_second": images / (time.monotonic() - begun), "startup_seconds": begun - started}


def bare(bundle_uri: str, listing: str) -> dict[str, float]:
    """Decode, preprocess and forward in this one process and thread, and what they cost."""
    import cv2
    import numpy as np
    import torch

    from medvision_ray.bundle import load_bundle
    from medvision_ray.config import DecodeConfig
    from medvision_ray.native import reuse_freed_memory
    from medvision_ray.scoring.objects import Effort, ObjectReader
    from medvision_ray.scoring.predictor import Predictor

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    reuse_freed_memory()
    bundle = load_bundle(bundle_uri)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    predictor = Predictor(bundle, device="cpu")
    uris = json.loads(Path(listing).read_text())
    batches = [uris[start : start + BATCH] for start in range(0, len(uris), BATCH)]

    def predict(batch: list[str]) -> None:
        pixels = [reader.prepare(reader.read(uri, "", Effort()), Effort()).pixels[0] for uri in batch]
        predictor.predict(np.stack(pixels))

    predict(batches[0])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begun, cpu = time.monotonic(), time.process_time()
    images = 0
    while time.monotonic() - begun < _BARE_SECONDS:
        predict(batches[1 + images // BATCH % (len(batches) - 1)])
        images += BATCH
    used = time.process_time() - cpu
    return {"cpu_per_image": used / images, "images_per_second": images / (time.monotonic() - begun)}


def limits(bundle_uri: str, listing: str) -> dict[str, float]:
    """Cores divided by the CPU-seconds an image: of one bare process a core at once, and of one alone."""
    cores = os.cpu_count() or 1
    together = _bare_processes(bundle_uri, listing, cores)
    alone = _bare_processes(bundle_uri, listing, 1)[0]
    cpu = statistics.mean(run["cpu_per_image"] for run in together)
    return {
        "cpu_per_image": cpu,
        "limit": cores / cpu,
        "bare_processes": sum(run["images_per_second"] for run in together),
        "one_process_limit": cores / alone["cpu_per_image"],
    }


def _bare_processes(bundle_uri: str, listing: str, count: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--bundle", bundle_uri, "--child", "bare", "--input", listing]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    return [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]


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
            "scoring": {"batch_size": BATCH, "block_rows": 64},
            "ray": {"num_cpus": os.cpu_count()},
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


def field(bundle_uri: str, listing: str) -> dict[str, float]:
    """float32, one image at a time, in one process with torch's own threads."""
    import numpy as np
    import pydicom
    import skimage.io
    import skimage.transform
    import torch

    from medvision_ray.bundle import load_bundle

    bundle = load_bundle(bundle_uri)
    model = bundle.build_model()
    uris = json.loads(Path(listing).read_text())[::10]
    started = time.monotonic()
    for uri in uris:
        pixels = pydicom.dcmread(uri).pixel_array if uri.endswith(".dcm") else skimage.io.imread(uri, as_gray=True)
        grey = pixels.astype(np.float32)
        grey = 255 * (grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)
        small = skimage.transform.resize(grey, bundle.preprocess.size, preserve_range=True).astype(np.float32)
        with torch.no_grad():
            output = model(torch.from_numpy(small)[None, None])
            if output.logits is not None:
                output.logits.softmax(dim=1).numpy()
    return {"images_per_second": len(uris) / (time.monotonic() - started)}


def make_bundle(name: str, folder: Path, *, dense_masks: bool = False) -> str:
    """A bundle with random weights."""
    import torch

    from medvision_ray.bundle import save_bundle
    from medvision_ray.config import ModelConfig, PreprocessConfig
    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    architecture, preprocess = ModelConfig.model_validate(MODELS[name]), PreprocessConfig()
    model = build_model(architecture, preprocess, 3)
    if not dense_masks and model.segmentation_head is not None:
        for layer in model.segmentation_head.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None:
                torch.nn.init.constant_(layer.bias, -6.0)
    place = str(folder / name.replace(" ", "-"))
    save_bundle(
        place,
        name=name.replace(" ", "-"),
        architecture=architecture,
        preprocess=preprocess,
        classes=("a", "b", "c"),
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=model,
    )
    return place


def _child(*arguments: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def sample(archive: str, objects: int, folder: Path) -> str:
    """Links to evenly spread images of the archive, each several times where it has too few, and their list."""
    images = sorted(
        p for p in Path(archive).resolve().rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm")
    )
    spread = images[:: max(1, len(images) // objects)]
    chosen = (spread * -(-objects // len(spread)))[:objects]
    (folder / "archive").mkdir(parents=True)
    for number, path in enumerate(chosen):
        (folder / "archive" / f"{number:06d}{path.suffix}").symlink_to(path)
    listing = folder / "list.json"
    listing.write_text(json.dumps([str(path) for path in chosen]))
    return str(listing)


def measure(bundle: str, archive: str, objects: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """One model on one archive: medians and ratios of interleaved runs."""
    listing = sample(archive, objects, scratch)
    runs: dict[str, list[dict[str, float]]] = {"project": [], "peer": [], "field": [], "limit": []}
    for _ in range(repeats):
        for name, found in runs.items():
            place = str(scratch / "archive") if name == "project" else listing
            found.append(_child("--bundle", bundle, "--child", name, "--input", place))
            sys.stderr.write(f"{name}: {found[-1]}\n")
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        for name, found in runs.items()
    }
    limit = medians["limit"]["limit"]

    def ratio(name: str) -> float:
        pairs = zip(runs["project"], runs[name], strict=True)
        return round(statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs), 3)

    return {
        "medians": medians,
        "ratio_to_peer": ratio("peer"),
        "ratio_to_field": ratio("field"),
        "limit_images_per_second": round(limit, 1),
        "ratio_to_limit": round(
            statistics.median(
                ours["images_per_second"] / bound["limit"]
                for ours, bound in zip(runs["project"], runs["limit"], strict=True)
            ),
            3,
        ),
        "precision": "bf16" if runs_in_bf16("auto", "cpu") else "float32",
        "objects": objects,
        "repeats": repeats,
        "machine": machine("torch", "ray", "numpy", "imagecodecs", "opencv-python-headless", "pydicom"),
        "runs": runs,
    }


def main() -> None:
    """Interleave the four on each archive and model, and write medians."""
    data = Path(os.environ.get("MEDVISION_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", action="append", help="a folder of images; default: those of MEDVISION_DATA")
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dense-masks", action="store_true", help="every image gets a mask of noise")
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("peer", "limit", "bare", "project", "field"), help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        children = {"project": project, "peer": peer, "field": field, "limit": limits, "bare": bare}
        sys.stdout.write(json.dumps(children[options.child](options.bundle, options.input)) + "\n")
        return
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for archive in options.archive or [str(data / name) for name in ARCHIVES]:
            for name in MODELS:
                case = f"{Path(archive).name}, {name}"
                sys.stderr.write(f"{case}\n")
                place = Path(scratch) / case.replace(" ", "-")
                place.mkdir()
                cases[case] = measure(
                    make_bundle(name, place, dense_masks=options.dense_masks),
                    archive,
                    options.objects,
                    options.repeats,
                    place,
                )
    name = "score_vs_dataloader_dense" if options.dense_masks else "score_vs_dataloader"
    place = RESULTS / f"{name}.json"
    known = json.loads(place.read_text())["cases"] if place.exists() else {}
    write_results(name, {"cases": {**known, **cases}})  # cases of other archives stay
    print_table(
        ("archive, model", "ours", "peer", "ratio", "field", "ratio", "limit", "share", "CPU ms", "start-up s"),
        [
            (
                name,
                *(case["medians"]["project"]["images_per_second"], case["medians"]["peer"]["images_per_second"]),
                *(case["ratio_to_peer"], case["medians"]["field"]["images_per_second"], case["ratio_to_field"]),
                *(case["limit_images_per_second"], case["ratio_to_limit"]),
                round(1000 * case["medians"]["limit"]["cpu_per_image"], 1),
                case["medians"]["project"]["startup_seconds"],
            )
            for name, case in cases.items()
        ],
    )


if __name__ == "__main__":
    main()
