"""The scoring worker: one row an object, whatever the object is; suspects are prepared apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from medvision_ray import storage
from medvision_ray.archive.inventory import image_ids, list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.config import ArchiveConfig, DecodeConfig, PreprocessConfig, PrivacyConfig, ScoringConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import CredentialsError, StorageError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.attempts import forgive_attempts, unfinished_blocks
from medvision_ray.scoring.isolated import IsolatedReader
from medvision_ray.scoring.objects import Effort, ObjectReader
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.rows import EFFORT_FIELDS, working_schema
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.worker import ScoringWorker

KEY = Pseudonymiser(b"k" * 32)


def _settings(bundle: Bundle, folder: Path, **scoring: object) -> WorkerSettings:
    config = ScoringConfig.model_validate({"precision": "float32", **scoring})
    return WorkerSettings(bundle.uri, str(folder), config, DecodeConfig(), KEY)


def _block(archive: PhantomArchive) -> pa.Table:
    return list_archive(ArchiveConfig(uri=archive.night_1)).objects


def _score(settings: WorkerSettings, bundle: Bundle, block: pa.Table) -> pa.Table:
    """The rows that a worker writes for a block."""
    answer = ScoringWorker(settings)(block)
    rows = CommittedRows(settings.run_folder).dataset(working_schema(bundle.classes)).to_table()
    assert answer["rows"].to_pylist() == [rows.num_rows]
    return rows


def _comparable(rows: pa.Table) -> list[dict[str, object]]:
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("scored_at", "failed_at", "attempts", *(item.name for item in EFFORT_FIELDS))
        }
        for row in rows.to_pylist()
    ]


@pytest.fixture(scope="module")
def rows(bundle: Bundle, phantom: PhantomArchive, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("run")
    return _score(_settings(bundle, folder), bundle, _block(phantom))


def test_every_object_has_one_row_in_order(rows: pa.Table, phantom: PhantomArchive) -> None:
    assert rows["image_id"].to_pylist() == _block(phantom)["image_id"].to_pylist()


def test_broken_objects_fail_with_their_codes(rows: pa.Table, phantom: PhantomArchive) -> None:
    failed = {row["uri"].rsplit("/", 1)[-1]: row["error_code"] for row in rows.to_pylist() if row["status"] == "failed"}
    assert failed == {
        "empty.dcm": "empty_file",
        "cut-off.dcm": "truncated",
        "letter.dcm": "unsupported_format",
        "absurd-size.dcm": "bad_dimensions",
        "referral.pdf": "unsupported_format",
        "no-pixels.dcm": "no_pixels",
    }


def test_multi_frame_objects_have_nested_results(rows: pa.Table) -> None:
    volumes = [row for row in rows.to_pylist() if row["status"] == "scored" and row["frames"] > 1]
    assert volumes
    for row in volumes:
        assert [frame["frame"] for frame in row["frame_results"]] == list(range(row["frames"]))
        mean = np.mean([frame["probabilities"] for frame in row["frame_results"]], axis=0)
        assert [row["p_cavity"], row["p_consolidation"], row["p_nodule"]] == pytest.approx(mean, abs=1e-6)


def test_no_planted_identifier_is_in_any_row(rows: pa.Table, phantom: PhantomArchive) -> None:
    text = json.dumps(rows.drop_columns(["mask"]).to_pylist(), default=str)
    assert phantom.identifiers
    assert [name for name in phantom.identifiers if name in text] == []


def test_batch_size_does_not_change_rows(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    other = _score(_settings(bundle, tmp_path, batch_size=5), bundle, _block(phantom))
    for one, two in zip(_comparable(rows), _comparable(other), strict=True):
        assert one["predicted_label"] == two["predicted_label"]
        if one["status"] == "scored":
            assert one["p_nodule"] == pytest.approx(two["p_nodule"], abs=1e-5)


def test_block_that_killed_its_worker_is_prepared_apart_with_the_same_rows(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    block = _block(phantom)
    marker = tmp_path / "inflight" / f"prepare-{block['image_id'][0].as_py()}"
    storage.write_bytes(str(marker), b'{"attempts": 1}')
    again = _score(_settings(bundle, tmp_path), bundle, block)
    assert _comparable(again) == _comparable(rows)
    assert not marker.exists()


def test_block_that_kills_every_worker_is_given_up(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    block = _block(phantom).slice(0, 3)
    storage.write_bytes(str(tmp_path / "inflight" / f"prepare-{block['image_id'][0].as_py()}"), b'{"attempts": 3}')
    given_up = _score(_settings(bundle, tmp_path), bundle, block)
    assert given_up["error_code"].to_pylist() == ["worker_crash"] * 3


def test_block_of_often_killed_drivers_is_not_given_up(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    block = _block(phantom)
    marker = tmp_path / "inflight" / f"prepare-{block['image_id'][0].as_py()}"
    storage.write_bytes(str(marker), b'{"attempts": 3}')
    forgive_attempts(str(tmp_path))
    assert _comparable(_score(_settings(bundle, tmp_path), bundle, block)) == _comparable(rows)


def test_empty_block_writes_nothing(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    answer = ScoringWorker(_settings(bundle, tmp_path))(_block(phantom).slice(0, 0))
    assert answer["rows"].to_pylist() == [0]
    assert CommittedRows(str(tmp_path)).files == []


def test_block_is_unfinished_until_its_rows_are_written(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, settings = _block(phantom).slice(4, 6), _settings(bundle, tmp_path)
    worker = ScoringWorker(settings)

    def refuse(*_: object) -> None:
        raise StorageError("the store is down")

    with monkeypatch.context() as patch:
        patch.setattr("medvision_ray.scoring.worker.write_rows", refuse)
        with pytest.raises(StorageError):
            worker(block)
    assert unfinished_blocks(str(tmp_path)) == {block["image_id"][0].as_py(): 6}
    worker(block)
    assert unfinished_blocks(str(tmp_path)) == {}
    assert len(CommittedRows(str(tmp_path)).files) == 1


def _isolated(**limits: object) -> IsolatedReader:
    return IsolatedReader(ObjectReader(DecodeConfig.model_validate(limits), PreprocessConfig(size=(64, 64)), KEY))


def _good_object(phantom: PhantomArchive) -> tuple[str, str]:
    entry = next(e for e in _block(phantom).to_pylist() if e["size"] > 100_000)
    return entry["uri"], entry["etag"]


def test_isolated_object_over_its_time_is_a_timeout_and_the_next_one_works(phantom: PhantomArchive) -> None:
    reader = _isolated(max_seconds=0.0001)
    uri, etag = _good_object(phantom)
    with pytest.raises(DecodeError) as caught:
        reader.prepare(uri, etag, Effort())
    assert caught.value.code is ErrorCode.TIMEOUT
    reader.close()


def test_isolated_child_that_died_after_its_answer_costs_no_object(phantom: PhantomArchive) -> None:
    reader = _isolated()
    uri, etag = _good_object(phantom)
    assert reader.prepare(uri, etag, Effort()).pixels.shape[1:] == (1, 64, 64)
    child = reader._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert reader.prepare(uri, etag, Effort()).pixels.dtype == np.uint8
    reader.close()


def test_watchdog_ends_a_process_that_hangs(tmp_path: Path) -> None:
    code = "from medvision_ray.scoring.preparing import Watchdog\nimport time\nwith Watchdog(0.2, 1 << 30):\n    time.sleep(30)\n"

    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 1
    assert time.monotonic() - started < 25


def test_object_changed_after_listing_is_a_failure_row(bundle: Bundle, phantom: PhantomArchive, tmp_path: Path) -> None:
    image = tmp_path / "archive" / "a.dcm"
    image.parent.mkdir()
    image.write_bytes(Path(_good_object(phantom)[0]).read_bytes())
    block = list_archive(ArchiveConfig(uri=str(image.parent))).objects
    image.write_bytes(image.read_bytes() + b"\0\0")
    rows = _score(_settings(bundle, tmp_path / "run"), bundle, block).to_pylist()
    assert [(row["stage"], row["error_code"]) for row in rows] == [("read", "changed_while_reading")]


def test_refused_credentials_stop_the_worker_instead_of_failing_every_object(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ScoringWorker(_settings(bundle, tmp_path))

    def refuse(*_: object, **__: object) -> bytes:
        raise StorageError("no", code="credentials")

    monkeypatch.setattr("medvision_ray.scoring.objects.storage.read_bytes", refuse)
    with pytest.raises(CredentialsError):
        worker(_block(phantom))


@pytest.mark.parametrize("case", [(True, 2), (True, 30), (False, 2), (False, 30)])
def test_store_that_is_down_costs_no_object(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[bool, int]
) -> None:
    store_is_there, objects = case
    block = pa.concat_tables([_block(phantom)] * 2).slice(0, objects)
    worker = ScoringWorker(_settings(bundle, tmp_path))

    def fail(*_: object, **__: object) -> bytes:
        raise StorageError("no answer", transient=True)

    monkeypatch.setattr("medvision_ray.scoring.objects.storage.read_bytes", fail)
    with monkeypatch.context() as patch:
        if not store_is_there:
            patch.setattr("medvision_ray.scoring.preparing.storage.exists", fail)
        patch.setattr("medvision_ray.scoring.attempts._read", lambda _: {})
        if store_is_there:
            assert worker(block)["rows"].to_pylist() == [objects]
        else:
            with pytest.raises(StorageError, match="no answer"):
                worker(block)
    rows = CommittedRows(str(tmp_path)).dataset(working_schema(bundle.classes)).to_table() if store_is_there else None
    assert (rows is None) == (not CommittedRows(str(tmp_path)).files)
    if rows is not None:
        assert set(rows["error_code"].to_pylist()) == {"read_error"}


def test_defect_of_a_decoder_costs_its_own_object(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(data: bytes, *more: object) -> object:
        if len(data) == 0:
            raise RecursionError("DOE^JANE")
        return decode(data, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("medvision_ray.scoring.objects.decode", stumble)
    found = _score(_settings(bundle, tmp_path), bundle, _block(phantom))
    changed = [row for row in found.to_pylist() if row["error_code"] == "internal_error"]
    assert [(row["uri"].rsplit("/", 1)[-1], "DOE" in row["error"]) for row in changed] == [("empty.dcm", False)]
    assert found.num_rows == rows.num_rows


def test_watchdog_ends_a_process_that_never_lets_go_of_the_interpreter() -> None:
    code = (
        "import re\n"
        "from medvision_ray.scoring.preparing import Watchdog\n"
        "with Watchdog(0.5, 1 << 40):\n"
        "    re.match(b'(a+)+$', b'a' * 60 + b'b')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 1


def test_watchdog_ends_a_process_that_takes_too_much_memory() -> None:
    code = (
        "import time\n"
        "from medvision_ray.scoring.preparing import Watchdog\n"
        "with Watchdog(100, 64 << 20):\n"
        "    kept = bytearray(b'1') * (256 << 20)\n"
        "    time.sleep(100)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=90).returncode == 1


def test_isolation_by_process_prepares_every_object_apart_with_the_same_rows(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(bundle, tmp_path)
    apart = replace(settings, decode=DecodeConfig(isolation="process"))
    monkeypatch.setattr(ObjectReader, "prepare", lambda *_: pytest.fail("an object was decoded in the worker"))
    assert _comparable(_score(apart, bundle, _block(phantom))) == _comparable(rows)


def test_rows_have_pseudonyms_of_addresses_where_the_site_wants_them(
    rows: pa.Table, bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    names = Pseudonymiser(KEY.key, PrivacyConfig(uri="hash"))
    block = list_archive(ArchiveConfig(uri=phantom.night_1), names).objects
    assert block["uri"].equals(_block(phantom)["uri"])  # it can still be read
    found = _score(replace(_settings(bundle, tmp_path), pseudonymiser=names), bundle, block)
    assert found["uri"].to_pylist() == [names.address(uri) for uri in rows["uri"].to_pylist()]
    assert found["image_id"].to_pylist() == image_ids(found["uri"], found["etag"]).tolist()
    assert not set(found["image_id"].to_pylist()) & set(rows["image_id"].to_pylist())
