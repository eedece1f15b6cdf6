"""The engine of a replica: answers equal the batch job's rows, crashes cost one object, models come and go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.config import DecodeConfig, ModelConfig, PreprocessConfig, PrivacyConfig
from medvision_ray.config.serving import ScaleConfig, ServeJob, ServingDecodeConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import BundleError
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.learning.model import build_model
from medvision_ray.privacy import load_pseudonymiser
from medvision_ray.scoring.masks import decode_mask
from medvision_ray.scoring.objects import Effort, ObjectReader
from medvision_ray.scoring.predicting import RowMaker
from medvision_ray.scoring.predictor import Predictor
from medvision_ray.scoring.preparing import Outcome
from medvision_ray.serving.answering import answer_of
from medvision_ray.serving.answers import Answer
from medvision_ray.serving.decoders import DecodingProcess
from medvision_ray.serving.drawing import contours, run_lengths
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.local import LocalEngine
from medvision_ray.serving.models import Models
from medvision_ray.serving.problems import RequestError
from medvision_ray.tables import probability_columns

RLE = PredictOptions("0" * 32, mask="rle")
KEY = load_pseudonymiser(PrivacyConfig(demo_key=True))


def settings(bundle: Bundle, **more: Any) -> ServeJob:
    return ServeJob(bundles=(bundle.uri,), scale=ScaleConfig(decoders=1), **more)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[LocalEngine]:
    engine = LocalEngine(settings(bundle))
    engine.start()
    yield engine
    engine.close()


def predict(engine: LocalEngine, data: bytes, options: PredictOptions = RLE) -> Answer:
    return asyncio.run(engine.predict(data, options))


@pytest.fixture(scope="module")
def batch_rows(bundle: Bundle) -> RowMaker:
    """What a scoring actor makes rows with, in batches as large as the server's: frames of one object are one pass in both."""
    torch.set_num_threads(1)
    return RowMaker(bundle, Predictor(bundle, batch_frames=16), 16, True)


def batch_row(batch_rows: RowMaker, bundle: Bundle, data: bytes) -> dict[str, Any] | DecodeError:
    effort = Effort()
    try:
        # With the limits of serving, which are tighter by default and are told with the error.
        ready = ObjectReader(ServingDecodeConfig(), bundle.preprocess, KEY).prepare(data, effort)
    except DecodeError as error:
        return error
    return batch_rows.rows([Outcome({"image_id": 1, "uri": "u", "etag": "e"}, ready, effort, 1)])[0]


def assert_equal(answer: Answer, row: dict[str, Any], bundle: Bundle) -> None:
    """Every number of an answer is the row's, bit for bit."""
    image = answer.image
    assert (image.height, image.width, image.frames) == (row["height"], row["width"], row["frames"])
    assert (image.modality, image.spacing_mm) == (row["modality"], row["spacing_mm"])
    assert image.spacing_source == row["spacing_source"]
    assert (answer.predicted_label, answer.predicted_probability) == (
        row["predicted_label"],
        row["predicted_probability"],
    )
    assert [item.probability for item in answer.classes] == [row[name] for name in probability_columns(bundle.classes)]
    assert (answer.key_frame, answer.preprocess_id) == (row["key_frame"], row["preprocess_id"])
    shape = (row["height"], row["width"])
    assert_masks_equal(answer.mask, row, shape)
    assert len(answer.frames) == len(row["frame_results"])
    for frame, item in zip(answer.frames, row["frame_results"], strict=True):
        assert frame.predicted_probability == item["predicted_probability"]
        assert [one.probability for one in frame.classes] == item["probabilities"]
        assert_masks_equal(frame.mask, item, shape)


def assert_masks_equal(mask: Any, columns: dict[str, Any], shape: tuple[int, int]) -> None:
    expected = decode_mask(columns["mask"], columns["mask_box"], shape)
    assert (mask.fraction, mask.area_mm2, mask.box) == (
        columns["mask_fraction"],
        columns["mask_area_mm2"],
        columns["mask_box"],
    )
    assert np.array_equal(from_run_lengths(mask.rle.counts, shape), expected)


def from_run_lengths(counts: list[int], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(shape, order="F")


def objects_of(phantom: PhantomArchive) -> list[bytes]:
    files = sorted(path for path in Path(phantom.night_1).rglob("*") if path.is_file())
    return [path.read_bytes() for path in files]


def compare(engine: LocalEngine, batch_rows: RowMaker, bundle: Bundle, contents: list[bytes]) -> tuple[int, int]:
    """Asserts that each object has the row's answer or the failure row's error; answers how many of either."""
    scored = failed = 0
    for data in contents:
        expected = batch_row(batch_rows, bundle, data)
        if isinstance(expected, DecodeError):
            with pytest.raises(DecodeError) as caught:
                predict(engine, data)
            assert (caught.value.code, str(caught.value)) == (expected.code, str(expected))
            failed += 1
        else:
            assert_equal(predict(engine, data), expected, bundle)
            scored += 1
    return scored, failed


def test_answers_equal_the_batch_rows_bit_for_bit(
    engine: LocalEngine, batch_rows: RowMaker, bundle: Bundle, phantom: PhantomArchive
) -> None:
    contents = [data for data in objects_of(phantom) if data]
    scored, failed = compare(engine, batch_rows, bundle, contents[::3])
    assert scored >= 10
    assert failed >= 1


@pytest.mark.slow
def test_answers_equal_the_batch_rows_over_the_real_data(
    engine: LocalEngine, batch_rows: RowMaker, bundle: Bundle, data_dir: Path, corpora_dir: Path
) -> None:
    files = [path for kind in ("brain_mri", "chest_xray", "chest_ct_dicom") for path in images(data_dir / kind, 40)]
    files += [path for path in sorted(corpora_dir.rglob("*")) if path.is_file() and path.stat().st_size < 8 << 20]
    scored, failed = compare(engine, batch_rows, bundle, [data for path in files if (data := path.read_bytes())])
    print(f"{scored} answers equal rows, {failed} errors equal failures")
    assert scored > 300


def images(folder: Path, count: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png", ".dcm"))
    return found[:: max(1, len(found) // count)]


def test_a_frame_s_company_changes_its_probabilities_by_rounding_alone(bundle: Bundle, phantom: PhantomArchive) -> None:
    """float32 kernels for other batch sizes round otherwise; so do two batch runs whose blocks differ."""
    models = Models(settings(bundle))
    served = models.find(None)
    reader = ObjectReader(DecodeConfig(), bundle.preprocess, None)
    ready = []
    for data in objects_of(phantom)[:16]:
        with contextlib.suppress(DecodeError):
            ready.append(reader.prepare(data, Effort()))
    assert len(ready) >= 10
    outcomes = [(served, Outcome({"image_id": 0, "uri": "", "etag": ""}, one, Effort(), 1)) for one in ready]
    together = models.score(outcomes)
    for item, row in zip(outcomes, together, strict=True):
        alone = models.score([item])[0]
        assert isinstance(row, dict)
        assert isinstance(alone, dict)
        for name in probability_columns(bundle.classes):
            assert row[name] == pytest.approx(alone[name], abs=2e-7)


def area(line: list[list[float]]) -> float:
    """Signed area within an outline (shoelace); positive where it turns clockwise as displayed."""
    rows, columns = np.asarray(line).T
    return float((columns * np.roll(rows, -1) - np.roll(columns, -1) * rows).sum() / 2)


@pytest.mark.parametrize("smooth", [0, 3])
def test_contours_filled_give_the_mask_back_and_its_area(smooth: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.random((30, 35))
        mask = (cv2.GaussianBlur(values, (0, 0), smooth) if smooth else values) > 0.5
        drawn = np.zeros((30 * 8, 35 * 8), np.uint8)
        lines = contours(mask)
        corners = [((np.asarray(line)[:, ::-1] + 0.5) * 8).round().astype(np.int32) for line in lines]
        cv2.fillPoly(drawn, corners, 1)
        assert np.array_equal(drawn[4::8, 4::8].astype(bool), mask)
        assert sum(map(area, lines)) == mask.sum()
        parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
        assert sum(area(line) > 0 for line in lines) == parts
    assert contours(np.zeros((3, 4), bool)) == []


def test_run_lengths_are_those_of_pycocotools() -> None:
    mask = np.array([[0, 0, 1], [1, 0, 1]], bool)
    assert run_lengths(mask) == [1, 1, 2, 2]
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


def test_a_mask_as_png_is_the_same_mask(engine: LocalEngine, phantom: PhantomArchive) -> None:
    data = next(data for data in objects_of(phantom) if data[128:132] == b"DICM")
    lengths, png = predict(engine, data).mask, predict(engine, data, PredictOptions("1", mask="png")).mask
    assert lengths is not None
    assert lengths.rle is not None
    assert png is not None
    assert png.png is not None
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(png.png), np.uint8), cv2.IMREAD_UNCHANGED)
    shape = (picture.shape[0], picture.shape[1])
    assert np.array_equal(picture > 0, from_run_lengths(lengths.rle.counts, shape))
    assert int((picture > 0).sum()) == png.pixels


def test_a_process_that_dies_costs_its_object_alone(engine: LocalEngine, phantom: PhantomArchive) -> None:
    data = next(data for data in objects_of(phantom) if data[128:132] == b"DICM")
    before = predict(engine, data)
    process = engine.decoders._all[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # it holds the object, and then dies

    async def run() -> Any:
        asyncio.get_running_loop().call_later(0.3, os.kill, process.pid, signal.SIGKILL)
        return await asyncio.gather(engine.predict(data, RLE), engine.predict(data, RLE), return_exceptions=True)

    first, second = asyncio.run(run())
    assert isinstance(first, DecodeError)
    assert first.code is ErrorCode.WORKER_CRASH
    assert isinstance(second, Answer)
    assert second.classes == before.classes


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (ServingDecodeConfig(max_seconds=0.0001), ErrorCode.TIMEOUT),
        (ServingDecodeConfig(max_memory_bytes=4 << 20), ErrorCode.OUT_OF_MEMORY),
        (ServingDecodeConfig(max_frame_pixels=1000), ErrorCode.TOO_LARGE),
    ],
)
def test_a_limit_has_the_code_of_the_failures_table(
    limits: ServingDecodeConfig, code: ErrorCode, phantom_series: Callable[..., list[bytes]]
) -> None:
    process = DecodingProcess(limits)
    with pytest.raises(DecodeError) as caught:
        process.run("prepare", phantom_series(1, size=2048)[0], {"preprocess": PreprocessConfig().model_dump_json()})
    assert caught.value.code is code
    process.close()


def other_bundle(place: Path, name: str, seed: int) -> Bundle:
    torch.manual_seed(seed)
    architecture = ModelConfig(encoder="tu-mobilenetv3_small_050", segmentation=False)
    preprocess = PreprocessConfig(size=(32, 32))
    return save_bundle(
        str(place),
        name=name,
        architecture=architecture,
        preprocess=preprocess,
        classes=("a", "b"),
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=build_model(architecture, preprocess, 2),
    )


def test_models_are_found_by_name_and_the_least_recently_used_goes(bundle: Bundle, tmp_path: Path) -> None:
    two, three = other_bundle(tmp_path / "2", "two", 2), other_bundle(tmp_path / "3", "three", 3)
    job = ServeJob(bundles=(bundle.uri, two.uri, three.uri), scale=ScaleConfig(models_in_memory=2))
    models = Models(job)
    assert models.find(None).bundle.model_id == bundle.model_id
    assert models.find("two") is models.find(two.model_id)
    with pytest.raises(RequestError, match="no model"):
        models.find("four")
    for name in (None, "two", None, "three"):
        models.load(models.find(name))
    assert [(one.name, one.loaded) for one in models.facts()] == [("random", True), ("two", False), ("three", True)]
    with pytest.raises(BundleError, match="different names"):
        Models(ServeJob(bundles=(two.uri, two.uri)))


def test_a_new_version_takes_over_and_what_is_under_way_keeps_the_old_one(tmp_path: Path, bundle: Bundle) -> None:
    other_bundle(tmp_path / "new", "m", 2)
    old = other_bundle(tmp_path / "served", "m", 1)
    job = ServeJob(bundles=(old.uri,), scale=ScaleConfig(decoders=1))
    engine = LocalEngine(job)
    engine.start()
    picture = cv2.imencode(".png", np.arange(4096, dtype=np.uint8).reshape(64, 64))[1].tobytes()
    before = predict(engine, picture)
    assert engine.models_served.refresh() == []

    (tmp_path / "served" / "bundle.yaml").unlink()  # being written
    assert engine.models_served.refresh() == []
    assert predict(engine, picture).classes == before.classes

    shutil.copytree(tmp_path / "new", tmp_path / "served", dirs_exist_ok=True)
    under_way = engine.models_served.find(None)
    new = load_bundle(old.uri)
    assert engine.models_served.refresh() == [new.model_id]
    after = predict(engine, picture)
    assert (before.model_id, after.model_id) == (old.model_id, new.model_id)
    assert before.classes != after.classes
    still = asyncio.run(engine._predict(picture, RLE, under_way, {"image_id": 0, "uri": "", "etag": ""}))
    assert (still.model_id, still.classes) == (old.model_id, before.classes)
    engine.close()


def test_an_explanation_is_a_map_of_the_likeliest_class_on_the_source_s_grid(
    engine: LocalEngine, phantom: PhantomArchive
) -> None:
    data = next(data for data in objects_of(phantom) if data[128:132] == b"DICM")
    answer = predict(engine, data, PredictOptions("1", explain="gradcam"))
    assert answer.explanation is not None
    assert answer.explanation.class_name == answer.predicted_label
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(answer.explanation.png), np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (answer.image.height, answer.image.width)
    assert answer.model_dump(by_alias=True)["explanation"]["class"] == answer.predicted_label


def test_calibrated_probabilities_and_operating_points_are_the_bundle_s(
    bundle: Bundle, phantom: PhantomArchive
) -> None:
    from medvision_ray.calibration import TemperatureScaling
    from medvision_ray.operating_points import ClassThreshold, OperatingPoint

    def threshold(value: float) -> ClassThreshold:
        return ClassThreshold(value, 0.9, 0.8, 9, 2, 1, 8, 10)

    data = next(data for data in objects_of(phantom) if data[128:132] == b"DICM")
    models = Models(settings(bundle))
    ready = ObjectReader(DecodeConfig(), bundle.preprocess, None).prepare(data, Effort())
    item = Outcome({"image_id": 0, "uri": "", "etag": ""}, ready, Effort(), 1)
    raw = models.score([(models.find(None), item)])[0]
    assert isinstance(raw, dict)
    values = [raw[name] for name in probability_columns(bundle.classes)]
    point = OperatingPoint("screening", "sensitivity 0.9", (threshold(values[0]), None, threshold(values[2] + 1e-3)))
    rich = dataclasses.replace(bundle, calibration=TemperatureScaling(2.0), operating_points=(point,))
    row = RowMaker(rich, Predictor(rich, batch_frames=1), 1, True).rows([item])[0]
    answer = answer_of(rich, row, RLE, image_format="dicom", effort=Effort(), started=0.0)
    expected = TemperatureScaling(2.0).apply(np.array([values], np.float32))[0]
    assert [one.calibrated_probability for one in answer.classes] == pytest.approx(list(expected), abs=1e-6)
    found = [[(one.name, one.positive) for one in item.operating_points] for item in answer.classes]
    assert found == [[("screening", True)], [], [("screening", False)]]
