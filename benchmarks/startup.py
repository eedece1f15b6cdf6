"""Start-up: seconds from the command to the first scored image, and where they go, on a warm disk.

Runs `medvision score` on some images as a user does, several times, and reads the moments from its own JSON log
lines, from the first marker of a block, and from the rows' time stamps. The floor beside it is Ray alone: the same
machine, `ray.init` and one map_batches over actors that import torch, without anything of this package.

    python benchmarks/startup.py [--repeats 3] [--archive FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from facts import machine, print_table, write_results
from score_vs_dataloader import make_bundle

GOAL_SECONDS = 8.0
_FLOOR = """
import time; started = time.time()
import ray, ray.data
from ray.data import ActorPoolStrategy
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
class Bare:
    def __init__(self):
        import torch
    def __call__(self, batch):
        batch["at"] = [time.time()] * len(batch["id"])
        return batch
rows = ray.data.range(64, override_num_blocks=2).map_batches(Bare, compute=ActorPoolStrategy(size=2), num_cpus=0.4).take_all()
print(min(row["at"] for row in rows) - started)
"""


def run(archive: str, bundle: str, output: str) -> dict[str, float]:
    """One run's moments, in seconds from the command."""
    from medvision_ray import tables

    settings = {"archive.uri": archive, "bundle": bundle, "output": output, "privacy.demo_key": "true"}
    settings["ray.num_cpus"] = str(os.cpu_count())
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--log-format", "json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    started = time.time()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    moments: dict[str, float] = {}
    watch = threading.Thread(target=_first_marker, args=(Path(output), process, started, moments))
    watch.start()
    assert process.stderr is not None
    for line in process.stderr:
        fields = json.loads(line)
        if "total" in fields and "listed" not in moments:
            moments["listed"] = datetime.fromisoformat(fields["time"]).timestamp() - started
    if process.wait():
        raise SystemExit("the run failed")
    watch.join()
    rows = tables.read(output, "predictions", ["scored_at"])
    assert rows is not None
    times = [moment.timestamp() - started for moment in rows["scored_at"].to_pylist()]
    return {
        "command to inventory": moments["listed"],
        "Ray and actors, to the first block": moments["marker"] - moments["listed"],
        "first block, to its first row": min(times) - moments["marker"],
        "first scored image": min(times),
        "last row to the end": time.time() - started - max(times),
    }


def _first_marker(output: Path, process: subprocess.Popen[str], started: float, moments: dict[str, float]) -> None:
    while process.poll() is None:
        if any(output.glob("runs/*/inflight/*")):
            moments["marker"] = time.time() - started
            return
        time.sleep(0.02)


def main() -> None:
    """Repeat, write medians."""
    data = Path(os.environ.get("MEDVISION_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", default=str(data / "chest_xray"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs: list[dict[str, float]] = []
    floors: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "archive").mkdir()
        images = sorted(p for p in Path(options.archive).resolve().rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
        for number, path in enumerate(images[:64]):
            (folder / "archive" / f"{number:02d}{path.suffix}").symlink_to(path)
        bundle = make_bundle("MobileNetV2 hybrid", folder)
        for number in range(options.repeats + 1):
            found = run(str(folder / "archive"), bundle, str(folder / f"output-{number}"))
            floor = subprocess.run([sys.executable, "-c", _FLOOR], check=True, capture_output=True, text=True)
            if number:  # the first one warms the disk
                runs.append(found)
                floors.append(float(floor.stdout.split()[-1]))
    medians: dict[str, Any] = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
    floor_seconds = round(statistics.median(floors), 2)
    result = {"medians": medians, "floor_seconds": floor_seconds, "goal_seconds": GOAL_SECONDS, "runs": runs}
    write_results("startup", {**result, "floors": floors, "machine": machine("ray", "torch")})
    print_table(
        ("what", "seconds"),
        [*medians.items(), ("Ray alone, to its first row", floor_seconds), ("goal, first scored image", GOAL_SECONDS)],
    )


if __name__ == "__main__":
    main()
