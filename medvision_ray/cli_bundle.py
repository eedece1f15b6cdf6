"""`medvision bundle ACTION`: look at a bundle, make several one, write its card anew, say which is current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from medvision_ray.cli_output import print_facts

if TYPE_CHECKING:
    from medvision_ray.promotion import Move

DONE = 0


def add_bundle_verb(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `bundle` and its actions to the verbs of the command line."""
    bundle = verbs.add_parser(
        "bundle", help="look at a bundle, make several one, or say which is current"
    ).add_subparsers(dest="action", required=True)
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
    promoted = bundle.add_parser("promote", help="make a bundle the current one of a pointer")
    promoted.add_argument("uri", help="folder or URI of the bundle")
    promoted.add_argument("--to", required=True, metavar="POINTER", help="folder or prefix called `current`")
    add_json(promoted)
    promoted.set_defaults(run=_promote)
    for name, run, text in (
        ("rollback", _rollback, "make the bundle current again that was before the current one"),
        ("current", _current, "print every move of a pointer, the current bundle last"),
    ):
        moved = bundle.add_parser(name, help=text)
        moved.add_argument("pointer", help="folder or prefix called `current`")
        add_json(moved)
        moved.set_defaults(run=run)


def _show(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.bundle import load_bundle
    from medvision_ray.promotion import resolve

    bundle = load_bundle(resolve(options.uri))
    result = {
        "model_id": bundle.model_id,
        "architecture": bundle.architecture.model_dump(mode="json"),
        "preprocess": bundle.preprocess.model_dump(mode="json"),
        "classes": list(bundle.classes),
        "multi_label": bundle.multi_label,
        "thresholds": dict(zip(bundle.classes, bundle.thresholds, strict=False)),
        "class_offsets": dict(zip(bundle.classes, bundle.class_offsets, strict=False)),
        "mask_threshold": bundle.mask_threshold if bundle.architecture.segmentation else None,
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


def _promote(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.promotion import promote

    return _moved(options, promote(options.uri, options.to))


def _rollback(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.promotion import rollback

    return _moved(options, rollback(options.pointer))


def _moved(options: argparse.Namespace, move: Move) -> tuple[int, dict[str, Any]]:
    result = {"current": move.model_id, "bundle": move.bundle, "move": move.number}
    print_facts(options, result)
    return DONE, result


def _current(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from dataclasses import asdict

    from medvision_ray.promotion import current, moves

    newest, past = current(options.pointer), moves(options.pointer)
    for move in past if not options.json else ():
        sys.stdout.write(f"{move.number:>6}  {move.at[:19]}  {move.by:<8}  {move.model_id}  {move.bundle}\n")
    return DONE, {"current": newest.model_id, "bundle": newest.bundle, "moves": [asdict(move) for move in past]}
