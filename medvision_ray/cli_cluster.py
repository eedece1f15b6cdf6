"""`medvision cluster check`: parse, call one function, print what it found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import yaml

from medvision_ray.ending import DONE, FAILED
from medvision_ray.errors import UsageError


def add_cluster_verbs(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Put the verbs about clusters into the command line."""
    cluster = verbs.add_parser("cluster", help="check a cluster launcher file").add_subparsers(
        dest="action", required=True
    )
    text = "hold a cluster launcher file (AWS) against Ray's schema and stricter rules; exit code 1 where one is broken"
    check = cluster.add_parser("check", help=text, description=text)
    check.add_argument("file", help="YAML file for `ray up`")
    add_json(check)
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.launcher import findings, validate_with_ray

    try:
        with open(options.file, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, yaml.YAMLError):
        raise UsageError(f"Expected a readable YAML file at {options.file}.") from None
    if not isinstance(config, dict):
        raise UsageError(f"Expected a mapping in {options.file}.")
    validate_with_ray(config)
    found = findings(config)
    if not options.json:
        sys.stdout.write("".join(f"FAILED {line}\n" for line in found) or "All rules hold.\n")
    return FAILED if found else DONE, {"ok": not found, "findings": found}
