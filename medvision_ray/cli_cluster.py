"""`medvision cluster check` and `medvision submit`: parse, call one function, print what it found."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from medvision_ray.ending import DONE, FAILED
from medvision_ray.errors import UsageError

JOB_VERBS = ("score", "train", "evaluate", "compare", "report", "inventory")
"""Verbs that end by themselves."""


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
    _add_submit(verbs, add_json)


def split_submission(given: list[str]) -> tuple[list[str], list[str]]:
    """A command line, and what stands behind `--` where it submits: argparse gives options there back as unknown."""
    if given[:1] != ["submit"] or "--" not in given:
        return given, []
    place = given.index("--")
    return given[:place], given[place + 1 :]


def _add_submit(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "run a verb on a cluster through its job API, follow its log and end with its own exit code"
    usage = "medvision submit JOB [--config FILE] [OPTION ...] [-- OPTION OF THE JOB ...]"
    submit = verbs.add_parser("submit", help=text, description=text, usage=usage)
    submit.add_argument("job", choices=JOB_VERBS, help="the verb to run there")
    submit.add_argument("--config", metavar="FILE", help="YAML file of the job; it travels with it")
    submit.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        metavar="URL",
        help="the dashboard (RAY_API_SERVER_ADDRESS; http://127.0.0.1:8265)",
    )
    submit.add_argument("--day", metavar="WORD", help="part of the job's name; today's date in UTC unless given")
    submit.add_argument("--code", metavar="PATH", help="wheel or package folder to ship; the nodes' own unless given")
    submit.add_argument("--tries", type=int, default=1, metavar="N", help="attempts; codes 2 and 3 are not tried again")
    submit.add_argument(
        "--patience", type=float, default=600.0, metavar="SECONDS", help="how long a cluster that is away is waited for"
    )
    submit.add_argument("--again", action="store_true", help="submit once more what is over with code 0, 2 or 3")
    submit.add_argument("--no-wait", action="store_true", help="end with 0 once it is submitted")
    add_json(submit)
    submit.set_defaults(run=_submit)


def _submit(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.submission import Cluster, Submission, connector, submit

    for name in ("config", "code"):
        given = getattr(options, name)
        if given is not None and not os.access(given, os.R_OK):
            raise UsageError(f"Expected a readable --{name} at {given}.")
    wanted = Submission(
        verb=options.job,
        arguments=tuple(options.behind),
        config=Path(options.config) if options.config else None,
        day=datetime.now(timezone.utc).date().isoformat() if options.day is None else options.day,
        code=Path(options.code) if options.code else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        identity, code = submit(
            wanted,
            Cluster(connector(options.address), options.log, options.patience),
            _write,
            folder=Path(folder),
            tries=options.tries,
            again=options.again,
            wait=not options.no_wait,
        )
    return code, {"submission_id": identity, "job_exit_code": None if options.no_wait else code}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
