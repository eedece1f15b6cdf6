"""A huge archive in parts: listing, anti-join, freeze and publish, with the peak memory of the process that does them.

Makes, once and seeded, an S3 Inventory of so many objects (Parquet, a million a file, on the local disk), and takes
`archive.part` 1/N to N/N through the run protocol, each in a process of its own: `list_archive`, `only_new` against
the tables, `freeze`; then, in place of scoring, another process writes the working rows that actors would have left
(random probabilities and 120 bytes of mask, one object in fifty failed); then `publish_rows`. Neither Ray nor torch is
loaded, so what they hold comes on top. In the end every part is listed and looked up again: nothing may be new, and
the tables must hold as many rows as there are objects. Peaks are `ru_maxrss` of the part's own process.

    python benchmarks/large_inventory.py --folder FOLDER --objects 1000000 --parts 1 [--lists] [--only 2] [--record NAME]

`--lists` lists the inventory once into a list a part (`medvision inventory --split`), which each part then reads in its
place; else each part lists all of it. `--only` stops after so many parts (then only those are looked up). Writes
benchmarks/results/large_inventory.json, in which each call has the place that `--record` names, "OBJECTS in PARTS" by default.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from facts import RESULTS, machine, print_table, write_results

BUCKET = "pacs-archive"
FILE_ROWS = 1_000_000
WORKING_ROWS = 50_000
MASK_BYTES = 120
CLASSES = ("cavity", "consolidation", "nodule")
MODEL = "a-model"


def make_inventory(folder: Path, objects: int) -> str:
    """The manifest of an S3 Inventory of so many objects."""
    manifest = folder / "night" / "manifest.json"
    if not manifest.exists():
        for name in ("night", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        files = [_inventory_file(folder, start, objects) for start in range(0, objects, FILE_ROWS)]
        content = {
            "sourceBucket": BUCKET,
            "destinationBucket": "arn:aws:s3:::inventories",
            "version": "2016-11-30",
            "fileFormat": "Parquet",
            "fileSchema": "message s3.inventory { required binary key (UTF8); }",
            "files": [{"key": f"inventory/data/{name}"} for name in files],
        }
        manifest.write_text(json.dumps(content))
    return str(manifest)


def _inventory_file(folder: Path, start: int, objects: int) -> str:
    numbers = np.arange(start, min(start + FILE_ROWS, objects))
    digests = np.random.default_rng(start).bytes(16 * len(numbers)).hex().encode()
    text = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 10, "0")
    groups = pc.utf8_lpad(pa.array(numbers // 1000).cast(pa.string()), 7, "0")
    rows = pa.table(
        {
            "bucket": pa.repeat(BUCKET, len(numbers)),
            "key": pc.binary_join_element_wise("xray/", groups, "/1.2.840.113619.2.", text, ".dcm", ""),
            "size": pa.array(np.full(len(numbers), 9_000_000)),
            "last_modified_date": pa.repeat(pa.scalar(1_700_000_000_000, pa.timestamp("ms")), len(numbers)),
            "e_tag": _binary(digests, 32).cast(pa.string()),
        }
    )
    name = f"{start // FILE_ROWS:05d}.parquet"
    pq.write_table(rows, folder / "data" / name)
    return name


def _binary(data: bytes, width: int) -> pa.Array:
    """Values of one width that lie one after the other."""
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data) // width, [None, pa.py_buffer(data)])
    return fixed.cast(pa.binary())


def write_working_rows(inventory: str, folder: Path) -> None:
    """What scoring actors would have left of a frozen inventory."""
    from medvision_ray.scoring.rows import working_schema

    (folder / "rows").mkdir(parents=True)
    schema = working_schema(CLASSES)
    for number, batch in enumerate(pq.ParquetFile(inventory).iter_batches(WORKING_ROWS)):
        rows = pa.RecordBatch.from_arrays(list(_columns(batch, schema, number)), schema=schema)
        pq.write_table(pa.Table.from_batches([rows]), folder / "rows" / f"{number:06d}.parquet")


def _columns(batch: pa.RecordBatch, schema: pa.Schema, seed: int) -> Iterator[pa.Array]:
    rng, count = np.random.default_rng(seed), batch.num_rows
    failed = pa.array(np.arange(count) % 50 == 49)
    known: dict[str, Any] = {name: batch[name] for name in ("image_id", "uri", "etag")}
    known["status"] = pc.if_else(failed, "failed", "scored")
    known["error_code"] = pc.if_else(failed, "timeout", pa.scalar(None, pa.string()))
    known["mask"] = _binary(rng.bytes(MASK_BYTES * count), MASK_BYTES)
    moment = pa.scalar(datetime(2026, 1, 1, tzinfo=timezone.utc), pa.timestamp("us", "UTC"))
    for field in schema:
        if field.name in known:
            yield known[field.name].cast(field.type)
        elif pa.types.is_floating(field.type):
            yield pa.array(rng.random(count), field.type)
        elif pa.types.is_timestamp(field.type):
            yield pa.repeat(moment, count)
        else:
            yield pa.nulls(count, field.type)


def run_division(manifest: str, lists: Path, parts: int) -> dict[str, float]:
    """The inventory as lists, one a part."""
    from medvision_ray.archive.divide import divide
    from medvision_ray.config import ArchiveConfig

    started = time.monotonic()
    archive = ArchiveConfig(uri=f"s3://{BUCKET}/xray", s3_inventory=manifest)
    done = divide(archive, parts, str(lists), progress=lambda line: print(line, file=sys.stderr))
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "objects": sum(done.objects),
        "bytes_of_lists": sum(Path(file).stat().st_size for file in done.files),
    }


def run_part(manifest: str, output: Path, part: str, *, lists: Path | None, again: bool) -> dict[str, float]:
    """One part through the protocol; `again`: only listed and looked up."""
    from medvision_ray.archive.inventory import freeze, list_archive, only_new
    from medvision_ray.config import ArchiveConfig
    from medvision_ray.scoring.publish import publish_rows
    from medvision_ray.scoring.summary import RunIdentity

    found: dict[str, float] = {}

    def step(name: str, started: float) -> float:
        found[f"{name}_seconds"] = round(time.monotonic() - started, 2)
        found[f"peak_bytes_after_{name}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return time.monotonic()

    found["peak_bytes_at_start"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    clock = time.monotonic()
    source = (
        {"s3_inventory": manifest} if lists is None else {"list_file": f"{lists}/{part.replace('/', '-of-')}.parquet"}
    )
    listed = list_archive(ArchiveConfig(uri=f"s3://{BUCKET}/xray", part=part, **source))
    clock = step("list", clock)
    inventory = only_new(listed, str(output), MODEL)
    clock = step("anti_join", clock)
    found |= {"listed": listed.objects.num_rows, "new": inventory.objects.num_rows}
    if again:
        return found
    del listed
    key = f"part-{part.replace('/', '-of-')}"
    folder = output / "runs" / key
    inventory = freeze(inventory, str(folder / "inventory.parquet"), 256)
    step("freeze", clock)
    found["inventory_bytes"] = (folder / "inventory.parquet").stat().st_size
    command = [sys.executable, __file__, "--write-rows", str(folder), "--folder", "", "--objects", "1"]
    subprocess.run(command, check=True)
    clock = time.monotonic()
    identity = RunIdentity(key, "score", MODEL, "the archive", datetime.now(timezone.utc))
    summary = publish_rows(str(output), identity, CLASSES, str(folder), inventory)
    step("publish", clock)
    if summary.scored + summary.failed != inventory.objects.num_rows:
        raise SystemExit(f"Expected {inventory.objects.num_rows} published rows, but got {summary}")
    shutil.rmtree(folder)
    return found


def in_child(options: argparse.Namespace, *more: str) -> dict[str, float]:
    """A part in a process of its own: a child's peak counts what its parent held when it was forked."""
    command = [sys.executable, __file__, "--folder", options.folder, "--objects", str(options.objects), *more]
    command += ["--lists"] if options.lists else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(done.stdout)
    sys.stderr.write(f"{more}: {answer}\n")
    return answer


def check_whole(output: Path, objects: int, again: list[dict[str, float]]) -> None:
    """Every listed object is in the tables, none is new, and there are no more rows than objects."""
    from medvision_ray import tables

    found = [tables.dataset(str(output), name) for name in ("predictions", "failures")]
    rows = sum(table.count_rows() for table in found if table is not None)
    listed, new = (int(sum(part[name] for part in again)) for name in ("listed", "new"))
    if new or listed != rows or (objects and rows != objects):
        raise SystemExit(
            f"Expected {objects or listed} rows and nothing new, but got {rows} rows and {new} new objects"
        )


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All parts that were asked for, then all of them looked up again."""
    numbers = range(1, (options.only or options.parts) + 1)
    division = in_child(options, "--divide", "--parts", str(options.parts)) if options.lists else None
    started = time.monotonic()
    parts = [in_child(options, "--part", f"{number}/{options.parts}") for number in numbers]
    whole = time.monotonic() - started
    again = [in_child(options, "--part", f"{number}/{options.parts}", "--again") for number in numbers]
    output = Path(options.folder) / f"output-{options.objects}"
    check_whole(output, 0 if options.only else options.objects, again)
    names = ("list", "anti_join", "freeze", "publish")
    rows = sum(part["new"] for part in parts)
    return {
        "objects": options.objects,
        "parts": options.parts,
        "parts_done": len(parts),
        "division": division,
        "rows_published": int(rows),
        "largest_part": int(max(part["new"] for part in parts)),
        "median_seconds_of_a_part": {n: round(statistics.median(p[f"{n}_seconds"] for p in parts), 2) for n in names},
        "seconds_of_all_parts": round(whole, 1),
        "peak_bytes": int(max(part["peak_bytes_after_publish"] for part in parts)),
        "peak_bytes_after": {n: int(max(part[f"peak_bytes_after_{n}"] for part in parts)) for n in names},
        "peak_bytes_first_and_last_part": [int(parts[at]["peak_bytes_after_publish"]) for at in (0, -1)],
        "peak_bytes_nothing_new": int(max(part["peak_bytes_after_anti_join"] for part in again)),
        "median_anti_join_seconds_nothing_new": statistics.median(part["anti_join_seconds"] for part in again),
        "machine": machine("pyarrow", "deltalake", "numpy"),
        "each": parts,
    }


def record(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put a call's result beside those of earlier calls."""
    place = RESULTS / "large_inventory.json"
    known: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    known[name] = result
    write_results("large_inventory", known)
    return known


def main() -> None:
    """Make what is not there yet, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where inventory and tables are made; up to 0.5 KB an object")
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--only", type=int, help="stop after so many parts")
    parser.add_argument("--record", help="name of this call in the results")
    for name in ("--part", "--write-rows"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--lists", action="store_true", help="list once into a list a part")
    for name in ("--make", "--again", "--divide"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = Path(options.folder) / f"archive-{options.objects}"
    output = Path(options.folder) / f"output-{options.objects}"
    if options.write_rows:
        write_working_rows(f"{options.write_rows}/inventory.parquet", Path(options.write_rows))
    elif options.make:
        make_inventory(place, options.objects)
    elif options.divide or options.part:
        manifest, lists = str(place / "night" / "manifest.json"), output / "lists"
        if options.divide:
            answer = run_division(manifest, lists, options.parts)
        else:
            answer = run_part(
                manifest, output, options.part, lists=lists if options.lists else None, again=options.again
            )
        sys.stdout.write(json.dumps(answer))
    else:
        options.folder = str(Path(options.folder).resolve())
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
        shutil.rmtree(output, ignore_errors=True)
        os.makedirs(output)
        name = f"{options.objects} in {options.parts}{' lists' if options.lists else ''}"
        known = record(options.record or name, measured(options))
        shutil.rmtree(output)
        print_table(
            ("call", "largest part", "list s", "anti-join s", "freeze s", "publish s", "peak GB", "nothing new GB"),
            [
                (
                    name,
                    call["largest_part"],
                    *call["median_seconds_of_a_part"].values(),
                    round(call["peak_bytes"] / 1e9, 2),
                    round(call["peak_bytes_nothing_new"] / 1e9, 2),
                )
                for name, call in known.items()
            ],
        )


if __name__ == "__main__":
    main()
