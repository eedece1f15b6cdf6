"""Markers of the blocks that are being worked on: how an actor knows that a block killed another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from medvision_ray import listing, storage
from medvision_ray.errors import CredentialsError, StorageError

_FOLDER = "inflight"


@contextmanager
def block_attempt(run_folder: str, step: str, entries: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Mark a block as being worked on; gives the number of earlier attempts that did not end.

    Args:
        step: `prepare` or `predict`: a block that killed one may pass the other.
        entries: the block's objects; the image_id of the first names it.

    Raises:
        CredentialsError: the store accepts no request.
    """
    marker = storage.join(run_folder, _FOLDER, f"{step}-{entries[0]['image_id']}")
    try:
        earlier = _read(marker).get("attempts", 0)
        storage.write_bytes(marker, json.dumps({"attempts": earlier + 1, "rows": len(entries)}).encode())
        yield earlier
        storage.delete_object(marker)  # not in `finally`: an attempt that raised has not ended either
    except StorageError as error:
        if error.code != "credentials":
            raise
        raise CredentialsError(str(error), code=error.code) from None


def unfinished_blocks(run_folder: str) -> dict[int, int]:
    """Rows of each block whose preparation was begun and not ended, by the image_id of its first object."""
    found = {}
    for name in _names(run_folder):
        step, _, first = name.partition("-")
        if step == "prepare":
            found[int(first)] = int(_read(storage.join(run_folder, _FOLDER, name)).get("rows", 1))
    return found


def forgive_attempts(run_folder: str) -> None:
    """Count every marked block as tried once: a driver that was killed took its workers with it, whatever they did.

    The blocks are still prepared with care, but none is given up for how often a command was stopped.
    """
    for name in _names(run_folder):
        marker = storage.join(run_folder, _FOLDER, name)
        storage.write_bytes(marker, json.dumps({**_read(marker), "attempts": 1}).encode())


def _names(run_folder: str) -> list[str]:
    try:
        return [item.path for item in listing.list_objects(storage.join(run_folder, _FOLDER))]
    except StorageError as error:
        if error.code != "not_found":
            raise
        return []


def _read(marker: str) -> dict[str, int]:
    try:
        found: dict[str, int] = json.loads(storage.read_bytes(marker))
    except StorageError as error:
        if error.code != "not_found":
            raise
        return {}
    return found
