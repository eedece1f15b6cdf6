"""`medvision bundle ACTION`: look at a bundle, make several one, write its card anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from medvision_ray.cli_output import print_facts

DONE = 0


def add_bundle_verb(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `bundle` and its actions to the verbs of the command line."""
    bundle = verbs.add_parser("bundle", help="look at a bundle, or make several one").add_subparsers(
        dest="action", required=True
    )
    show = bundle.add_parser("show", help="print what a bundle is")
    show.add_argument("uri", help="folder or URI of the bundle")
    add_json(show)
    show.set_defaults(run=_show)
    ensemble = bundle.add_parser("ensemble", help="make several bundles one, a bundle of its own")
    ensemble.add_argument("members", nargs="+", metavar="MEMBER", help="folder or URI of a bundle; two or more")
    ensemble.add_argument("--output", required=True, metavar="URI", help="folder or URI of the ensemble")
    ensemble.add_argument("--name", required=True, help="name of the ensemble: letters, digits, `.`, `_`, `-`")
    ensemble.add_argument(
        "--vote", choices=("soft", "majority"), default="soft", help="mean of probabilities, or votes"
    )
    add_json(ensemble)
    ensemble.set_defaults(run=_ensemble)
    card = bundle.add_parser("card", help="write the model card anew, with evaluations")
    card.add_argument("uri", help="folder or URI of the bundle; the model and the owner's parts of the card stay")
    card.add_argument("--evaluations", metavar="OUTPUT", help="the folder or prefix that holds tables/")
    add_json(card)
    card.set_defaults(run=_card)


def _show(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.bundle import load_bundle

    bundle = load_bundle(options.uri)
    result = {
        "model_id": bundle.model_id,
        "architecture": bundle.architecture.model_dump(mode="json"),
        "preprocess": bundle.preprocess.model_dump(mode="json"),
        "classes": list(bundle.classes),
        "multi_label": bundle.multi_label,
        "thresholds": dict(zip(bundle.classes, bundle.thresholds, strict=False)),
        "calibration": bundle.calibration.document() if bundle.calibration else None,
        "operating_points": {point.name: point.by_class(bundle.classes) for point in bundle.operating_points},
        "weights_sha256": bundle.weights_sha256,
        "trained": bundle.trained,
        "metrics": bundle.metrics,
        "train_images": len(bundle.train_digest),
        **({"vote": bundle.vote, "members": [item.model_id for item in bundle.members]} if bundle.vote else {}),
    }
    print_facts(options, result)
    return DONE, result


def _ensemble(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.bundle import load_bundle
    from medvision_ray.ensemble import save_ensemble

    members = [load_bundle(uri) for uri in options.members]
    bundle = save_ensemble(options.output, options.name, options.vote, members)
    names = [member.model_id for member in bundle.members]
    result = {"bundle": bundle.uri, "model_id": bundle.model_id, "vote": bundle.vote, "members": names}
    print_facts(options, result)
    return DONE, result


def _card(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.reporting.card import refresh_card

    place, count = refresh_card(options.uri, options.evaluations)
    result = {"card": place, "evaluations": count}
    print_facts(options, result)
    return DONE, result
