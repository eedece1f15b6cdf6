"""`medvision explain`: its short options, and the job."""

from __future__ import annotations

import argparse
import json
from typing import Any

from medvision_ray.logs import Log


def add_explain_options(parser: argparse.ArgumentParser) -> None:
    """Short ways to say what is explained, beside the options that every job has."""
    for flag, key, text in (
        ("--bundle", "bundle", "folder or URI of the trained model"),
        ("--output", "output", "where pictures and JSON files go"),
        ("--class", "class_name", "the class to explain; each image's likeliest unless given"),
    ):
        parser.add_argument(flag, metavar=flag.strip("-").upper(), dest=key, help=f"{text} (`{key}`)")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeatable (`images`)")


def explain_overrides(options: argparse.Namespace) -> list[str]:
    """The short options as overrides of the configuration."""
    given = [(key, getattr(options, key)) for key in ("bundle", "output", "class_name")]
    found = [f"{key}={json.dumps(value)}" for key, value in given if value is not None]
    return [*found, *([f"images={json.dumps(options.image)}"] if options.image else [])]


def explain(job: Any, log: Log) -> dict[str, Any]:
    """Run the job; what was written, and which images failed."""
    from medvision_ray.reporting.explanations import explain_images

    done = explain_images(job, log)
    return {"written": list(done.written), "failed": list(done.failed)}
