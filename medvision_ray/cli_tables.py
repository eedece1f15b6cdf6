"""`medvision tables ACTION`: upkeep and proof of the tables, and what is computed from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

DONE, FAILED = 0, 1


def add_tables_verb(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `tables` and its actions to the verbs of the command line."""
    actions = verbs.add_parser(
        "tables", help="compact, vacuum, list or verify the tables; rows of studies"
    ).add_subparsers(dest="action", required=True)
    found = {}
    for name, run, text in (
        ("compact", _compact, "merge small files and checkpoint the logs; publishing does this by itself"),
        ("vacuum", _vacuum, "show, and with --delete remove, files that no recent version needs"),
        ("history", _history, "list the commits of every table"),
        ("verify", _verify, "prove the tables; exit code 1 where something does not hold"),
        ("studies", _studies, "write one row a study of which a model has scored several objects, as Parquet"),
    ):
        found[name] = actions.add_parser(name, help=text, description=text)
        found[name].add_argument(
            "--output", required=True, metavar="URI", help="the folder or prefix that holds tables/"
        )
        add_json(found[name])
        found[name].set_defaults(run=run)
    vacuum = found["vacuum"]
    vacuum.add_argument(
        "--retain-hours", type=float, metavar="HOURS", help="versions so young stay; 168 (a week) unless given"
    )
    vacuum.add_argument("--delete", action="store_true", help="remove the files; without it they are only shown")
    vacuum.add_argument(
        "--force", action="store_true", help="allow less than 24 hours; nothing may read or publish meanwhile"
    )
    found["history"].add_argument("--limit", type=int, metavar="N", help="the last N commits of each table")
    found["studies"].add_argument("--bundle", required=True, metavar="URI", help="the model")
    found["studies"].add_argument("--file", metavar="URI", help="where to write; OUTPUT/reports/MODEL-studies.parquet")
    found["verify"].add_argument("--run", dest="run_key", metavar="RUN_KEY", help="verify one run")


def _compact(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables

    done = tables.compact(options.output)
    lines = [f"{item.table}: {item.files_before} files before, {item.files_after} after" for item in done]
    return _finish(options, DONE, {"tables": [asdict(item) for item in done]}, lines)


def _vacuum(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables
    from medvision_ray.tables.upkeep import RETAIN_HOURS

    hours = RETAIN_HOURS if options.retain_hours is None else options.retain_hours
    done = tables.vacuum(options.output, retain_hours=hours, delete=options.delete, force=options.force)
    verb = "deleted" if options.delete else "would go; --delete removes them"
    lines = [f"{item.table}: {len(item.files)} files of {item.bytes / 1e6:.1f} MB {verb}" for item in done]
    return _finish(options, DONE, {"tables": [asdict(item) for item in done]}, lines)


def _history(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables

    found = tables.history(options.output, options.limit)
    lines = [
        f"{item.table:<12} {item.version:>6} {item.time:%Y-%m-%d %H:%M:%S} {item.operation:<14} {item.run_key or '-':<28} "
        f"rows +{item.rows_added or 0} -{item.rows_removed or 0}, files +{item.files_added or 0} -{item.files_removed or 0}"
        for item in found
    ]
    return _finish(options, DONE, {"commits": [asdict(item) for item in found]}, lines)


def _verify(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.verification import verify

    found = verify(options.output, options.run_key)
    result = {"ok": not found.findings, **asdict(found)}
    counted = ", ".join(f"{rows} {name} in {found.files[name]} files" for name, rows in found.rows.items())
    lines = [f"{found.runs} runs looked at; {counted}."]
    lines += [f"FAILED {item.check}: {item.sentence()}" for item in found.findings] or ["All invariants hold."]
    return _finish(options, FAILED if found.findings else DONE, result, lines)


def _studies(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.bundle import load_bundle
    from medvision_ray.reporting.studies import write_studies

    place, count = write_studies(options.output, load_bundle(options.bundle), options.file)
    return _finish(options, DONE, {"file": place, "studies": count}, [f"{count} studies in {place}"])


def _finish(
    options: argparse.Namespace, code: int, result: dict[str, Any], lines: list[str]
) -> tuple[int, dict[str, Any]]:
    if not options.json:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code, result
