"""One, two and four nodes: what the driver and Ray leave of twice and four times the nodes.

This machine has too few cores for four nodes that compute, so the actors here sleep for a fixed time an image in place of
reading, decoding and predicting; everything else is a real `score` run on a Ray cluster of local nodes of one logical
CPU each: freeze, blocks, actors, markers, a file of rows a block, progress, publish. A node that sleeps is a perfect
node, so the limit is nodes / seconds an image, and what is missing from it is the share of the driver, of Ray, and of actors
that wait for the last block. Not in it: cores, memory, network and stores that nodes share, and nodes on other machines.

    python benchmarks/nodes.py [--nodes 1 2 4] [--images 1600] [--seconds 0.1] [--repeats 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from facts import machine, print_table, write_results

CLASSES = ("cavity", "consolidation", "nodule")


class SleepingActor:
    """In the place of `scoring.actors.ScoringActor`."""

    seconds = 0.0

    def __init__(self, settings: Any) -> None:
        self._folder = settings.run_folder

    def __call__(self, block: pa.Table) -> pa.Table:
        from medvision_ray.scoring.attempts import block_attempt
        from medvision_ray.scoring.rows import SCORED, to_table, write_rows

        entries = block.to_pylist()
        with block_attempt(self._folder, "prepare", entries):
            time.sleep(self.seconds * len(entries))
            rows = [
                {"status": SCORED, **{name: entry[name] for name in ("image_id", "uri", "etag")}} for entry in entries
            ]
            write_rows(to_table(rows, CLASSES), self._folder)
        return pa.table({"rows": pa.array([len(entries)], pa.int64())})


def run(nodes: int, images: int, seconds: float, folder: Path) -> dict[str, float]:
    """One whole run on so many nodes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from nothing_new import make_bundle
    from ray.cluster_utils import Cluster

    from medvision_ray.config import ScoreJob, build_job
    from medvision_ray.scoring import pipeline
    from medvision_ray.scoring.run import score

    SleepingActor.seconds = seconds
    pipeline.ScoringActor = SleepingActor  # type: ignore[misc]
    names = pa.table(
        {"uri": [f"{number}.dcm" for number in range(images)], "etag": ["e"] * images, "size": [1] * images}
    )
    pq.write_table(names, folder / "list.parquet")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        settings = {
            "archive": {"uri": str(folder), "list_file": str(folder / "list.parquet")},
            "bundle": make_bundle(folder / "bundle"),
            "output": str(folder / "output"),
            "privacy": {"demo_key": True},
            "ray": {"address": cluster.address},
        }
        summary = score(build_job(ScoreJob, settings, "the benchmark"), lambda line, **_: None)
    finally:
        cluster.shutdown()
    if summary.scored != images or not summary.images_per_second:
        raise SystemExit(f"Expected {images} scored objects, but got {summary}")
    busy = images / summary.images_per_second
    return {
        "images_per_second": summary.images_per_second,
        "share_of_the_limit": summary.images_per_second * seconds / nodes,
        "busy_seconds": busy,
        "seconds_to_the_first_block": summary.seconds["score"] - busy,
        "publish_seconds": summary.seconds["publish"],
    }


def main() -> None:
    """Each number of nodes in turn, so often; each run in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--seconds", type=float, default=0.1, help="an actor sleeps for an image")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder = Path(tempfile.mkdtemp(prefix="nodes-"))
        try:
            sys.stdout.write(json.dumps(run(options.one, options.images, options.seconds, folder)) + "\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    runs: dict[int, list[dict[str, float]]] = {nodes: [] for nodes in options.nodes}
    for _ in range(options.repeats):
        for nodes, found in runs.items():
            command = [sys.executable, __file__, "--one", str(nodes), "--images", str(options.images)]
            command += ["--seconds", str(options.seconds)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            sys.stderr.write(f"{nodes}: {found[-1]}\n")
    medians = {
        n: {k: round(statistics.median(run[k] for run in found), 3) for k in found[0]} for n, found in runs.items()
    }
    result = {
        "images": options.images,
        "seconds_an_image": options.seconds,
        "repeats": options.repeats,
        "medians": medians,
        "machine": machine("ray", "pyarrow"),
        "runs": runs,
    }
    write_results("nodes", result)
    print_table(
        ("nodes", "images/s", "limit", "share", "to the first block s", "publish s"),
        [
            (
                nodes,
                round(found["images_per_second"], 1),
                round(nodes / options.seconds, 1),
                round(found["share_of_the_limit"], 2),
                *(round(found[name], 1) for name in ("seconds_to_the_first_block", "publish_seconds")),
            )
            for nodes, found in medians.items()
        ],
    )


if __name__ == "__main__":
    main()
