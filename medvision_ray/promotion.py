"""Which model is current: a pointer that jobs and servers may name in place of a bundle, moved and moved back in one put.

A pointer is a folder or prefix called `current` of numbered notes, `000001.json` and on; the highest number holds. A
move writes the next number by a conditional put, so of two at once one wins and the other is told, on S3 and on a
disk alike, and every move stays on record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TypeVar

from medvision_ray import listing, storage
from medvision_ray.bundle import load_bundle
from medvision_ray.bundle_files import BUNDLE_YAML, read_document
from medvision_ray.config import Section
from medvision_ray.errors import BundleError, MedVisionError, StorageError

NAME = "current"
_NOTE = re.compile(r"(\d{6})\.json")
_OPTIONS = ("bundle", "baseline")
JobT = TypeVar("JobT", bound=Section)


@dataclass(frozen=True)
class Move:
    """One move of a pointer.

    Attributes:
        number: from 1.
        bundle: address of the bundle.
        model_id: what it held then.
        before: number of the move to which a rollback goes back; 0 where there is none.
        by: `promote` or `rollback`.
        at: UTC.
    """

    number: int
    bundle: str
    model_id: str
    before: int
    by: str
    at: str


def resolve(uri: str) -> str:
    """The address of the bundle that a pointer names; any other address is answered as it came.

    Raises:
        BundleError: nothing was promoted here yet, or the promoted bundle is gone or was replaced by another model.
    """
    place = storage.absolute(uri)
    if not _is_pointer(place):
        return uri
    move = current(place)
    found = read_document(move.bundle).get("model_id")
    if found != move.model_id:
        raise BundleError(
            f"Expected {move.model_id} at {move.bundle}, which was promoted at {place}, but {found} is there by now. "
            "Promote it, if it is meant, or roll back."
        )
    return move.bundle


def resolved(job: JobT) -> JobT:
    """A job with the bundles that its pointers name now, so that all its workers take the same."""
    named = {option: value for option in _OPTIONS if isinstance(value := getattr(job, option, None), str)}
    return job.model_copy(update={option: resolve(uri) for option, uri in named.items()})


def current(pointer: str) -> Move:
    """The newest move.

    Raises:
        BundleError: there is none.
    """
    found = moves(pointer)
    if not found:
        raise BundleError(
            f"Expected a promoted bundle at {storage.absolute(pointer)}, but there is none. "
            "`medvision bundle promote BUNDLE --to POINTER` makes one."
        )
    return found[-1]


def moves(pointer: str) -> list[Move]:
    """Every move so far, oldest first."""
    return [Move(**json.loads(storage.read_bytes(uri))) for _, uri in sorted(_notes(pointer))]


def promote(bundle: str, pointer: str) -> Move:
    """Make a bundle current, after it has been read and verified whole.

    Raises:
        BundleError: it is no whole bundle, or is current already.
        MedVisionError: the pointer is not called `current`, or somebody else moved it at the same moment.
    """
    found = load_bundle(bundle)
    past = moves(_checked(pointer))
    if past and (past[-1].bundle, past[-1].model_id) == (found.uri, found.model_id):
        raise BundleError(f"{found.model_id} is current at {storage.absolute(pointer)} already; nothing was moved.")
    return _move(pointer, past, found.uri, found.model_id, before=past[-1].number if past else 0, by="promote")


def rollback(pointer: str) -> Move:
    """Make the model current that was before the current one; again, the one before that.

    Raises:
        BundleError: there is none before, or its bundle is gone or another model by now.
        MedVisionError: somebody else moved the pointer at the same moment.
    """
    past = moves(_checked(pointer))
    if not past or not past[-1].before:
        raise BundleError(f"Expected a model before the current one at {storage.absolute(pointer)}, but there is none.")
    target = past[past[-1].before - 1]
    there = load_bundle(target.bundle).model_id
    if there != target.model_id:
        raise BundleError(
            f"Expected {target.model_id} at {target.bundle}, but {there} is there by now. Promote the copy that you kept."
        )
    return _move(pointer, past, target.bundle, target.model_id, before=target.before, by="rollback")


def _is_pointer(place: str) -> bool:
    return place.rsplit("/", 1)[-1] == NAME and not storage.exists(storage.join(place, BUNDLE_YAML))


def _checked(pointer: str) -> str:
    place = storage.absolute(pointer)
    if not _is_pointer(place):
        raise MedVisionError(
            f"Expected the address of a pointer, a folder or prefix called `{NAME}` that is no bundle, but got {place}."
        )
    return place


def _notes(pointer: str) -> Iterator[tuple[int, str]]:
    try:
        for found in listing.list_objects(pointer):
            match = _NOTE.fullmatch(found.path)
            if match:
                yield int(match[1]), found.uri
    except StorageError as error:
        if error.code != "not_found":
            raise


def _move(pointer: str, past: list[Move], bundle: str, model_id: str, *, before: int, by: str) -> Move:
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    move = Move(len(past) + 1, bundle, model_id, before, by, now)
    note = storage.join(pointer, f"{move.number:06d}.json")
    if not storage.create_exclusive(note, json.dumps(asdict(move), indent=1).encode()):
        raise MedVisionError(
            f"Somebody else moved {storage.absolute(pointer)} at the same moment; nothing of yours was written. Look with "
            "`medvision bundle current`, and decide again."
        )
    return move
