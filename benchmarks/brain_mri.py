"""Train the hybrid on the brain MRI slices and measure it on the given test split.

Rows of the label table whose image is not an image file are left out of the table that is trained on, and counted.
Writes benchmarks/results/brain_mri.json. Running it again finds the training done and measures only.

    python benchmarks/brain_mri.py --output FOLDER [--labels FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "brain_mri.json"
TRAINING: dict[str, Any] = {
    "name": "brain-mri",
    "preprocess": {"size": [192, 192]},
    "augment": {"rotate_degrees": 15.0, "scale": [0.85, 1.15]},
    "epochs": 9,
    "freeze_epochs": 1,
    "batch_size": 8,
    "learning_rate": 0.001,
    "layer_decay": 0.9,
    "privacy": {"demo_key": True},
}
MODEL = {"encoder": "mobilenet_v2", "decoder_channels": [128, 64, 48, 32, 16]}


def usable_labels(table: Path, target: Path) -> dict[str, int]:
    """Copy the rows whose image is an image file; returns how many rows there were and are."""
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    kept = [row for row in rows if row["image"].lower().endswith((".jpg", ".jpeg", ".png"))]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
    return {"rows": len(rows), "images": len(kept)}


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--labels", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("MEDVISION_DATA", ROOT / "../shared/data")).resolve()
    labels = options.labels or options.output / "brain_mri_labels.csv"
    counts = usable_labels(data / "brain_mri" / "labels.csv", labels)

    from medvision_ray.config import EvaluateJob, TrainJob, build_job
    from medvision_ray.evaluation.evaluate import evaluate
    from medvision_ray.learning.train import train

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    source = {"table": str(labels), "root": str(data / "brain_mri")}
    weights = str(data / "weights" / "mobilenet_v2_imagenet.safetensors")
    settings = {**TRAINING, "output": str(options.output), "labels": source, "model": {**MODEL, "weights": weights}}
    trained = train(build_job(TrainJob, settings, "the benchmark"), say)
    question = {
        "output": str(options.output),
        "labels": source,
        "bundle": trained.bundle.uri,
        "dataset": "brain_mri",
        "privacy": {"demo_key": True},
    }
    found = evaluate(build_job(EvaluateJob, question, "the benchmark"), say)
    result = {
        "label_table": counts,
        "test_images": found.images,
        "failed": found.failed,
        "model_id": found.model_id,
        "settings": {**TRAINING, "model": MODEL},
        "history": trained.history,
        "metrics": [asdict(row) for row in found.metrics],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for row in found.metrics:
        if row.subgroup == "all" and row.class_name in ("all", "macro") and row.value is not None:
            sys.stdout.write(f"{row.class_name} {row.metric} {row.value:.4f} [{row.ci_low}, {row.ci_high}]\n")


if __name__ == "__main__":
    main()
