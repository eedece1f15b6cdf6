"""Whole commits, once a run, and reading.

Tables are Delta Lake tables (Parquet files and a transaction log): a reader sees a whole commit or
nothing. Each commit carries an application transaction named by its run, so doing it twice is a no-op.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.errors import MedVisionError, StorageError
from medvision_ray.retry import retrying
from medvision_ray.tables.schema import PARTITIONS, PROBABILITY, PROBABILITY_PREFIXES, known_schema

TARGET_FILE_BYTES = 128 << 20
_ATTEMPTS = 8
_LONGEST_PAUSE_SECONDS = 2.0
_RANGES = ("run_key", "model_id")
_LOG_COLUMNS = {"path", "size_bytes", *(f"{kind}.{name}" for kind in ("min", "max", "null_count") for name in _RANGES)}

Replacing = tuple[str, NDArray[np.int64]]
Batches = Iterable[pa.RecordBatch] | Callable[[], Iterable[pa.RecordBatch]]


def address(output: str, name: str) -> str:
    """Where a table of an output lies: OUTPUT/tables/NAME."""
    return storage.join(output, "tables", name)


def open_table(output: str, name: str) -> Any:
    """The newest version as a `deltalake.DeltaTable`, or None where there is no table yet.

    Raises:
        StorageError: the store refused.
    """
    return retrying(partial(_open, output, name), address(output, name))


def _open(output: str, name: str) -> Any:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    place = address(output, name)
    try:
        return DeltaTable(storage.table_uri(place), storage_options=storage.table_options(place))
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise storage.table_error(error, place) from None


def is_committed(output: str, name: str, run_key: str) -> bool:
    """Whether a run has committed to this table."""
    table = open_table(output, name)
    return table is not None and table.transaction_version(run_key) is not None


def commit(
    output: str,
    name: str,
    schema: pa.Schema,
    batches: Batches,
    run_key: str,
    *,
    replacing: Replacing | None = None,
) -> bool:
    """Commit a run's rows in one commit; False when this run has committed here before.

    Columns that the table lacks are added (older rows read as null); columns that only the table has
    (a newer version wrote them) are null in these rows. When another run's commit comes between or the
    store fails for a while, this one is tried again; a generator can be read only once, so with one the
    error says to run again.

    Args:
        batches: streamed, so that memory stays bounded; held in memory with `replacing`. A function that
            starts the stream anew can be tried again, a generator cannot.
        replacing: `(model_id, image_ids)`: this model's earlier rows of these images go in the same commit.
            At most one earlier row an image; every new row is of this model, one an image.

    Raises:
        MedVisionError: a column has another type in the table, or the store refused the commit.
    """
    if replacing is not None:
        batches = list(batches() if callable(batches) else batches)
    place, once = address(output, name), isinstance(batches, Iterator)
    attempt_commit = partial(_attempt, output, name, schema, batches, run_key, replacing=replacing)
    for attempt in range(_ATTEMPTS):
        try:
            outcome = attempt_commit() if once else retrying(attempt_commit, place)
        except StorageError as error:
            if not (once and error.transient):
                raise
            break
        if outcome in ("committed", "known"):
            return outcome == "committed"
        if outcome == "refused" or once:
            break
        time.sleep(random.uniform(0, min(0.1 * 2**attempt, _LONGEST_PAUSE_SECONDS)))
    if is_committed(output, name, run_key):  # another process of the same run was first
        return False
    raise MedVisionError(
        f"Expected to commit to the table at {place}, but the store refused, the rows could not be read, "
        "or another run committed at the same moment. Nothing of this commit is visible; the same command goes on."
    )


def _attempt(
    output: str,
    name: str,
    schema: pa.Schema,
    batches: Batches,
    run_key: str,
    *,
    replacing: Replacing | None,
) -> Literal["committed", "known", "conflict", "refused"]:
    """One try. A commit whose answer was lost is found by the next one, which looks for its transaction first.

    Raises:
        StorageError: the store failed or refused.
    """
    from deltalake.exceptions import CommitFailedError, DeltaError

    try:
        table = _open_or_create(output, name, schema)
        if table.transaction_version(run_key) is not None:
            return "known"
        _assert_same_types(table, schema, address(output, name))
        stream = batches() if callable(batches) else batches
        if replacing is not None and len(replacing[1]):
            _replace(table, pa.Table.from_batches(stream, schema), replacing, run_key)
        else:
            _append(table, schema, stream, run_key)
    except CommitFailedError:
        return "conflict"
    except (DeltaError, OSError) as error:
        problem = storage.table_error(error, address(output, name))
        if problem.transient or problem.code != "read_error":
            raise problem from None
        return "refused"
    return "committed"


def _open_or_create(output: str, name: str, schema: pa.Schema) -> Any:
    """The table at one version, at which the caller looks for its own transaction.

    A commit through this object fails if the same transaction came after that version. Naming the
    table by its address instead would open a newer version and commit the same rows twice.
    """
    table = _open(output, name)
    if table is not None:
        return table
    from deltalake import DeltaTable

    place = address(output, name)
    storage.make_folder(place)
    DeltaTable.create(
        storage.table_uri(place),
        schema,
        mode="ignore",
        partition_by=PARTITIONS[name] or None,
        storage_options=storage.table_options(place),
    )
    return _open(output, name)


def _properties(run_key: str) -> Any:
    from deltalake import CommitProperties, Transaction

    return CommitProperties(custom_metadata={"run_key": run_key}, app_transactions=[Transaction(run_key, 1)])


def _append(table: Any, schema: pa.Schema, batches: Iterable[pa.RecordBatch], run_key: str) -> None:
    from deltalake import write_deltalake

    write_deltalake(
        table,
        pa.RecordBatchReader.from_batches(schema, batches),
        mode="append",
        schema_mode="merge",
        target_file_size=TARGET_FILE_BYTES,
        commit_properties=_properties(run_key),
    )


def _replace(table: Any, rows: pa.Table, replacing: Replacing, run_key: str) -> None:
    """Merge: an earlier row whose image has a new row is overwritten, one that has none goes.

    The literal model_id keeps other models' files out of what is read, rewritten and in conflict.
    """
    model_id, ids = replacing
    gone = np.setdiff1d(ids, rows["image_id"].to_numpy())
    markers = pa.table({"model_id": [model_id] * len(gone), "image_id": gone})  # no run_key: nothing replaces these
    source = pa.concat_tables([rows, markers], promote_options="default")
    for field in pa.schema(table.schema()):  # else a replaced row would keep what a newer version wrote there
        if field.name not in source.column_names:
            source = source.append_column(field, pa.nulls(source.num_rows, field.type))
    quoted = model_id.replace("'", "''")
    (
        table.merge(
            source,
            f"t.model_id = '{quoted}' AND t.image_id = s.image_id",
            source_alias="s",
            target_alias="t",
            merge_schema=True,
            commit_properties=_properties(run_key),
        )
        .when_matched_delete("s.run_key IS NULL")
        .when_matched_update_all("s.run_key IS NOT NULL")
        .when_not_matched_insert_all("s.run_key IS NOT NULL")
        .execute()
    )


def _assert_same_types(table: Any, schema: pa.Schema, place: str) -> None:
    """Refuse what deltalake would cast in silence (text to a number, float64 to float32)."""
    here = pa.schema(table.schema())
    for field in schema:
        place_of = here.get_field_index(field.name)
        if place_of >= 0 and not same_type(here.field(place_of).type, field.type):
            raise MedVisionError(
                f"Expected column {field.name} of the table at {place} as {field.type}, but there it is "
                f"{here.field(place_of).type}: another version of medvision_ray wrote it. "
                "Use that version, or publish to another `output`."
            )


def same_type(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether two types agree; a nested record may have more fields on either side."""
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        shared = [one.field(i).name for i in range(one.num_fields) if other.get_field_index(one.field(i).name) >= 0]
        return all(same_type(one.field(name).type, other.field(name).type) for name in shared)
    if pa.types.is_list(one) and pa.types.is_list(other):
        return same_type(one.value_type, other.value_type)
    return bool(one == other)


def dataset(output: str, name: str, columns: Sequence[str] = ()) -> pads.Dataset | None:
    """A table's newest version to scan, or None where there is no table yet.

    Columns that this version knows and the table lacks are null; so are classes of `columns`
    (`p_<class>`, `c_<class>`) that no model of the table has.
    """
    table = open_table(output, name)
    return None if table is None else dataset_of(table, output, name, columns)


def dataset_of(table: Any, output: str, name: str, columns: Sequence[str] = ()) -> pads.Dataset:
    """The same of an open table, at the version that it was opened at."""
    schema = pa.schema(table.schema())
    of_classes = [column for column in columns if column.startswith(PROBABILITY_PREFIXES)]
    wanted = [*known_schema(name), *[pa.field(column, PROBABILITY) for column in of_classes]]
    absent = {field.name: field for field in wanted if field.name not in schema.names}
    whole = pa.schema([*schema, *absent.values()])
    if table.protocol().min_reader_version > 1:  # deleted rows or renamed columns of another writer
        return table.to_pyarrow_dataset().replace_schema(whole)
    filesystem, root = storage.filesystem(address(output, name))
    kind = pads.ParquetFileFormat()
    log = pa.table(table.get_add_actions(flatten=True))
    used = [name for name in log.column_names if name in _LOG_COLUMNS or name.startswith("partition.")]
    files = log.select(used).to_pylist()
    fragments = [
        kind.make_fragment(
            f"{root}/{unquote(item['path'])}",
            filesystem,
            partition_expression=_promise(item),
            file_size=item["size_bytes"],
        )
        for item in files
    ]
    return pads.FileSystemDataset(fragments, whole, kind, filesystem)


def _promise(item: dict[str, Any]) -> pads.Expression:
    """What the log knows of a file's rows, by which files are skipped unopened.

    Partitions and the two columns that are searched for, no more: deltalake's own dataset promises the
    range of every column, which takes it 6 s for the 365 files of a year of nights.
    """
    promise = pads.scalar(True)
    for key, value in item.items():
        if key.startswith("partition."):
            promise &= pads.field(key.removeprefix("partition.")) == value
    for column in _RANGES:
        low, high = item.get(f"min.{column}"), item.get(f"max.{column}")
        if low is not None and high is not None and item.get(f"null_count.{column}") == 0:
            promise &= (pads.field(column) >= low) & (pads.field(column) <= high)
    return promise


def read(
    output: str, name: str, columns: Sequence[str] | None = None, condition: pads.Expression | None = None
) -> pa.Table | None:
    """Rows of a table, or None where there is no table yet.

    Args:
        columns: which columns; None is all. As for `dataset`, columns that the table lacks are null.
        condition: a pyarrow expression over columns; rows of other partitions are not read.
    """
    found = dataset(output, name, columns or ())
    if found is None:
        return None
    place = address(output, name)

    def scan() -> pa.Table:
        try:
            return found.to_table(columns=list(columns) if columns else None, filter=condition)
        except OSError as error:
            raise storage.table_error(error, place) from None

    return retrying(scan, place)
