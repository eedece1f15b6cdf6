"""Prove the tables: every object has one row, every run's counts hold, every file is there and readable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import image_ids
from medvision_ray.errors import UsageError
from medvision_ray.tables.delta import open_table, same_type

_EXAMPLES = 5
_BATCH_ROWS = 2048
_SUM_TOLERANCE = 5e-3  # probabilities of a bfloat16 model, averaged over frames
_KEYS = ("model_id", "run_key", "image_id")
_Key = tuple[str, str]
_NEVER_NULL = ("run_key", "model_id", "image_id", "uri", "etag")
_BUFFER_BYTES = 1 << 20

CHECKS = {
    "missing_file": "the log names a data file that is not there",
    "file_size": "a data file has another size than the log states",
    "unreadable_file": "a data file cannot be read whole",
    "row_count": "a data file holds another number of rows than the log states",
    "missing_column": "a column of this version is missing",
    "column_type": "a column has another type than this version writes",
    "null_value": "a value is null that must not be",
    "image_id": "image_id is not the one of address and etag",
    "probability_range": "a probability is outside [0, 1]",
    "probability_sum": "the probabilities of a single-label model do not sum to 1",
    "duplicate_row": "a model has more than one row for an image, over predictions and failures",
    "run_listed": "`runs` has more than one row of a run",
    "scored_count": "predictions of a run differ from `scored` in `runs`",
    "failed_count": "failures of a run are more than `failed` in `runs`",
    "model_failures": "failures of a model differ from what its runs failed, less what they retried",
    "listed_count": "listed differs from already_done + scored + failed + not_scored",
    "unpublished_run": "rows of a run that `runs` does not hold: it is being published now, or its publishing was "
    "killed and the same command finishes it; verify again",
}
"""Every check and what its finding means."""


@dataclass
class Finding:
    """One thing that does not hold.

    Attributes:
        check: a key of `CHECKS`.
        table: where.
        subject: a model, run, column or nothing: what the examples have in common.
        count: how often.
        examples: the first few: image_id, run_key, file or numbers; never an address of an object.
    """

    check: str
    table: str
    subject: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """One line for a person."""
        where = f"{self.table}, {self.subject}" if self.subject else self.table
        return f"{where}: {CHECKS[self.check]} ({self.count}, for example {', '.join(self.examples)})"


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what does not hold."""

    rows: dict[str, int]
    files: dict[str, int]
    runs: int
    findings: list[Finding]


class _Findings:
    """Findings of one check, table and subject, counted; memory stays small however many there are."""

    def __init__(self) -> None:
        self.all: dict[tuple[str, str, str], Finding] = {}

    def add(self, check: str, table: str, subject: str, examples: Any, count: int | None = None) -> None:
        examples = list(examples)
        if not examples:
            return
        found = self.all.setdefault((check, table, subject), Finding(check, table, subject))
        found.count += len(examples) if count is None else count
        found.examples += [str(item) for item in examples[: _EXAMPLES - len(found.examples)]]


@dataclass
class _Model:
    """What was seen of one model: for each row its image and, as a number, its run."""

    ids: list[NDArray[np.int64]] = field(default_factory=list)
    runs: list[NDArray[np.int32]] = field(default_factory=list)
    sums_held: int = 0
    sums_broken: int = 0
    broken_examples: list[int] = field(default_factory=list)


class _Rows:
    """Rows seen so far, as numbers: 12 bytes a row."""

    def __init__(self) -> None:
        self.models: dict[str, _Model] = defaultdict(_Model)
        self.run_numbers: dict[str, int] = {}
        self.counts: dict[str, dict[tuple[str, str], int]] = {"predictions": {}, "failures": {}}

    def add(self, table: str, batch: pa.RecordBatch) -> None:
        keys = pa.table({name: batch[name] for name in _KEYS}).group_by(["model_id", "run_key"])
        for row in keys.aggregate([("image_id", "list")]).to_pylist() if batch.num_rows else ():
            model, run = str(row["model_id"]), str(row["run_key"])
            ids = np.array([value for value in row["image_id_list"] if value is not None], np.int64)
            number = self.run_numbers.setdefault(run, len(self.run_numbers))
            self.models[model].ids.append(ids)
            self.models[model].runs.append(np.full(len(ids), number, np.int32))
            counts = self.counts[table]
            counts[model, run] = counts.get((model, run), 0) + len(row["image_id_list"])


def verify(output: str, run_key: str | None = None) -> Verification:
    """Check the tables of an output against everything that the run protocol promises.

    `runs` is read first: a run that is published meanwhile can show as `unpublished_run` only, and a
    second verification decides. Memory is 12 bytes a row and a batch. Whether a model is single-label
    is told from its rows (in most, the probabilities sum to 1).

    Args:
        run_key: look at the values of this run's rows alone, and report what concerns it; all files
            are still looked for and all keys read.

    Raises:
        UsageError: there are no tables, or `runs` does not hold this run.
        MedVisionError: the store refused.
    """
    runs = tables.read(output, "runs")
    published = runs.to_pylist() if runs is not None else []
    if run_key is not None and run_key not in {row["run_key"] for row in published}:
        raise UsageError(f"Expected a published run, but `runs` of {output} does not hold {run_key}.")
    findings, rows = _Findings(), _Rows()
    row_counts, file_counts = {}, {}
    for name in ("runs", "metrics", "failures", "predictions"):
        counted = _verify_table(output, name, run_key, rows, findings)
        if counted is not None:
            row_counts[name], file_counts[name] = counted
    if not row_counts:
        raise UsageError(f"Expected tables below {storage.join(output, 'tables')}, but there are none.")
    keys = [(row["model_id"], row["run_key"]) for row in published]
    erased = {name: tables.erased_rows(output, name, keys) for name in rows.counts}
    _verify_runs(published, rows, erased, run_key, findings)
    _verify_models(rows, {row["run_key"] for row in published}, run_key, findings)
    chosen = published if run_key is None else [row for row in published if row["run_key"] == run_key]
    return Verification(row_counts, file_counts, len(chosen), list(findings.all.values()))


def _verify_table(
    output: str, name: str, run_key: str | None, rows: _Rows, findings: _Findings
) -> tuple[int, int] | None:
    table = open_table(output, name)
    if table is None:
        return None
    _verify_schema(name, pa.schema(table.schema()), findings)
    stated = {unquote(item["path"]): item for item in pa.table(table.get_add_actions(flatten=True)).to_pylist()}
    place = tables.address(output, name)
    there = _verify_files(place, name, stated, findings)
    total = 0
    for path in there:
        read = 0
        try:
            for batch in _scan(place, path, stated[path], run_key):
                read += batch.num_rows
                _verify_batch(name, batch, run_key, rows, findings)
        except (pa.ArrowInvalid, OSError):
            findings.add("unreadable_file", name, "", [path])
            continue
        if stated[path]["num_records"] not in (None, read):
            findings.add("row_count", name, "", [f"{path}: {stated[path]['num_records']} stated, {read} read"])
        total += read
    return total, len(stated)


def _scan(place: str, path: str, stated: dict[str, Any], run_key: str | None) -> Iterator[pa.RecordBatch]:
    """Batches of one file: all columns, or the keys alone where none of its rows is of the run.

    `ParquetFile` keeps one batch in memory; a dataset's scanner would keep a whole row group, here the file.
    """
    filesystem, root = storage.filesystem(place)
    with pq.ParquetFile(filesystem.open_input_file(f"{root}/{path}"), buffer_size=_BUFFER_BYTES) as file:
        held = set(file.schema_arrow.names)
        columns = None
        if run_key is not None and "run_key" in held:
            keys = file.iter_batches(_BATCH_ROWS, columns=["run_key"], use_threads=False)
            if not any(run_key in batch["run_key"].to_pylist() for batch in keys):
                columns = [name for name in _KEYS if name in held]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            yield _as_in_table(batch, stated)


def _as_in_table(batch: pa.RecordBatch, stated: dict[str, Any]) -> pa.RecordBatch:
    """Text as `string` (a merge writes views, with which Arrow cannot compare), and the partition's value, which is in the log."""
    columns = {
        name: column.cast(pa.string()) if column.type == pa.string_view() else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    if "partition.model_id" in stated:
        columns["model_id"] = pa.array([stated["partition.model_id"]] * batch.num_rows, pa.string())
    return pa.RecordBatch.from_pydict(columns)


def _verify_files(place: str, name: str, stated: dict[str, Any], findings: _Findings) -> list[str]:
    """Paths below the table that are there with the size that the log states."""
    filesystem, root = storage.filesystem(place)
    there = []
    for path, info in zip(stated, filesystem.get_file_info([f"{root}/{path}" for path in stated]), strict=True):
        if info.type == pafs.FileType.NotFound:
            findings.add("missing_file", name, "", [path])
        elif info.size != stated[path]["size_bytes"]:
            findings.add("file_size", name, "", [f"{path}: {stated[path]['size_bytes']} stated, {info.size} there"])
        else:
            there.append(path)
    return there


def _verify_schema(name: str, schema: pa.Schema, findings: _Findings) -> None:
    for expected in tables.known_schema(name):
        place = schema.get_field_index(expected.name)
        if place < 0 and expected.name not in tables.LATER.get(name, ()):
            findings.add("missing_column", name, "", [expected.name])
        elif place >= 0 and not same_type(schema.field(place).type, expected.type):
            examples = [f"{expected.name}: {schema.field(place).type} instead of {expected.type}"]
            findings.add("column_type", name, "", examples)
    for column in schema if name == "predictions" else ():
        if column.name.startswith(tables.PROBABILITY_PREFIXES) and column.type != pa.float32():
            findings.add("column_type", name, "", [f"{column.name}: {column.type} instead of float"])


def _verify_batch(name: str, batch: pa.RecordBatch, run_key: str | None, rows: _Rows, findings: _Findings) -> None:
    if name not in rows.counts or not set(_KEYS) <= set(batch.schema.names):
        return
    rows.add(name, batch)
    if run_key is not None:  # without masks and frames: after a deletion they are views, which Arrow cannot filter
        flat = [field.name for field in batch.schema if field.name in _NEVER_NULL or pa.types.is_floating(field.type)]
        batch = batch.select(flat).filter(pc.equal(batch["run_key"], run_key))
    if not set(_NEVER_NULL) <= set(batch.schema.names) or batch.num_rows == 0:
        return  # the keys alone; a column that the table lacks is a finding already
    ids = batch["image_id"].to_pylist()
    for column in _NEVER_NULL:
        if batch[column].null_count:
            empty = batch[column].is_null().to_pylist()
            findings.add("null_value", name, column, [i for i, null in zip(ids, empty, strict=True) if null])
    named = batch.select(["image_id", "uri", "etag"]).filter(
        pc.and_(pc.and_(batch["image_id"].is_valid(), batch["uri"].is_valid()), batch["etag"].is_valid())
    )
    wrong = image_ids(named["uri"], named["etag"]) != named["image_id"].to_numpy()
    findings.add("image_id", name, "", named["image_id"].to_numpy()[wrong].tolist())
    if name == "predictions":
        _verify_probabilities(batch, rows, findings)


def _verify_probabilities(batch: pa.RecordBatch, rows: _Rows, findings: _Findings) -> None:
    """Ranges; and per model, in how many rows the probabilities of its classes sum to 1."""
    ids = np.array(batch["image_id"].fill_null(-1))
    for column in batch.schema.names:
        if column.startswith(tables.PROBABILITY_PREFIXES):
            one = batch[column].to_numpy(zero_copy_only=False).astype(np.float64)
            outside = batch[column].is_valid().to_numpy(zero_copy_only=False) & ~((one >= 0) & (one <= 1))  # NaN too
            findings.add("probability_range", "predictions", column, ids[outside].tolist())
    columns = [column for column in batch.schema.names if column.startswith("p_")]
    if not columns:
        return
    values = np.stack([batch[column].to_numpy(zero_copy_only=False).astype(np.float64) for column in columns], axis=1)
    null = np.stack([batch[column].is_null().to_numpy(zero_copy_only=False) for column in columns], axis=1)
    models = np.array(batch["model_id"].to_pylist())
    for model in set(models.tolist()):
        mine = models == model
        used = ~null[mine].all(axis=0)
        whole = used.any() & ~null[mine][:, used].any(axis=1)
        held = np.abs(np.where(null, 0, values)[mine].sum(axis=1) - 1) <= _SUM_TOLERANCE
        seen = rows.models[str(model)]
        seen.sums_held += int((whole & held).sum())
        seen.sums_broken += int((whole & ~held).sum())
        seen.broken_examples += ids[mine][whole & ~held].tolist()[: _EXAMPLES - len(seen.broken_examples)]


def _with_erased(counts: Mapping[_Key, int], erased: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: counts.get(key, 0) + erased.get(key, 0) for key in {*counts, *erased}}


def _verify_runs(
    published: list[dict[str, Any]],
    rows: _Rows,
    erased: Mapping[str, Mapping[_Key, int]],
    only: str | None,
    findings: _Findings,
) -> None:
    """Counts of each published run against its rows, and of each model's failures against its runs.

    Args:
        erased: by table, rows that patients' erasure took (tables/erasure.py).
    """
    scored, failed = (_with_erased(rows.counts[name], erased[name]) for name in ("predictions", "failures"))
    expected: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    for run in published:
        key, model = run["run_key"], run["model_id"]
        if key in seen:
            findings.add("run_listed", "runs", "", [key])
            continue
        seen.add(key)
        expected[model] += (run["failed"] or 0) - (run["retried"] or 0)
        if only not in (None, key):
            continue
        found = scored.get((model, key), 0)
        if found != run["scored"]:
            findings.add("scored_count", "predictions", key, [f"{run['scored']} in runs, {found} rows"])
        found = failed.get((model, key), 0)
        if found > (run["failed"] or 0):
            findings.add("failed_count", "failures", key, [f"{run['failed']} in runs, {found} rows"])
        parts = [run[name] or 0 for name in ("already_done", "scored", "failed", "not_scored")]
        if run["job"] == "score" and run["listed"] != sum(parts):
            findings.add("listed_count", "runs", key, [f"{run['listed']} listed, {sum(parts)} accounted for"])
    for model, count in expected.items() if only is None else ():
        found = sum(number for (of, key), number in failed.items() if of == model and key in seen)
        if found != count:
            findings.add("model_failures", "failures", model, [f"{count} by its runs, {found} rows"])


def _verify_models(rows: _Rows, published: set[str], only: str | None, findings: _Findings) -> None:
    for table, counts in rows.counts.items():
        for (_, key), count in counts.items():
            if key not in published and only is None:
                findings.add("unpublished_run", table, key, [f"{count} rows"], count)
    known = np.array([key in published for key in rows.run_numbers], bool)
    wanted = rows.run_numbers.get(only, -1) if only is not None else None
    for model, seen in rows.models.items():
        if seen.sums_held >= seen.sums_broken:
            findings.add("probability_sum", "predictions", model, seen.broken_examples, seen.sums_broken)
        if not seen.ids:
            continue
        ids, runs = np.concatenate(seen.ids), np.concatenate(seen.runs)
        ids, runs = ids[known[runs]], runs[known[runs]]  # a retry in publication stands in both tables for a moment
        distinct, index, times = np.unique(ids, return_inverse=True, return_counts=True)
        concerned = np.ones(len(distinct), bool)
        if wanted is not None:
            concerned[:] = False
            concerned[index[runs == wanted]] = True
        twice = distinct[concerned & (times > 1)]
        findings.add("duplicate_row", "predictions and failures", model, twice.tolist())
