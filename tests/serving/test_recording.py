"""Answers kept as rows: the batch job's rows, once each, whatever the store does, and tables that verify."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from medvision_ray import tables
from medvision_ray.archive.inventory import committed_ids, image_id
from medvision_ray.bundle import Bundle
from medvision_ray.config import DecodeConfig, PrivacyConfig
from medvision_ray.config.serving import RecordConfig, ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import MedVisionError, UsageError
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.scoring.objects import Effort, Failure, ObjectReader
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving import online_runs, recording, worklist
from medvision_ray.serving.answers import Answer
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.local import LocalEngine
from medvision_ray.serving.metrics import ServingMetrics
from medvision_ray.serving.problems import RequestError
from medvision_ray.serving.recording import Recorder
from medvision_ray.serving.serve import serving
from medvision_ray.serving.source_object import NotOpenableError, read_source
from medvision_ray.verification import verify

OF_THE_RUN = {"run_key", "run_date", "model_id", "scored_at"}


def settings(bundle: Bundle, output: str, seconds: float = 3600, **more: Any) -> ServeJob:
    record = RecordConfig(output=output, every_seconds=seconds, **more)
    scale = ScaleConfig(decoders=1)
    return ServeJob(bundles=(bundle.uri,), scale=scale, record=record, privacy=PrivacyConfig(demo_key=True))


def rows_of(output: str, name: str) -> list[dict[str, Any]]:
    found = tables.read(output, name)
    return [] if found is None else found.to_pylist()


@pytest.fixture(scope="module")
def contents(phantom: PhantomArchive) -> list[bytes]:
    """Three objects that can be scored, one that cannot, and the first again."""
    files = [path.read_bytes() for path in sorted(Path(phantom.night_1).rglob("*.dcm"))]
    whole = [data for data in files if len(data) > 9999][:3]
    return [*whole, whole[0][:3000], whole[0]]


@pytest.fixture(scope="module")
def batch_rows(bundle: Bundle, contents: list[bytes]) -> list[dict[str, Any]]:
    """Working rows of the contents, in order, as a scoring actor makes them; entries are those of requests 0, 1, ..."""
    torch.set_num_threads(1)
    maker = RowMaker(bundle, Predictor(bundle, batch_frames=1), 1, True)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, load_pseudonymiser(PrivacyConfig(demo_key=True)))
    outcomes = []
    for number, data in enumerate(contents):
        entry, effort = online_runs.entry_of(f"{number:032x}", data), Effort(bytes_read=len(data))
        try:
            outcomes.append(Outcome(entry, reader.prepare(data, effort), effort, 1))
        except DecodeError as error:
            outcomes.append(Outcome(entry, Failure.of(error), effort, 1))
    return maker.rows(outcomes)


@pytest.fixture(scope="module")
def kept(
    bundle: Bundle, contents: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Answer | DecodeError], bytes]:
    """Tables that an engine kept its answers in, what it answered, and its metrics."""
    output = str(tmp_path_factory.mktemp("kept"))
    job, metrics = settings(bundle, output), ServingMetrics()
    engine = LocalEngine(job, recorder=Recorder(job, metrics))
    engine.start()
    found: list[Answer | DecodeError] = []
    for number, data in enumerate(contents):
        try:
            found.append(asyncio.run(engine.predict(data, PredictOptions(f"{number:032x}"))))
        except DecodeError as error:  # noqa: PERF203
            found.append(error)
    engine.close()
    return output, found, metrics.text()


def test_rows_are_those_of_the_batch_job_and_the_tables_verify(
    bundle: Bundle, contents: list[bytes], batch_rows: list[dict[str, Any]], kept: Any
) -> None:
    output, answers, metrics = kept
    rows = {row["uri"]: row for row in rows_of(output, "predictions")}
    assert len(rows) == 4
    schema = tables.predictions_schema(bundle.classes)
    for data, expected in zip(contents, batch_rows, strict=True):
        if expected["status"] == "failed":
            continue
        row, wanted = rows[expected["uri"]], pa.Table.from_pylist([expected], schema=schema).to_pylist()[0]
        columns = set(schema.names) - OF_THE_RUN
        assert {name: row[name] for name in columns} == {name: wanted[name] for name in columns}
        assert row["patient_key"]
        assert row["etag"] == hashlib.sha256(data).hexdigest()
        assert row["image_id"] == image_id(row["uri"], row["etag"])
    (failure,) = rows_of(output, "failures")
    assert isinstance(answers[3], DecodeError)
    assert (failure["error_code"], failure["stage"]) == (answers[3].code.value, answers[3].stage.value)
    assert failure["error"] == str(answers[3])
    (run,) = rows_of(output, "runs")
    assert (run["job"], run["archive"], run["listed"], run["scored"], run["failed"]) == ("serve", "api", 5, 4, 1)
    assert run["predict_seconds"] > 0
    assert run["bytes_read"] == sum(len(data) for number, data in enumerate(contents) if number != 3)
    assert verify(output).findings == []
    assert b"medvision_serve_record_rows_total 5.0" in metrics
    assert b"medvision_serve_record_waiting 0.0" in metrics


def test_what_is_sent_twice_has_two_rows_with_one_etag(kept: Any) -> None:
    rows = rows_of(kept[0], "predictions")
    assert len({row["image_id"] for row in rows}) == 4
    assert len({row["etag"] for row in rows}) == 3


def test_the_worklist_lists_online_rows_but_not_their_runs(kept: Any) -> None:
    output, answers, _ = kept
    listed = worklist.page(output, worklist.Query())
    assert listed["total"] == 4
    labels = {answer.predicted_label for answer in answers if isinstance(answer, Answer)}
    assert {row["predicted_label"] for row in listed["rows"]} == labels
    assert worklist.page(output, worklist.Query(table="failures"))["total"] == 1
    assert worklist.choices(output)["runs"] == []
    place = worklist.address(output, int(listed["rows"][0]["image_id"]))
    assert place is not None
    with pytest.raises(NotOpenableError) as caught:
        read_source(*place, 1 << 20)
    assert caught.value.code == "not_in_archive"


@pytest.mark.parametrize("masks", [True, False])
def test_masks_can_be_left_out(bundle: Bundle, batch_rows: list[dict[str, Any]], tmp_path: Path, masks: bool) -> None:
    recorder = Recorder(settings(bundle, str(tmp_path), masks=masks), ServingMetrics())
    recorder.start()
    for row in batch_rows:
        recorder.add(bundle, row)
    assert recorder.close(20) == 0
    found = rows_of(str(tmp_path), "predictions")
    assert any(row["mask"] for row in found) == masks
    assert all(row["mask_fraction"] is not None for row in found)


def test_a_night_and_online_rows_stand_side_by_side(
    bundle: Bundle, batch_rows: list[dict[str, Any]], store: str
) -> None:
    """The batch job's next run looks up what is committed by image_id: online rows hide no object of the archive."""
    night = [{**row, "uri": f"archive/{number}.dcm", "etag": "1"} for number, row in enumerate(batch_rows)]
    night = [{**row, "image_id": image_id(row["uri"], row["etag"])} for row in night]
    online_runs.publish_batch(store, online_runs.new_batch(bundle.model_id, bundle.classes, night), {})
    before = committed_ids(store, bundle.model_id)
    online_runs.publish_batch(store, online_runs.new_batch(bundle.model_id, bundle.classes, batch_rows), {})
    after = committed_ids(store, bundle.model_id)
    assert set(after) - set(before) == {row["image_id"] for row in batch_rows}
    assert len(after) == 2 * len(batch_rows)
    assert verify(store).findings == []


class Refusing:
    """`publish_run` while the store is away: so often, once rows are in."""

    def __init__(self, times: int) -> None:
        self.left = times
        self._real = online_runs.publish_run

    def __call__(self, *details: Any) -> None:
        if self.left:
            self.left -= 1
            raise MedVisionError("the store refused s3://bucket/NAME^PATIENT")
        self._real(*details)


def test_a_commit_that_fails_half_way_is_finished_as_the_same_run(
    bundle: Bundle, batch_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    store_away = Refusing(2)
    monkeypatch.setattr(online_runs, "publish_run", store_away)
    metrics = ServingMetrics()
    recorder = Recorder(settings(bundle, str(tmp_path)), metrics)
    recorder.start()
    for row in batch_rows:
        recorder.add(bundle, row)
    assert recorder.close(20) == 0
    assert store_away.left == 0
    assert len(rows_of(str(tmp_path), "predictions")) == 4
    assert len(rows_of(str(tmp_path), "runs")) == 1
    assert verify(str(tmp_path)).findings == []
    assert b"medvision_serve_record_errors_total 2.0" in metrics.text()
    assert "refused" in caplog.text
    assert "NAME" not in caplog.text


def test_rows_of_a_process_that_was_killed_get_their_run_later(
    bundle: Bundle, batch_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, now = str(tmp_path), datetime.now(timezone.utc)
    killed = online_runs.new_batch(bundle.model_id, bundle.classes, batch_rows)
    with monkeypatch.context() as patch:
        patch.setattr(online_runs, "publish_run", Refusing(1))
        with pytest.raises(MedVisionError):
            online_runs.publish_batch(output, killed, {})
    assert {finding.check for finding in verify(output).findings} == {"unpublished_run"}
    assert online_runs.settle(output, {}, now) == 0
    assert online_runs.settle(output, {}, now + timedelta(hours=1)) == 1
    assert verify(output).findings == []
    assert online_runs.settle(output, {}, now + timedelta(hours=1)) == 0


def test_nothing_is_answered_that_cannot_be_kept(
    bundle: Bundle, batch_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = settings(bundle, str(tmp_path), max_waiting_rows=2)
    recorder = Recorder(job, ServingMetrics())
    engine = LocalEngine(job, recorder=recorder)
    recorder.start()
    for row in batch_rows[:2]:
        recorder.check_room()
        recorder.add(bundle, row)
    with pytest.raises(RequestError) as caught:
        asyncio.run(engine.predict(b"anything", PredictOptions("0" * 32)))
    assert (caught.value.status, caught.value.code) == (503, "record_full")
    engine.close()
    recorder.check_room()
    assert len(rows_of(str(tmp_path), "predictions")) == 2


def test_rows_are_written_while_requests_go_on_at_most_so_often(
    bundle: Bundle, batch_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    recorder = Recorder(settings(bundle, str(tmp_path), seconds=1.0), ServingMetrics())
    recorder.start()
    times = []
    for number, row in enumerate(batch_rows[:3]):
        recorder.add(bundle, row)
        until(lambda: len(rows_of(str(tmp_path), "runs")) > number)  # noqa: B023 - called at once
        times.append(time.monotonic())
    assert times[2] - times[0] > 1.5
    assert recorder.close(5) == 0
    assert len(rows_of(str(tmp_path), "predictions")) == 3


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_store_that_stays_away_ends_with_the_count_of_what_is_lost(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise MedVisionError("away")

    monkeypatch.setattr(recording, "publish_batch", away)
    recorder = Recorder(settings(bundle, str(tmp_path)), ServingMetrics())
    recorder.start()
    recorder.add(bundle, {"status": "failed"})
    assert recorder.close(0.5) == 1
    until(lambda: not recorder._thread.is_alive())


def test_a_server_that_keeps_rows_needs_the_key(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDVISION_PSEUDONYM_KEY", raising=False)
    job = ServeJob(bundles=(bundle.uri,), record=RecordConfig(output=str(tmp_path)))
    with pytest.raises(UsageError, match="pseudonym key"), serving(job):
        pass
