"""Old commits go from the tables' logs: they hold the smallest and largest values of files that are long gone.

Among those values can be a patient's key and an object's address. What a reader of the newest version needs of the
commits is in a checkpoint: the files, and which run has committed.
"""

from __future__ import annotations

import re
import time
from typing import Any

from medvision_ray import listing, storage
from medvision_ray.tables.delta import address, open_table
from medvision_ray.tables.schema import TABLES

_LOG_FILE = re.compile(r"(\d{20})\.(json|checkpoint(\..+)?\.parquet)")


def shorten_logs(output: str, *, retain_hours: float, delete: bool = False) -> dict[str, int]:
    """Find, and with `delete` remove, commits that only versions older than `retain_hours` need; how many by table.

    `history` and versions of that age are gone then. Nothing may have read or published for longer than that
    without opening the table anew (`upkeep.MIN_RETAIN_HOURS`). Killed at any moment, the rest goes the next time.

    Raises:
        StorageError: the store refused.
    """
    counts = {}
    for name in TABLES:
        table = open_table(output, name)
        if table is not None:
            log = storage.join(address(output, name), "_delta_log")
            counts[name] = _shorten(table, log, retain_hours, delete=delete)
    return counts


def _shorten(table: Any, log: str, retain_hours: float, *, delete: bool) -> int:
    from deltalake.exceptions import DeltaError

    if delete:
        try:
            table.create_checkpoint()
        except (DeltaError, OSError) as error:
            raise storage.table_error(error, log) from None
    found = [(_LOG_FILE.fullmatch(item.path), item) for item in listing.list_objects(log)]
    files = [(int(match[1]), match[2] != "json", item) for match, item in found if match]  # oldest first
    until_us = (time.time() - retain_hours * 3600) * 1e6
    starts = [version for version, checkpoint, item in files if checkpoint and (item.mtime_us or until_us) <= until_us]
    if not retain_hours:
        starts.append(table.version())  # its checkpoint may bear a time of the store's clock
    first = max(starts, default=0)
    old = [item.uri for version, _, item in files if version < first]
    for uri in old if delete else ():
        storage.delete_object(uri)
    return len(old)
