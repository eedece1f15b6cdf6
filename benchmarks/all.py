"""The benchmarks of scoring, tables, decoding, start-up and a training's speed in turn, and one table of what came out: `make bench`.

Takes about an hour on two quiet cores (and three minutes more the first time, to make a million committed rows).
Each figure stands beside its peer, measured in the same run; a figure without a result file has not been measured.

    python benchmarks/all.py [--folder FOLDER] [--only NAME ...] [--table]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from facts import RESULTS, print_table

Row = tuple[object, ...]


def _commands(folder: str) -> dict[str, list[str]]:
    data = Path(os.environ.get("MEDVISION_DATA", "../shared/data"))
    real = [part for name in ("chest_xray", "chest_ct_dicom") for part in ("--archive", str(data / name))]
    return {
        "score_vs_dataloader": [],
        "where_cpu_goes": ["--model", "small CNN", "--archive", str(data / "chest_xray")],
        "nothing_new": ["--folder", folder],
        "scale": [],
        "tables": [],
        "decode": [],
        "score_over_slow_s3": real,
        "startup": [],
        "train_vs_ddp": [],
    }


def _score_vs_dataloader(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, case in found["cases"].items():
        median = case["medians"]
        ours = median["project"]["images_per_second"]
        rows += [
            (
                f"scoring, {name}, images/s",
                ours,
                "DataLoader",
                median["peer"]["images_per_second"],
                case["ratio_to_peer"],
                ">= 1.2",
            ),
            ("", ours, "the machine's limit", case["limit_images_per_second"], case["ratio_to_limit"], ">= 0.95"),
            (
                "",
                ours,
                "float32, batch 1, serial",
                median["field"]["images_per_second"],
                case["ratio_to_field"],
                ">= 5",
            ),
        ]
    return rows


def _where_cpu_goes(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, case in found["cases"].items():
        ours, bare = (round(1000 * case[f"{kind}_cpu_per_image"], 2) for kind in ("actors", "bare"))
        whole = case["seconds"] * found["machine"]["cores"]
        rows += [
            (f"CPU of an actor, {name}, ms an image", ours, "bare process", bare, round(bare / ours, 2), ""),
            ("share of the machine that actors get", round(case["roles"]["actors"] / whole, 3), "", "", "", ""),
        ]
    return rows


def _nothing_new(found: dict[str, Any]) -> list[Row]:
    goal = found["limit"]
    return [
        (
            f"nothing new, {found['objects']} rows, {kind}, s",
            case["seconds"],
            "goal",
            goal["seconds"],
            "",
            "< 20 s, < 2 GB",
        )
        for kind, case in found["medians"].items()
    ]


def _scale(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for size, case in found["sizes"].items():
        ours, pool = case["ms_per_image"], case["pool_ms_per_image"]
        rows.append(
            (
                f"{size} tiny images, ms each",
                round(ours, 2),
                "process pool",
                round(pool, 2),
                round(pool / ours, 2),
                ">= 0.7",
            )
        )
    return [*rows, ("spread of the cost over sizes", found["spread"], "", "", "", "< 0.15")]


def _tables(found: dict[str, Any]) -> list[Row]:
    rates, median = found["publish_rows_per_second"], found["medians"]
    ours, peer = (median[f"read_one_night_{name}_seconds"] for name in ("project", "peer"))
    return [
        ("publish, rows/s", rates["project"], "plain Parquet", rates["peer"], found["publish_ratio_to_peer"], ""),
        ("", rates["project"], "one synced file", rates["limit"], round(rates["project"] / rates["limit"], 2), ""),
        ("read one night of a year, s", ours, "plain Parquet", peer, round(peer / ours, 2), ""),
    ]


def _decode(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for case, measured in found["cases"].items():
        for kind in ("decode", "input"):
            part = measured[kind]
            rates, peer = part["images_per_cpu_second"], part.get("fastest_safe_peer", "no peer")
            ratio = part.get("ratio_to_fastest_safe_peer", "")
            name = f"{case}, {'decoded' if kind == 'decode' else 'to input'}, images/CPU-s"
            rows.append((name, rates["this project"], peer, rates.get(peer, ""), ratio, ">= 0.95"))
        if "reduced" in measured:
            less, whole = (measured[kind]["images_per_cpu_second"]["this project"] for kind in ("reduced", "input"))
            ratio = measured["reduced"]["ratio_to_whole"]
            rows.append((f"{case}, to input, decode.reduced, images/CPU-s", less, "all pixels", whole, ratio, ""))
        over = measured["peak_memory_over_decoded"]
        rows.append(("peak memory over one decoded", max(over["decode"], over["input"]), "", "", "", "< 4"))
    return rows


def _score_over_slow_s3(found: dict[str, Any]) -> list[Row]:
    return [
        (
            f"S3 + 50 ms, {Path(row['archive']).name}, images/s",
            row["images_per_second_with_delay"],
            "no delay",
            row["images_per_second"],
            round(1 - row["cost"], 3),
            "> 0.95",
        )
        for row in found["rows"]
    ]


def _startup(found: dict[str, Any]) -> list[Row]:
    ours = found["medians"]["first scored image"]
    floor = found["floor_seconds"]
    return [("start-up to the first image, s", ours, "Ray and torch alone", floor, round(floor / ours, 2), "< 8 s")]


def _train_vs_ddp(found: dict[str, Any]) -> list[Row]:
    ours, peer, limit = (found[kind] for kind in ("project", "peer", "limit"))
    later, first, waiting = "later_images_per_second", "first_images_per_second_with_decoding", "later_wait_share"
    script = "torch DDP, DataLoader"
    return [
        ("training, later epochs, images/s", ours[later], script, peer[later], found["ratio_to_peer"], ">= 1.0"),
        ("", ours[later], "images in memory", limit[later], found["ratio_to_limit"], ""),
        (
            "training, first epoch with decoding",
            ours[first],
            script,
            peer[first],
            round(ours[first] / peer[first], 2),
            "",
        ),
        ("share of the time waiting for data", ours[waiting], script, peer[waiting], "", "< 0.03"),
    ]


def main() -> None:
    """Run what is asked for, then print what the result files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="benchmarks/.made", help="where nothing_new.py makes its tables once")
    parser.add_argument("--only", nargs="+", help="names of scripts")
    parser.add_argument("--table", action="store_true", help="only print the table of the recorded results")
    options = parser.parse_args()
    commands = _commands(options.folder)
    for name, arguments in commands.items():
        if not options.table and name in (options.only or commands):
            sys.stderr.write(f"{name}\n")
            subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py"), *arguments], check=True)
    rows: list[Row] = []
    for name in commands:
        place = RESULTS / f"{name}.json"
        rows += (
            globals()[f"_{name}"](json.loads(place.read_text()))
            if place.exists()
            else [(name, "not measured", "", "", "", "")]
        )
    print_table(("figure", "ours", "beside", "theirs", "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
