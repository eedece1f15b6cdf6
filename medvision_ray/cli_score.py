"""Options of `medvision score`: short ways to say what changes from night to night."""

from __future__ import annotations

import argparse
import json


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """What a platform engineer changes from night to night."""
    for flag, key, metavar, text in (
        ("--since", "archive.since", "WHEN", "only objects modified since an ISO date or an age such as 36h, 7d"),
        ("--limit", "archive.limit", "N", "only the first N new objects"),
        ("--part", "archive.part", "K/N", "only part K of N even ones of a huge archive; a run each"),
        ("--max-hours", "max_hours", "HOURS", "stop beginning objects then, publish, leave the rest to the next run"),
    ):
        parser.add_argument(flag, metavar=metavar, dest=key, help=f"{text} (`{key}`)")
    parser.add_argument(
        "--prefix", action="append", default=[], metavar="PATH", help="only below this path of the archive; repeatable"
    )
    parser.add_argument(
        "--retry-failed",
        nargs="?",
        const="true",
        metavar="CODE,...",
        help="score again what failed before, all or those of these error codes",
    )
    parser.add_argument("--dry-run", action="store_true", help="count what would be scored; write nothing")


def score_overrides(options: argparse.Namespace) -> list[str]:
    """The options as overrides `KEY=VALUE` of the job's configuration."""
    keys = ("archive.since", "archive.limit", "archive.part", "max_hours")
    found = [f"{key}={value}" for key in keys if (value := getattr(options, key)) is not None]
    if options.prefix:
        found.append(f"archive.prefix={json.dumps(options.prefix)}")
    if options.retry_failed:
        codes = options.retry_failed
        found.append(f"retry_failed={codes if codes == 'true' else json.dumps(codes.split(','))}")
    return found
