"""Scoring from S3 with 50 ms added to each read, beside the same without: the price of a store's latency.

A read-only S3 server of this script's own (a process of its own; threads, GET, HEAD and ListObjectsV2 over a folder of
links) serves real images; with `delay` it waits before it answers a GET. moto takes 5 CPU-ms for a GET of 512 KB, half as
much as an image. Each figure is a whole `score` with a Ray of its own and empty tables on the local disk,
delays interleaved; images/s are of the middle three fifths of the rows by their own time stamps. The model is a
MobileNetV2 hybrid with random weights, precision auto. The cost is 1 - (rate with delay / rate without), the median over pairs of
neighbours. Limit: `read_threads` reads in flight an actor, so actors x read_threads / delay objects a second, whatever
the processor does. Writes benchmarks/results/score_over_slow_s3.json.

    python benchmarks/score_over_slow_s3.py --archive FOLDER [--archive FOLDER] [--objects 1000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from facts import machine, print_table, write_results

DELAY_SECONDS = 0.05
GOAL = 0.05
BATCH = 16
IMAGES = (".jpg", ".jpeg", ".png", ".dcm")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128
    root: Path
    delay: float
    keys: list[str]


class _Requests(socketserver.StreamRequestHandler):
    """As much of HTTP and S3 as boto3 needs to list and to read."""

    server: _Server
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, target, _ = line.decode().split(" ", 2)
            while self.rfile.readline().strip():
                pass
            parts = urlsplit(target)
            _, _, key = unquote(parts.path).lstrip("/").partition("/")
            if not key:
                self._send(200, self._listing(parse_qs(parts.query)), "application/xml", "")
            elif (path := self.server.root / key).is_file():
                self._object(method, path)
            else:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", "application/xml", "")
            self.wfile.flush()

    def _object(self, method: str, path: Path) -> None:
        status = path.stat()
        etag = f"{status.st_size:x}-{status.st_mtime_ns:x}"
        if method == "HEAD":
            self._send(200, b"", "binary/octet-stream", etag, status.st_size)
            return
        time.sleep(self.server.delay)
        self._send(200, path.read_bytes(), "binary/octet-stream", etag)

    def _send(self, status: int, body: bytes, kind: str, etag: str, length: int | None = None) -> None:
        head = [
            f"HTTP/1.1 {status} OK",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body) if length is None else length}",
            "Last-Modified: Tue, 02 Jan 2024 00:00:00 GMT",
            *([f'ETag: "{etag}"'] if etag else []),
        ]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + body)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        after = max(query.get("start-after", [""])[0], query.get("continuation-token", [""])[0])
        most = int(query.get("max-keys", ["1000"])[0])
        below = [] if "delimiter" in query else [k for k in self.server.keys if k.startswith(prefix) and k > after]
        page = below[:most]
        entries = []
        for key in page:
            status = (self.server.root / key).stat()
            entries.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2024-01-02T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{status.st_size:x}-{status.st_mtime_ns:x}&quot;</ETag><Size>{status.st_size}</Size></Contents>"
            )
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(below) > most else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>archive</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{''.join(entries)}</ListBucketResult>"
        ).encode()


def serve(root: str, delay: float) -> None:
    """Serve a folder as bucket `archive` until standard input closes; says its port first."""
    with _Server(("127.0.0.1", 0), _Requests) as server:
        server.root, server.delay = Path(root), delay
        server.keys = sorted(path.name for path in Path(root).iterdir())
        sys.stdout.write(f"{server.server_address[1]}\n")
        sys.stdout.flush()
        import threading

        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()


def make_bundle(folder: Path) -> str:
    """A MobileNetV2 hybrid at 224 px with random weights."""
    import torch

    from medvision_ray.bundle import save_bundle
    from medvision_ray.config import ModelConfig, PreprocessConfig
    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    classes = ("cavity", "consolidation", "nodule")
    architecture = ModelConfig(encoder="tu-mobilenetv2_100")
    preprocess = PreprocessConfig(size=(224, 224))
    bundle = save_bundle(
        str(folder),
        name="random",
        architecture=architecture,
        preprocess=preprocess,
        classes=classes,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=build_model(architecture, preprocess, len(classes)),
    )
    return bundle.uri


def score_once(bundle: str) -> dict[str, float]:
    """One whole run over s3://archive with a Ray of its own."""
    from medvision_ray import tables
    from medvision_ray.config import ScoreJob, build_job
    from medvision_ray.logs import silent
    from medvision_ray.scoring.run import score

    with tempfile.TemporaryDirectory() as output:
        settings = {
            "archive": {"uri": "s3://archive"},
            "bundle": bundle,
            "output": output,
            "privacy": {"demo_key": True},
            "scoring": {"batch_size": BATCH, "block_rows": 128},
        }
        job = build_job(ScoreJob, settings, "the benchmark")
        summary = score(job, silent)
        rows = tables.read(output, "predictions", ["scored_at"])
    times = sorted(moment.timestamp() for moment in rows["scored_at"].to_pylist()) if rows is not None else []
    low, high = len(times) // 5, 4 * len(times) // 5
    return {
        "images_per_second": (high - low) / (times[high] - times[low]),
        "images_per_second_of_the_pass": summary.images_per_second or 0.0,
        "failed": float(summary.failed),
        "read_threads": float(job.scoring.read_threads),
    }


def measure(root: Path, bundle: str, delay: float) -> dict[str, float]:
    """One run against a server of its own."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(root), "--delay", str(delay)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        command = [sys.executable, __file__, "--score", bundle]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        server.communicate()
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def link(archive: str, objects: int, folder: Path) -> Path:
    """So many links to the archive's images, each several times where there are fewer."""
    images = sorted(path for path in Path(archive).resolve().rglob("*") if path.suffix.lower() in IMAGES)
    chosen = images[:: max(1, len(images) // objects)]
    folder.mkdir()
    for number in range(objects):
        path = chosen[number % len(chosen)]
        (folder / f"{number:06d}{path.suffix}").symlink_to(path)
    return folder


def compare(archive: str, bundle: str, objects: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Interleaved runs over one archive; the two delays take turns at being first."""
    root = link(archive, objects, scratch / Path(archive).name)
    runs: dict[float, list[dict[str, float]]] = {0.0: [], DELAY_SECONDS: []}
    for number in range(repeats):
        for delay in sorted(runs, reverse=number % 2 == 1):
            runs[delay].append(measure(root, bundle, delay))
            sys.stderr.write(f"{root.name} +{delay * 1000:.0f} ms: {runs[delay][-1]}\n")
    rates = {delay: [run["images_per_second"] for run in found] for delay, found in runs.items()}
    costs = [1 - slow / quick for slow, quick in zip(rates[DELAY_SECONDS], rates[0.0], strict=True)]
    cores = os.cpu_count() or 1
    return {
        "archive": root.name,
        "objects": objects,
        "mean_bytes": round(sum(path.stat().st_size for path in root.iterdir()) / objects),
        "images_per_second": round(statistics.median(rates[0.0]), 1),
        "images_per_second_with_delay": round(statistics.median(rates[DELAY_SECONDS]), 1),
        "cost": round(statistics.median(costs), 4),
        "limit_images_per_second": round(cores * runs[0.0][0]["read_threads"] / DELAY_SECONDS),
        "runs": {f"{delay * 1000:.0f} ms": found for delay, found in runs.items()},
    }


def main() -> None:
    """Compare each archive and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", action="append", default=[])
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.delay)
        return
    if options.score:
        sys.stdout.write(json.dumps(score_once(options.score)) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        bundle = make_bundle(Path(scratch) / "bundle")
        found = [compare(item, bundle, options.objects, options.repeats, Path(scratch)) for item in options.archive]
    header = ("archive", "objects", "KB", "images/s", f"+{DELAY_SECONDS * 1000:.0f} ms", "cost", "goal", "limit")
    print_table(
        header,
        [
            (
                row["archive"],
                row["objects"],
                round(row["mean_bytes"] / 1000),
                row["images_per_second"],
                row["images_per_second_with_delay"],
                f"{row['cost']:.1%}",
                f"< {GOAL:.0%}",
                row["limit_images_per_second"],
            )
            for row in found
        ],
    )
    facts = machine("ray", "torch", "boto3", "urllib3", "medvision-ray")
    result = {"delay_seconds": DELAY_SECONDS, "goal": GOAL, "repeats": options.repeats, "rows": found, "machine": facts}
    write_results("score_over_slow_s3", result)


if __name__ == "__main__":
    main()
