"""A night with nothing new: `medvision score` over an archive of which every object is committed already.

Makes, once and seeded, an archive and tables that hold a row for each of its objects (a backlog and 30 nights,
2 % of them failures), then runs `medvision score` as a user would and takes the seconds of the whole command and
the peak memory of its process (rusage of the child, which counts no Ray: none is started). Archives: an S3
Inventory in Parquet and one in CSV on the local disk (the bucket itself is not asked), and a local folder of
tiny files. The page cache is warm. Limit: 20 s and 2 GB. Writes benchmarks/results/nothing_new.json.

    python benchmarks/nothing_new.py --folder FOLDER [--objects 1000000] [--archives parquet,csv,local] [--repeats 3]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from facts import machine, print_table, write_results

LIMIT_SECONDS, LIMIT_BYTES = 20.0, 2_000_000_000
BUCKET = "pacs-archive"
NIGHTS = 30
FILES = 4
FOLDER_SIZE = 1000
CLASSES = ("cavity", "consolidation", "nodule")


def make_bundle(folder: Path) -> str:
    """A small model with random weights; nothing is scored with it."""
    if folder.exists():
        return str(folder)
    import torch

    from medvision_ray.bundle import save_bundle
    from medvision_ray.config import ModelConfig, PreprocessConfig
    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    architecture = ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=(16, 16, 8, 8, 8))
    preprocess = PreprocessConfig(size=(64, 64))
    save_bundle(
        str(folder),
        name="nothing-new",
        architecture=architecture,
        preprocess=preprocess,
        classes=CLASSES,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=build_model(architecture, preprocess, len(CLASSES)),
    )
    return str(folder)


def make_inventory(folder: Path, objects: int, kind: str) -> dict[str, str]:
    """Options of an S3 Inventory of so many objects, four data files."""
    manifest = folder / "night" / "manifest.json"
    if not manifest.exists():
        for name in ("night", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        files = [_inventory_file(folder, objects, kind, part) for part in range(FILES)]
        columns = "Bucket, Key, Size, LastModifiedDate, ETag, StorageClass"
        content = {
            "sourceBucket": BUCKET,
            "destinationBucket": "arn:aws:s3:::inventories",
            "version": "2016-11-30",
            "fileFormat": "CSV" if kind == "csv" else "Parquet",
            "fileSchema": columns if kind == "csv" else "message s3.inventory { required binary key (UTF8); }",
            "files": files,
        }
        manifest.write_text(json.dumps(content))
    return {"archive.uri": f"s3://{BUCKET}/xray", "archive.s3_inventory": str(manifest)}


def _inventory_file(folder: Path, objects: int, kind: str, part: int) -> dict[str, Any]:
    numbers = range(part * objects // FILES, (part + 1) * objects // FILES)
    moments = np.random.default_rng(part).integers(1_600_000_000_000, 1_790_000_000_000, len(numbers))
    digests = [hashlib.md5(b"%d" % number).hexdigest() for number in numbers]
    rows = pa.table(
        {
            "bucket": pa.repeat(BUCKET, len(numbers)),
            "key": [
                f"xray/{number // FOLDER_SIZE:05d}/1.2.840.113619.2.{digests[i]}.dcm"
                for i, number in enumerate(numbers)
            ],
            "size": pa.array(np.full(len(numbers), 9_000_000), pa.int64()),
            "last_modified_date": pa.array(np.sort(moments)).cast(pa.timestamp("ms")),
            "e_tag": digests,
            "storage_class": pa.repeat("STANDARD", len(numbers)),
        }
    )
    name = f"{part}.parquet" if kind == "parquet" else f"{part}.csv.gz"
    place = folder / "data" / name
    if kind == "parquet":
        pq.write_table(rows, place)
    else:
        times = pc.strftime(rows["last_modified_date"], format="%Y-%m-%dT%H:%M:%SZ")
        keys = pa.array([quote_plus(key, safe="/") for key in rows["key"].to_pylist()])
        rows = rows.set_column(1, "key", keys).set_column(3, "last_modified_date", times)
        with gzip.open(place, "wb", compresslevel=6) as stream:
            pacsv.write_csv(
                rows.set_column(2, "size", rows["size"].cast(pa.string())),
                stream,
                pacsv.WriteOptions(include_header=False, quoting_style="all_valid"),
            )
    return {"key": f"inventory/{BUCKET}/all/data/{name}", "MD5checksum": hashlib.md5(place.read_bytes()).hexdigest()}


def make_files(folder: Path, objects: int) -> dict[str, str]:
    """Options of a local folder of so many files of one byte, a thousand in each folder."""
    done = folder.with_suffix(".complete")
    if not done.exists():
        for number in range(objects):
            place = folder / f"{number // FOLDER_SIZE:05d}"
            if number % FOLDER_SIZE == 0:
                place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:08d}.dcm").write_bytes(b"x")
        done.touch()
    return {"archive.uri": str(folder)}


def make_tables(output: Path, options: dict[str, str], model_id: str) -> None:
    """Rows of every object of the archive, committed as a backlog of half of them and 30 nights of the rest."""
    from medvision_ray import tables
    from medvision_ray.archive.inventory import list_archive
    from medvision_ray.config import InventoryJob, build_job

    archive = {name.removeprefix("archive."): value for name, value in options.items()}
    job = build_job(InventoryJob, {"archive": archive}, "the benchmark")
    objects = list_archive(job.archive).objects
    half = objects.num_rows // 2
    cuts = [0, *(half + night * (objects.num_rows - half) // NIGHTS for night in range(NIGHTS + 1))]
    for night, (start, end) in enumerate(pairwise(cuts)):
        key = f"score-nothing-new-{night:05d}"
        if tables.is_committed(output=str(output), name="failures", run_key=key):
            continue
        rows = objects.slice(start, end - start)
        failed = pa.array(np.arange(rows.num_rows) % 50 == 49)
        facts = (key, date(2026, 1, 1) + timedelta(days=night), model_id)
        for name, chosen in (("predictions", rows.filter(pc.invert(failed))), ("failures", rows.filter(failed))):
            schema = tables.predictions_schema(CLASSES) if name == "predictions" else tables.FAILURES
            tables.commit(str(output), name, schema, _committed(chosen, schema, facts, night), key)


def _committed(rows: pa.Table, schema: pa.Schema, facts: tuple[str, date, str], seed: int) -> Iterator[pa.RecordBatch]:
    """Rows as a run would commit them: keys and masks random (they do not compress), probabilities too."""
    rng = np.random.default_rng(seed)
    for batch in rows.combine_chunks().to_batches(20_000):
        count = batch.num_rows
        random = {
            pa.binary(): lambda count=count: pa.array([rng.bytes(120) for _ in range(count)]),
            pa.float32(): lambda count=count: pa.array(rng.random(count), pa.float32()),
            pa.float64(): lambda count=count: pa.array(rng.random(count)),
            pa.int32(): lambda count=count: pa.array(rng.integers(1, 3000, count), pa.int32()),
        }
        known: dict[str, Any] = {name: batch[name] for name in ("image_id", "uri", "etag")}
        known |= {
            name: pa.repeat(value, count)
            for name, value in zip(("run_key", "run_date", "model_id"), facts, strict=True)
        }
        known |= {name: pa.array([rng.bytes(10).hex() for _ in range(count)]) for name in ("patient_key", "study_key")}
        known |= {"error_code": pa.repeat("timeout", count), "stage": pa.repeat("decode", count)}
        moment = pa.scalar(datetime(2026, 1, 1, tzinfo=timezone.utc), pa.timestamp("us", "UTC"))
        columns = []
        for field in schema:
            if field.name in known:
                columns.append(known[field.name].cast(field.type))
            elif field.type in random:
                columns.append(random[field.type]())
            elif pa.types.is_timestamp(field.type):
                columns.append(pa.repeat(moment, count))
            else:
                columns.append(pa.nulls(count, field.type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def make(folder: Path, kind: str, objects: int) -> None:
    """One archive and its tables, unless they are there."""
    from medvision_ray.bundle import load_bundle

    folder.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle(folder / "bundle")
    place = folder / f"archive-{kind}"
    options = make_files(place, objects) if kind == "local" else make_inventory(place, objects, kind)
    make_tables(folder / f"output-{kind}", options, load_bundle(bundle).model_id)
    (folder / f"archive-{kind}.json").write_text(json.dumps(options))


def night(options: dict[str, str], bundle: str, output: Path, objects: int) -> dict[str, float]:
    """One `medvision score` of its own process; what it says is checked."""
    settings = {**options, "bundle": bundle, "output": str(output), "privacy.demo_key": "true"}
    command = [sys.executable, "-m", "medvision_ray.cli", "score", "--json"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=answer, stderr=said, text=True)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (answer, said):
            stream.seek(0)
            texts.append(stream.read())
    result = json.loads(texts[0].splitlines()[-1]) if texts[0] else {}
    if process.returncode or result["already_done"] != objects or result["scored"] + result["failed"]:
        raise SystemExit(f"Expected a night with nothing new of {objects} objects, but got {result}\n{texts[1]}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "list_seconds": result["seconds"].get("list", 0.0),
        "peak_bytes": usage.ru_maxrss * 1024.0,
    }


def main() -> None:
    """Make what is not there yet, measure each archive in turn, write medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where archives and tables are made once; about 2 KB an object")
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--archives", default="parquet,csv,local")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(options.folder).resolve() / str(options.objects)
    kinds = options.archives.split(",")
    if options.make:
        make(folder, options.make, options.objects)
        return
    making = {}
    for kind in kinds:
        started = time.monotonic()
        # By a process of its own: a child's peak memory counts what its parent held when it was forked.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make", kind], check=True)
        making[kind] = round(time.monotonic() - started, 1)
        sys.stderr.write(f"{kind}: made or found in {making[kind]} s\n")
    archives = {kind: json.loads((folder / f"archive-{kind}.json").read_text()) for kind in kinds}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in archives}
    for _ in range(options.repeats):
        for kind, found in runs.items():
            found.append(night(archives[kind], str(folder / "bundle"), folder / f"output-{kind}", options.objects))
            sys.stderr.write(f"{kind}: {found[-1]}\n")
    medians = {
        kind: {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
        for kind, found in runs.items()
    }
    facts = machine("pyarrow", "deltalake", "numpy")
    result = {
        "objects": options.objects,
        "repeats": options.repeats,
        "limit": {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES},
        "medians": medians,
        "making_seconds": making,
        "machine": facts,
        "runs": runs,
    }
    write_results("nothing_new", result)
    rows = [
        (
            kind,
            found["seconds"],
            LIMIT_SECONDS,
            found["cpu_seconds"],
            found["list_seconds"],
            round(found["peak_bytes"] / 1e9, 2),
            LIMIT_BYTES / 1e9,
        )
        for kind, found in medians.items()
    ]
    print_table(("archive", "seconds", "goal", "CPU seconds", "of it listing", "peak GB", "goal"), rows)


if __name__ == "__main__":
    main()
