"""Markers of the blocks that are being worked on: how an actor knows that a block killed another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from medvision_ray import listing, storage
from medvision_ray.errors import CredentialsError, StorageError


@contextmanager
def block_attempt(run_folder: str, step: str, first_id: int) -> Iterator[int]:
    """Mark a block as being worked on; gives the number of earlier attempts that did not end.

    Args:
        step: `prepare` or `predict`: a block that killed one may pass the other.
        first_id: image_id of the block's first object.

    Raises:
        CredentialsError: the store accepts no request.
    """
    marker = storage.join(run_folder, "inflight", f"{step}-{first_id}")
    try:
        earlier = _attempts(marker)
        storage.write_bytes(marker, json.dumps({"attempts": earlier + 1}).encode())
        yield earlier
        storage.delete_object(marker)  # not in `finally`: an attempt that raised has not ended either
    except StorageError as error:
        if error.code != "credentials":
            raise
        raise CredentialsError(str(error), code=error.code) from None


def forgive_attempts(run_folder: str) -> None:
    """Count every marked block as tried once: a driver that was killed took its workers with it, whatever they did.

    The blocks are still prepared with care, but none is given up for how often a command was stopped.
    """
    folder = storage.join(run_folder, "inflight")
    try:
        names = [item.path for item in listing.list_objects(folder)]
    except StorageError as error:
        if error.code != "not_found":
            raise
        return
    for name in names:
        storage.write_bytes(storage.join(folder, name), json.dumps({"attempts": 1}).encode())


def _attempts(marker: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(marker))["attempts"])
    except StorageError as error:
        if error.code != "not_found":
            raise
        return 0
