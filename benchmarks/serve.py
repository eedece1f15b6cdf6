"""Serving beside the bare predictor: throughput at saturation, added latency, overload, a killed replica.

    python benchmarks/serve.py [--seconds 20] [--size 224]

The bare predictor is one process that decodes, prepares and scores in batches as large as the server's, with as many
threads: one, as a scoring actor does, or all. The server is `medvision serve` with one replica on loopback, behind Ray Serve's proxy
and behind HAProxy (`http.ingress`); its clients run on the same machine. Images are phantoms' DICOM files. Results go to
benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from facts import descendants, machine, print_table, write_results
from http_load import Load, load

from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.config import DecodeConfig, ModelConfig, PreprocessConfig, RayConfig
from medvision_ray.config.serving import HttpConfig, RequestLimits, ScaleConfig, ServeJob
from medvision_ray.demo.archive import make_archive
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.learning.model import build_model
from medvision_ray.native import reuse_freed_memory
from medvision_ray.scoring.objects import Effort, ObjectReader
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving.serve import serving

BATCH = 16
ENTRY = {"image_id": 0, "uri": "", "etag": ""}
_PAUSE_SECONDS, _ROUNDS = 0.02, 3
REPLICA = "ServeReplica:medvision"
Ingress = Literal["proxy", "haproxy"]
INGRESSES: tuple[Ingress, ...] = get_args(Ingress)
PARTS = {
    "haproxy": "haproxy -db",
    "proxy": "ProxyActor",
    "replica": REPLICA,
    "decoding": "medvision_ray.serving.tasks",
    "predicting": "medvision_ray.serving.predicting_process",
}


def make_bundle(folder: Path, size: int) -> Bundle:
    """A MobileNetV2 hybrid with random weights whose masks are empty, so that their drawing is not what is measured."""
    torch.manual_seed(0)
    architecture, preprocess = ModelConfig(), PreprocessConfig(size=(size, size))
    return save_bundle(
        str(folder / "bundle"),
        name="bench",
        architecture=architecture,
        preprocess=preprocess,
        classes=("a", "b", "c"),
        multi_label=False,
        thresholds=(),
        mask_threshold=1.0,
        trained={},
        metrics={},
        train_digest=(),
        model=build_model(architecture, preprocess, 3),
    )


def single_frames(folder: Path) -> list[bytes]:
    """Phantoms of one frame that can be scored."""
    archive = make_archive(folder, patients=12)
    reader = ObjectReader(DecodeConfig(), PreprocessConfig(), None)
    found = []
    for path in sorted(Path(archive.night_1).rglob("*.dcm")):
        data = path.read_bytes()
        try:
            ready = reader.prepare(data, Effort())
        except DecodeError:
            continue
        if len(ready.pixels) == 1:
            found.append(data)
    return found


class Bare:
    """The peer: one process, one thread."""

    def __init__(self, bundle: Bundle) -> None:
        torch.set_num_threads(1)
        reuse_freed_memory()
        self._reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
        self._rows = RowMaker(bundle, Predictor(bundle, batch_frames=BATCH), BATCH, True)

    def score(self, contents: list[bytes]) -> None:
        """Decode, prepare and score a batch."""
        efforts = [Effort() for _ in contents]
        ready = [self._reader.prepare(data, effort) for data, effort in zip(contents, efforts, strict=True)]
        self._rows.rows([Outcome(ENTRY, one, effort, 1) for one, effort in zip(ready, efforts, strict=True)])

    def throughput(self, contents: list[bytes], seconds: float) -> float:
        """Objects a second in full batches."""
        self.score(contents[:BATCH])
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self.score([contents[(done + i) % len(contents)] for i in range(BATCH)])
            done += BATCH
        return done / (time.perf_counter() - started)

    def latencies(self, contents: list[bytes], count: int) -> list[float]:
        """Seconds of single objects, with the client's pauses between them."""
        found = []
        for number in range(count):
            started = time.perf_counter()
            self.score([contents[number % len(contents)]])
            found.append(time.perf_counter() - started)
            time.sleep(_PAUSE_SECONDS)
        return found


def told(found: Load) -> dict[str, Any]:
    """What a load came to."""
    return {
        "offered_per_second": round(sum(found.by_status.values()) / found.took, 1),
        "accepted_per_second": round(len(found.seconds) / found.took, 1),
        "accepted_p50_ms": milliseconds(found.seconds, 0.5),
        "accepted_p99_ms": milliseconds(found.seconds, 0.99),
        "by_status": found.by_status,
    }


def replica_pid() -> int:
    """The replica among this process's descendants."""
    return next(pid for pid, command in descendants(os.getpid()).items() if REPLICA in command)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of the server's parts and of this process, which the clients are in."""
    spent: dict[str, float] = {}
    for pid, command in descendants(os.getpid()).items():
        part = next((part for part, sign in PARTS.items() if sign in command), "rest of Ray")
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            name = "clients" if pid == os.getpid() else part
            spent[name] = spent.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return spent


def cpu_ms_each(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float]:
    """CPU ms of every part an answer."""
    return {part: round(1000 * (spent - before.get(part, 0.0)) / count, 1) for part, spent in sorted(after.items())}


def killed(address: str, contents: list[bytes], seconds: float) -> dict[str, Any]:
    """Kill the replica under load; clients send again what was lost or refused for now."""
    threading.Timer(2, lambda: os.kill(replica_pid(), signal.SIGKILL)).start()
    found = load(address, contents, 4, seconds)
    answered, seen = len(found.seconds), found.by_status
    return {"answered": answered, "told_to_come_again_or_lost": sum(seen.values()) - answered, "by_status": seen}


def milliseconds(values: list[float], share: float) -> float:
    """A quantile, in ms."""
    return round(1000 * float(np.quantile(values, share)), 2)


def in_turns(
    bare: Bare, address: str, contents: list[bytes], seconds: float, say: Callable[[str], object], *, threads: int
) -> dict[str, Any]:
    """Bare predictor and server by turns, so that both meet the same minutes of a shared machine: medians and rounds."""
    torch.set_num_threads(threads)
    load(address, contents, 4, 3)
    rounds: list[dict[str, float]] = []
    for _ in range(_ROUNDS):
        alone = bare.throughput(contents, seconds / 2)
        single = milliseconds(bare.latencies(contents, 60), 0.5)
        before = cpu_seconds()
        times = load(address, contents, 1, seconds / 2, pause=_PAUSE_SECONDS).seconds
        cost = cpu_ms_each(before, cpu_seconds(), len(times))
        full = load(address, contents, BATCH, seconds / 2)
        served = len(full.seconds) / full.took
        low = milliseconds(times, 0.5)
        rounds.append(
            {
                "bare_per_second": round(alone, 1),
                "served_per_second": round(served, 1),
                "throughput_ratio": round(served / alone, 3),
                "saturated_p99_ms": milliseconds(full.seconds, 0.99),
                "saturated_refused": full.by_status.get(429, 0),
                "bare_p50_ms": single,
                "served_p50_ms": low,
                "served_p90_ms": milliseconds(times, 0.9),
                "added_p50_ms": round(low - single, 2),
                **{f"cpu_ms_{part.replace(' ', '_')}": value for part, value in cost.items()},
            }
        )
        say(f"{threads} threads: {rounds[-1]}")
    medians = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
    return {**medians, "threads": threads, "rounds": rounds}


def measure(
    bare: Bare, contents: list[bytes], bundle: Bundle, seconds: float, say: Callable[[str], object], *, ingress: Ingress
) -> dict[str, Any]:
    """All figures of one way to the replica."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = ServeJob(
        bundles=(bundle.uri,),
        http=HttpConfig(port=port, ingress=ingress),
        limits=RequestLimits(max_in_flight=BATCH),
        scale=ScaleConfig(batch_size=BATCH, decoders=1),
        ray=RayConfig(num_cpus=2, object_store_bytes=200 << 20),
    )
    threads = os.cpu_count() or 1
    wide = job.model_copy(update={"scale": ScaleConfig(batch_size=BATCH, decoders=1, threads=threads)})
    with serving(wide) as address:
        several = in_turns(bare, address, contents, seconds, say, threads=threads)
    with serving(job) as address:
        one = in_turns(bare, address, contents, seconds, say, threads=1)
        # Patient clients come again each second: 160 of them ask for several times of what two cores answer.
        overload = told(load(address, contents, 10 * BATCH, seconds, patient=True))
        say(f"overload: {overload}")
        hammered = told(load(address, contents, 10 * BATCH, seconds))
        say(f"the same clients, not heeding Retry-After: {hammered}")
        lost = killed(address, contents, max(seconds, 20.0))
        say(f"replica killed: {lost}")
    return {
        "one_thread": one,
        "several_threads": several,
        "overload": {"clients": 10 * BATCH, **overload},
        "overload_without_heeding_retry_after": {"clients": 10 * BATCH, **hammered},
        "killed_replica": lost,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--size", type=int, default=224, help="side of the model's input in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contents = single_frames(Path(folder) / "phantoms")
        bundle = make_bundle(Path(folder), options.size)
        sizes = [len(data) for data in contents]
        bare = Bare(bundle)
        found = {
            ingress: measure(
                bare,
                contents,
                bundle,
                options.seconds,
                lambda line, way=ingress: sys.stderr.write(f"{way}, {line}\n"),  # type: ignore[misc]
                ingress=ingress,
            )
            for ingress in INGRESSES
        }
    setup = {
        "objects": len(contents),
        "median_bytes": int(statistics.median(sizes)),
        "model": f"mobilenet_v2 hybrid, {options.size} px",
        "batch": BATCH,
        "max_in_flight": BATCH,
        "replicas": 1,
    }
    write_results("serve", {"machine": machine("ray", "torch", "fastapi"), "setup": setup, **found})
    print_table(
        ("ingress", "threads", "bare, objects a second", "served", "ratio", "bare, p50 ms", "served", "added"),
        [
            (
                ingress,
                *(
                    found[ingress][name][key]
                    for key in (
                        "threads",
                        "bare_per_second",
                        "served_per_second",
                        "throughput_ratio",
                        "bare_p50_ms",
                        "served_p50_ms",
                        "added_p50_ms",
                    )
                ),
            )
            for ingress in INGRESSES
            for name in ("one_thread", "several_threads")
        ],
    )


if __name__ == "__main__":
    main()
