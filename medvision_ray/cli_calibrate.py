"""`medvision calibrate`: its short options, and the job."""

from __future__ import annotations

import argparse
import json
from typing import Any

from medvision_ray.cli_output import print_facts
from medvision_ray.logs import Log

_OPTIONS = (
    ("--bundle", "bundle", "folder or URI of the model, which stays as it is"),
    ("--labels", "labels.table", "the label table; its val split is fitted to"),
    ("--output", "output", "where predictions are kept, and bundles/NAME is written"),
    ("--to", "to", "where the new bundle is written, in place of OUTPUT/bundles/NAME"),
    ("--name", "name", "name of the new bundle; the old one's with `-calibrated` behind it unless given"),
)


def add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    """Enough to calibrate without a file."""
    for flag, key, text in _OPTIONS:
        parser.add_argument(flag, metavar=flag.strip("-").upper(), dest=key, help=f"{text} (`{key}`)")


def calibrate_overrides(options: argparse.Namespace) -> list[str]:
    """The short options as overrides of the configuration."""
    given = [(key, getattr(options, key)) for _, key, _ in _OPTIONS]
    return [f"{key}={json.dumps(value)}" for key, value in given if value is not None]


def calibrate(job: Any, options: argparse.Namespace, log: Log) -> dict[str, Any]:
    """Run the job; what was fitted, or why it was not."""
    from medvision_ray.evaluation.recalibrate import recalibrate

    found = recalibrate(job, log)
    bundle = found.bundle
    result = {
        "bundle": bundle.uri,
        "model_id": bundle.model_id,
        **{key: getattr(found, key) for key in ("images", "patients", "failed")},
        "calibration": {**found.facts["calibration"], **(bundle.calibration.document() if bundle.calibration else {})},
        "operating_points": {point.name: point.by_class(bundle.classes) for point in bundle.operating_points},
        "without_operating_points": found.facts.get("without_operating_points", {}),
        "metrics": {key: value for key, value in found.metrics.items() if key != "reliability"},
    }
    print_facts(options, result)
    return result
