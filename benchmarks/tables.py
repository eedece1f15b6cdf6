"""Rows/s published into the tables, and reading one night back after a year of nights, beside plain Parquet.

The peer is `pyarrow.parquet.write_to_dataset` of the same rows with the same partitions, and
`pyarrow.dataset` reading one partition of what it wrote: no log, no transaction, nothing undone when killed half way.
The limit is the disk: the bytes that the project wrote, written and synced as one plain file, and read back as one. Both sides
take the same seeded batches from memory and run in turns; each figure is the median over repeats.

    python benchmarks/tables.py [--rows 200000] [--nights 365] [--rows-a-night 500] [--repeats 5]
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from facts import machine, print_table, write_results

from medvision_ray import tables
from medvision_ray.archive.inventory import image_id
from medvision_ray.scoring.masks import encode_mask

CLASSES = tuple(f"finding {number}" for number in range(14))
SCHEMA = tables.predictions_schema(CLASSES)
MODEL = "chest-0123456789ab"
PARTITIONS = ["model_id", "run_date"]
FIRST = date(2025, 1, 1)
COLUMNS = ["image_id", "uri", "predicted_label", "predicted_probability", "mask_fraction"]
BATCH = 2048


def _masks(generator: np.random.Generator, count: int) -> list[Any]:
    """Ellipses on a 512 px frame, as a lesion's mask."""
    y, x = np.mgrid[:512, :512]
    found = []
    for row, column, high, wide in generator.uniform((100, 100, 10, 10), (400, 400, 90, 90), (count, 4)):
        found.append(encode_mask(((y - row) / high) ** 2 + ((x - column) / wide) ** 2 < 1))
    return found


def night(number: int, rows: int, masks: list[Any]) -> list[pa.RecordBatch]:
    """Rows of one night, seeded by its number: chest X-rays with 14 classes, a third with a mask."""
    generator = np.random.default_rng(number)
    probabilities = generator.dirichlet(np.ones(len(CLASSES)), rows).astype(np.float32)
    best = probabilities.argmax(axis=1)
    uris = [f"s3://archive/2025/{number:03d}/{key:016x}.dcm" for key in generator.integers(0, 2**62, rows).tolist()]
    etags = [f"{key:032x}" for key in generator.integers(0, 2**62, rows).tolist()]
    chosen = [masks[k] if k < len(masks) else None for k in generator.integers(0, 3 * len(masks), rows).tolist()]
    day = FIRST + timedelta(days=number)
    columns: dict[str, Any] = {
        "run_key": [f"score-benchmark-{number:05d}"] * rows,
        "run_date": [day] * rows,
        "model_id": [MODEL] * rows,
        "image_id": [image_id(uri, etag) for uri, etag in zip(uris, etags, strict=True)],
        "uri": uris,
        "etag": etags,
        "modality": ["DX"] * rows,
        **{
            name: [f"{k:064x}" for k in generator.integers(0, 2**62, rows).tolist()]
            for name in ("patient_key", "study_key", "series_key")
        },
        "height": generator.integers(512, 3000, rows).tolist(),
        "width": generator.integers(512, 3000, rows).tolist(),
        "frames": [1] * rows,
        "spacing_mm": [[0.143, 0.143]] * rows,
        "spacing_source": ["calibrated"] * rows,
        "predicted_label": [CLASSES[k] for k in best.tolist()],
        "predicted_probability": probabilities.max(axis=1).tolist(),
        **{column: probabilities[:, place] for place, column in enumerate(tables.probability_columns(CLASSES))},
        "key_frame": [0] * rows,
        "mask_fraction": [mask.fraction if mask else 0.0 for mask in chosen],
        "mask_area_mm2": [mask.pixels * 0.0204 if mask else 0.0 for mask in chosen],
        "mask_box": [list(mask.box) if mask else None for mask in chosen],
        "mask": [mask.data if mask else None for mask in chosen],
        "frame_results": [[]] * rows,
        "preprocess_id": ["0123456789abcdef"] * rows,
        "scored_at": [datetime(day.year, day.month, day.day, 3, tzinfo=timezone.utc)] * rows,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA).to_batches(BATCH)


def publish_project(folder: str, batches: list[pa.RecordBatch], run: str) -> None:
    """One commit."""
    tables.commit(folder, "predictions", SCHEMA, batches, run)


def publish_peer(folder: str, batches: list[pa.RecordBatch], run: str) -> None:
    """Files of one night, with the codec that the project's files have."""
    pq.write_to_dataset(
        pa.Table.from_batches(batches, SCHEMA),
        folder,
        partition_cols=PARTITIONS,
        basename_template=f"{run}-{{i}}.parquet",
        compression="snappy",
    )


def read_project(folder: str, day: date, rows: int) -> None:
    """One night through the log, opened anew."""
    found = tables.read(folder, "predictions", COLUMNS, pads.field("run_date") == day)
    _assert_rows(found, rows)


def read_peer(folder: str, day: date, rows: int) -> None:
    """One night by listing the folders."""
    kinds = pa.schema([("model_id", pa.string()), ("run_date", pa.date32())])
    found = pads.dataset(folder, partitioning=pads.partitioning(kinds, flavor="hive"))
    _assert_rows(found.to_table(columns=COLUMNS, filter=pads.field("run_date") == day), rows)


def _assert_rows(found: pa.Table | None, rows: int) -> None:
    if found is None or found.num_rows != rows:
        raise SystemExit(f"Expected {rows} rows, but got {found.num_rows if found is not None else 'no table'}.")


def _timed(call: Callable[[], Any]) -> float:
    gc.collect()
    os.sync()  # what the other side wrote does not go to the disk in this one's time
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _bytes(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _write_plain(folder: Path, data: bytes) -> None:
    with open(folder / "plain", "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def measure_publish(scratch: Path, rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to publish one large night into empty tables, and to write its bytes as one file."""
    batches = night(0, rows, _masks(np.random.default_rng(0), 500))
    seconds: dict[str, list[float]] = {"project": [], "peer": [], "limit": [], "bytes": []}
    for repeat in range(repeats):
        places = {name: scratch / f"{name}-{repeat}" for name in ("project", "peer", "limit")}
        for place in places.values():
            place.mkdir()
        seconds["project"].append(_timed(partial(publish_project, str(places["project"]), batches, "night")))
        seconds["peer"].append(_timed(partial(publish_peer, str(places["peer"]), batches, "night")))
        data = b"".join(path.read_bytes() for path in _bytes(places["project"]))
        seconds["limit"].append(_timed(partial(_write_plain, places["limit"], data)))
        seconds["bytes"].append(len(data))
        for place in places.values():
            shutil.rmtree(place)
    return seconds


def measure_read(scratch: Path, nights: int, rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to read one night back after a year; the project tidies after each publish as a run does."""
    masks = _masks(np.random.default_rng(1), 100)
    project, peer = scratch / "project", scratch / "peer"
    project.mkdir()
    for number in range(nights):
        batches = night(number, rows, masks)
        publish_project(str(project), batches, f"night-{number}")
        tables.tidy(str(project))
        publish_peer(str(peer), batches, f"night-{number}")
    seconds: dict[str, list[float]] = {"project": [], "peer": [], "limit": []}
    days = np.random.default_rng(2).integers(0, nights, repeats).tolist()
    for number in days:
        day = FIRST + timedelta(days=number)
        seconds["project"].append(_timed(partial(read_project, str(project), day, rows)))
        seconds["peer"].append(_timed(partial(read_peer, str(peer), day, rows)))
        (file,) = (peer / f"model_id={MODEL}" / f"run_date={day}").iterdir()
        seconds["limit"].append(_timed(partial(pq.ParquetFile(file).read, columns=COLUMNS)))
    return seconds


def main() -> None:
    """Interleave both sides and write medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--rows-a-night", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        publish = measure_publish(scratch, options.rows, options.repeats)
        sys.stderr.write(f"publish: {publish}\n")
        read = measure_read(scratch, options.nights, options.rows_a_night, options.repeats)
    median = {
        f"{what}_{name}_seconds": round(statistics.median(values), 4)
        for what, runs in (("publish", publish), ("read_one_night", read))
        for name, values in runs.items()
        if name != "bytes"
    }
    size = statistics.median(publish["bytes"])
    rates = {name: round(options.rows / median[f"publish_{name}_seconds"]) for name in ("project", "peer", "limit")}
    result = {
        "peer": "pyarrow.parquet.write_to_dataset and pyarrow.dataset, same rows, partitions and codec",
        "limit": "the same bytes written and synced as one file; reading: the same columns of the night's one file, its path known",
        "publish_rows_per_second": rates,
        "publish_ratio_to_peer": round(rates["project"] / rates["peer"], 3),
        "publish_megabytes": round(size / 1e6, 1),
        "read_ratio_of_seconds_to_peer": round(
            median["read_one_night_project_seconds"] / median["read_one_night_peer_seconds"], 3
        ),
        "medians": median,
        "options": vars(options),
        "machine": machine("pyarrow", "deltalake"),
        "runs": {"publish": publish, "read_one_night": read},
    }
    write_results("tables", result)
    print_table(
        ("", "this project", "peer", "limit"),
        [
            (f"publish {options.rows} rows, rows/s", rates["project"], rates["peer"], rates["limit"]),
            (
                f"read one of {options.nights} nights, ms",
                *[round(1e3 * median[f"read_one_night_{name}_seconds"], 1) for name in ("project", "peer", "limit")],
            ),
        ],
    )


if __name__ == "__main__":
    main()
