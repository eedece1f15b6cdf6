"""`medvision cluster check`, `medvision submit` and `medvision plan`: parse, call one function, print what it found."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from medvision_ray.ending import DONE, FAILED
from medvision_ray.errors import UsageError

JOB_VERBS = ("score", "train", "tune", "evaluate", "compare", "calibrate", "report", "inventory")
"""Verbs that end by themselves."""
MODEL_NAMES, GPU_NAMES = ("small", "hybrid"), ("h100", "l4")


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
    _add_plan(verbs, add_json)


def _add_plan(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "nodes, hours and money for an archive, out of measured costs of each stage (docs/scaling.md)"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("--images", type=float, required=True, metavar="N", help="objects to score, such as 50e6")
    plan.add_argument(
        "--mix", default="ct", metavar="NAME=SHARE,...", help="formats: ct=0.7,cr-rle=0.3; ct unless given"
    )
    plan.add_argument("--model", choices=MODEL_NAMES, default="hybrid", help="hybrid (MobileNetV2) unless given")
    plan.add_argument("--gpu", choices=GPU_NAMES, help="which GPU predicts; the CPUs unless given")
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--hours", type=float, metavar="HOURS", help="how long it may take")
    size.add_argument("--nodes", type=int, metavar="N", help="how many CPU workers there are")
    plan.add_argument("--prefixes", type=int, default=1, metavar="N", help="prefixes that objects are spread over; 1")
    for name, text in (
        ("cores", "virtual cores of a CPU worker"),
        ("cpu-price", "dollars an hour of a CPU worker"),
        ("gpu-price", "dollars an hour of a node of one GPU"),
        ("head-price", "dollars an hour of the head"),
    ):
        plan.add_argument(f"--{name}", type=float, metavar="X", help=text)
    add_json(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import planning

    given = {name: getattr(options, name) for name in ("cores", "cpu_price", "gpu_price", "head_price")}
    if any(value is not None and not 0 < value < math.inf for value in given.values()):
        raise UsageError("Expected cores and prices above 0.")
    found = planning.plan(
        options.images,
        planning.parse_mix(options.mix),
        model=options.model,
        gpu=options.gpu,
        hours=options.hours,
        nodes=options.nodes,
        prefixes=options.prefixes,
        site=replace(planning.Site(), **{name: value for name, value in given.items() if value is not None}),
    )
    if not options.json:
        parts = f" (--part 1/{found.runs} and so on)" if found.runs > 1 else ""
        gpus = f" and {found.gpu_nodes} GPU nodes" if options.gpu else ""
        lines = [
            f"{found.cpu_nodes} CPU nodes{gpus}, {found.hours:.1f} hours, {found.dollars:,.0f} dollars",
            f"bottleneck: {found.bottleneck}; {found.images_per_second:,.0f} images/s",
            f"requests/s: {found.gets_per_second:,.0f} GET on each archive prefix, {found.puts_per_second:,.0f} PUT of rows",
            f"runs: {found.runs}{parts}; tables grow by {found.table_gigabytes:,.1f} GB",
            *[f"WARNING {line}" for line in found.warnings],
        ]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return DONE, asdict(found)


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
