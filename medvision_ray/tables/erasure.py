"""Rows of patients go from the tables, on demand; how many went from which run stays known.

A deletion is one commit of one table. The same commit carries, as application transactions, how many rows each run
has lost so far, so that neither can be without the other, whoever is killed, and `tables verify` still proves the
runs. Delta Lake keeps such transactions when it shortens its log. Nothing of them names a patient.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from medvision_ray import storage
from medvision_ray.errors import MedVisionError, UsageError
from medvision_ray.retry import retrying
from medvision_ray.tables.delta import address, dataset_of, open_table, read

ERASED_FROM = ("failures", "predictions")
"""In the order of deletion: predictions lead to the failures, so they go last."""
SERIES = "#series"
_ANY = "erased"
_IDS_A_COMMIT = 5000
_ATTEMPTS = 8
_LONGEST_PAUSE_SECONDS = 2.0
_KEYS = ["image_id", "uri", "model_id"]

Lost = Counter[tuple[str, str]]
"""Rows by model_id and run_key."""


@dataclass(frozen=True)
class PatientRows:
    """Rows of patients, by table.

    Attributes:
        rows: by table and model_id.
        image_ids: by table.
        addresses: `uri` of their objects, as the tables have it.
        unmatched_keys: how many of the patient keys that were asked for no row bears.
    """

    rows: dict[str, dict[str, int]]
    image_ids: dict[str, list[int]]
    addresses: list[str]
    unmatched_keys: int

    def count(self) -> dict[str, int]:
        """Rows by table."""
        return {name: sum(self.rows[name].values()) for name in reversed(ERASED_FROM)}


def rows_of_patients(output: str, patient_keys: Iterable[str], addresses: Iterable[str] = ()) -> PatientRows:
    """Find rows of these patients, of all models and nights.

    A failure has no patient of its own: those of the same objects count, of another model or of another version of
    the object at the same address.

    Args:
        addresses: `uri` of further objects, for those whose rows name no patient; with a slash at its end, all below.

    Raises:
        UsageError: there are no tables.
    """
    predictions, failures = read(output, "predictions", [*_KEYS, "patient_key"]), read(output, "failures", _KEYS)
    if predictions is None and failures is None:
        raise UsageError(f"Expected tables below {storage.join(output, 'tables')}, but there are none.")
    keys, places = pa.array(sorted(set(patient_keys)), pa.string()), sorted(set(addresses))
    found, known, matched = {}, list(places), 0
    if predictions is not None:
        of_theirs = pc.fill_null(pc.is_in(predictions["patient_key"], keys), False)
        found["predictions"] = predictions.filter(pc.or_(of_theirs, _at(predictions["uri"], places)))
        known += found["predictions"]["uri"].to_pylist()
        matched = pc.sum(pc.is_in(keys, pc.unique(predictions["patient_key"]))).as_py() or 0
    if failures is not None:
        found["failures"] = failures.filter(_at(failures["uri"], known))
    return PatientRows(
        rows={name: dict(Counter(rows["model_id"].to_pylist())) for name, rows in found.items()}
        | {name: {} for name in ERASED_FROM if name not in found},
        image_ids={name: pc.unique(rows["image_id"]).to_pylist() for name, rows in found.items()},
        addresses=sorted({uri for rows in found.values() for uri in rows["uri"].to_pylist()}),
        unmatched_keys=len(keys) - matched,
    )


def _at(uris: pa.ChunkedArray, places: Sequence[str]) -> pa.ChunkedArray:
    """Which lie at one of these addresses, or are the series that begins there, or lie below one with a slash."""
    plain = [place for place in places if not place.endswith("/")]
    exact = pa.array(sorted({*plain, *(place + SERIES for place in plain)}), pa.string())
    found = pc.is_in(uris, exact)
    for folder in set(places) - set(plain):
        found = pc.or_(found, pc.starts_with(uris, folder))
    return pc.fill_null(found, False)


def erase_rows(output: str, name: str, model_id: str, image_ids: Sequence[int]) -> int:
    """Delete a model's rows of these images from a table; how many went.

    Killed at any moment, the same call goes on: each of its commits holds. Older versions of the table keep the
    rows until `vacuum`.

    Raises:
        MedVisionError: the store refused, or other commits came between again and again.
    """
    return sum(
        _erase(output, name, model_id, image_ids[start : start + _IDS_A_COMMIT])
        for start in range(0, len(image_ids), _IDS_A_COMMIT)
    )


def erased_rows(output: str, name: str, runs: Iterable[tuple[str, str]]) -> Lost:
    """How many rows of this table erasures took from each of these runs, named by model_id and run_key."""
    table = open_table(output, name)
    if table is None or not _before(table, _ANY):  # the question costs a few requests a run on S3
        return Counter()
    return +Counter({run: _before(table, _transaction(*run)) for run in runs})


def _transaction(model_id: str, run_key: str) -> str:
    return f"{_ANY}/{model_id}/{run_key}"


def _before(table: Any, transaction: str) -> int:
    return table.transaction_version(transaction) or 0


def _erase(output: str, name: str, model_id: str, image_ids: Sequence[int]) -> int:
    place = address(output, name)
    for attempt in range(_ATTEMPTS):
        gone = retrying(partial(_attempt, output, name, model_id, image_ids), place)
        if gone is not None:
            return gone
        time.sleep(random.uniform(0, min(0.1 * 2**attempt, _LONGEST_PAUSE_SECONDS)))
    raise MedVisionError(
        f"Expected to delete rows at {place}, but other commits came between {_ATTEMPTS} times. Call again: what is "
        "deleted stays so."
    )


def _attempt(output: str, name: str, model_id: str, image_ids: Sequence[int]) -> int | None:
    """One try, counted and committed at one version; None where another commit came between.

    After a commit whose answer was lost the next try finds nothing more to delete.

    Raises:
        StorageError: the store failed or refused.
    """
    from deltalake import CommitProperties, Transaction
    from deltalake.exceptions import CommitFailedError, DeltaError

    table = open_table(output, name)
    if table is None:
        return 0
    try:
        lost = _counted(table, output, name, model_id, image_ids)
        if not lost:
            return 0
        taken = {_ANY: lost.total(), **{_transaction(*run): count for run, count in sorted(lost.items())}}
        totals = [Transaction(what, _before(table, what) + count) for what, count in taken.items()]
        quoted = model_id.replace("'", "''")
        done = table.delete(
            f"model_id = '{quoted}' AND image_id IN ({', '.join(map(str, image_ids))})",
            commit_properties=CommitProperties(app_transactions=totals),
        )
    except CommitFailedError:
        return None
    except (DeltaError, OSError) as error:
        raise storage.table_error(error, address(output, name)) from None
    if done["num_deleted_rows"] != lost.total():
        raise MedVisionError(
            f"Expected to delete {lost.total()} rows at {address(output, name)}, but {done['num_deleted_rows']} went. "
            "Please report this."
        )
    return lost.total()


def _counted(table: Any, output: str, name: str, model_id: str, image_ids: Sequence[int]) -> Lost:
    theirs = pads.field("image_id").isin(pa.array(image_ids, pa.int64())) & (pads.field("model_id") == model_id)
    rows = dataset_of(table, output, name).to_table(columns=["model_id", "run_key"], filter=theirs)
    return Counter(zip(rows["model_id"].to_pylist(), rows["run_key"].to_pylist(), strict=True))
