"""Erase patients from an output: their rows, and what else of theirs is known to lie there or to come back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from medvision_ray import listing, storage, tables
from medvision_ray.archive.ids import ONLINE
from medvision_ray.errors import MedVisionError, StorageError, UsageError
from medvision_ray.privacy import HASHED
from medvision_ray.scoring.lease import lease
from medvision_ray.scoring.publish import is_publishing

_PATIENT_KEY = re.compile(r"[a-z2-7]{26}")
_LEASE_WAIT_SECONDS = 120.0
_MADE_FROM_ROWS = ("reports/", "evaluations/", "training/")
_OF_TRAININGS = "out_of_fold.parquet"


@dataclass(frozen=True)
class Erasure:
    """What is, or was, of the patients.

    Attributes:
        rows: rows by table.
        patients: patient keys that were given.
        unmatched_patients: of these, how many no row bears.
        images: different objects, by address.
        deleted: False after a look only.
        in_archive: of these objects, how many the archive still holds: the next run scores them again.
        not_asked: addresses that are pseudonyms, or of which the archive gave no answer.
        unfinished_runs: runs whose working files can hold the patients and whose rows are still to come.
        made_from_rows: files below OUTPUT that were made from rows or images, and may show the patients.
    """

    rows: dict[str, int]
    patients: int
    unmatched_patients: int
    images: int
    deleted: bool
    in_archive: int
    not_asked: int
    unfinished_runs: list[str]
    made_from_rows: list[str]


def erase_patients(
    output: str, patient_keys: Iterable[str], addresses: Iterable[str] = (), *, delete: bool = False
) -> Erasure:
    """Find, and with `delete` delete, every row of these patients, of all models and nights.

    No run publishes rows of the same models meanwhile. Killed at any moment, the same call goes on. Older versions
    of the tables keep the rows until `tables.vacuum` and `tables.shorten_logs`.

    Args:
        addresses: `uri` of further objects, for those whose rows name no patient; with a slash at its end, all below.

    Raises:
        UsageError: a key is none, or there are no tables.
        LeaseHeldError: a run is publishing.
        MedVisionError: a run was killed while it published; or the store refused.
    """
    keys, places = sorted(set(patient_keys)), sorted(set(addresses))
    if not (keys or places) or not all(_PATIENT_KEY.fullmatch(key) for key in keys):
        raise UsageError("Expected values of the column patient_key, 26 characters of a-z and 2-7, or addresses.")
    found = tables.rows_of_patients(output, keys, places)
    unfinished = _names_below(storage.join(output, "runs"))
    there = _asked(found.addresses)
    if delete:
        _assert_none_half_published(output, unfinished)
        models = sorted({model for rows in found.rows.values() for model in rows})
        with ExitStack() as leases:
            for model in models:
                what = f"publishing rows of {model}"
                leases.enter_context(lease(output, f"publish-{model}", what, wait_seconds=_LEASE_WAIT_SECONDS))
            found = tables.rows_of_patients(output, keys, places)
            for name in tables.ERASED_FROM:
                for model in found.rows[name]:
                    tables.erase_rows(output, name, model, found.image_ids[name])
    return Erasure(
        rows=found.count(),
        patients=len(keys),
        unmatched_patients=found.unmatched_keys,
        images=len(found.addresses),
        deleted=delete,
        in_archive=sum(answer is True for answer in there),
        not_asked=sum(answer is None for answer in there),
        unfinished_runs=unfinished,
        made_from_rows=[
            folder + name
            for folder in _MADE_FROM_ROWS
            for name in _files_below(storage.join(output, folder))
            if folder != "training/" or name.endswith(_OF_TRAININGS)
        ],
    )


def _assert_none_half_published(output: str, runs: Iterable[str]) -> None:
    """Refuse while a run's rows are in one table and not yet in the other.

    Raises:
        MedVisionError: there is such a run.
    """
    for run in runs:
        if is_publishing(storage.join(output, "runs", run)):
            raise MedVisionError(
                f"Expected no run between the tables, but {run} is publishing, or was killed while it did. Finish it with "
                "the command that began it, and erase then."
            )


def _asked(addresses: list[str]) -> list[bool | None]:
    """Whether the archive still holds each object; None where it is not known."""
    with ThreadPoolExecutor(listing.THREADS) as pool:
        return list(pool.map(_is_there, addresses))


def _is_there(address: str) -> bool | None:
    if address.startswith(HASHED):
        return None
    if address.startswith(ONLINE):  # what was sent to a server was never there
        return False
    try:
        listing.stat_object(address.removesuffix(tables.SERIES))
    except StorageError as error:
        return False if error.code == "not_found" else None
    return True


def _names_below(place: str) -> list[str]:
    """Folders of a folder that may not exist."""
    return sorted({path.split("/", 1)[0] for path in _files_below(place)})


def _files_below(place: str) -> list[str]:
    try:
        return [found.path for found in listing.list_objects(place)]
    except StorageError as error:
        if error.code != "not_found":
            raise
        return []
