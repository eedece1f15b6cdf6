"""What verbs of the command line print beside a JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from medvision_ray.logs import finite


def print_facts(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Facts as lines, unless JSON is wanted."""
    if options.json:
        return
    for key, value in facts.items():
        text = json.dumps(finite(value), indent=2, default=str) if isinstance(value, dict | list) else value
        sys.stdout.write(f"{key}: {text}\n")
