"""Refresh a bundle's model card with what evaluations have found; the model stays the same."""

from __future__ import annotations

from typing import Any

import pyarrow.dataset as pads
import yaml

from medvision_ray import storage, tables
from medvision_ray.bundle import load_bundle
from medvision_ray.bundle_decisions import owners_of
from medvision_ray.errors import UsageError
from medvision_ray.model_card import model_card

CARD = "MODEL_CARD.md"


def refresh_card(bundle_uri: str, output: str | None) -> tuple[str, int]:
    """Write MODEL_CARD.md beside the bundle anew; what stands between the marks of the owner's parts is kept.

    The card is no part of what a bundle's hashes are made of, so `model_id` stays.

    Args:
        output: folder or prefix whose metrics table holds evaluations of this model; None writes the training's facts.

    Returns:
        The card's address, and how many evaluations are in it.

    Raises:
        BundleError: there is no such bundle, or it was altered, or the owner's parts of its card cannot be told apart.
        UsageError: `output` has no evaluation of it.
    """
    bundle = load_bundle(bundle_uri)
    document = yaml.safe_load(storage.read_bytes(storage.join(bundle.uri, "bundle.yaml")))
    rows = newest_evaluations(output, bundle.model_id) if output is not None else []
    if output is not None and not rows:
        raise UsageError(
            f"Expected evaluations of {bundle.model_id} in {output}, but there is none, so the card stays as it is. Give the "
            "`output` of `medvision evaluate`, or leave `--evaluations` out to have the training's facts alone."
        )
    place = storage.join(bundle.uri, CARD)
    owners = owners_of(bundle.uri)
    card = model_card(
        document,
        bundle.metrics,
        len(bundle.train_digest),
        fingerprint=bundle.fingerprint,
        evaluations=rows,
        owners=owners,
        members=bundle.members,
    )
    storage.write_bytes(place, card.encode())
    return place, len({(row["dataset"], row["split"]) for row in rows})


def newest_evaluations(output: str, model_id: str) -> list[dict[str, Any]]:
    """Metric rows of the newest evaluation of each dataset and split; drift rows are of no split."""
    found = tables.read(output, "metrics", None, pads.field("model_id") == model_id)
    rows = [row for row in (found.to_pylist() if found is not None else []) if row["split"] is not None]
    newest: dict[tuple[str, str], Any] = {}
    for row in rows:
        key = row["dataset"], row["split"]
        newest[key] = max(newest.get(key, row["measured_at"]), row["measured_at"])
    kept = [row for row in rows if row["measured_at"] == newest[row["dataset"], row["split"]]]
    return sorted(kept, key=lambda row: (row["split"] != "test", row["dataset"], row["split"]))
