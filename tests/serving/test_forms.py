"""Answers over HTTP from a real engine: JSON, the overlay, the DICOM SEG object; refusals of real files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import cv2
import highdicom
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from pydicom.data import get_testdata_file

from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.serving.app import create_app
from medvision_ray.serving.local import LocalEngine
from medvision_ray.serving.negotiation import choose
from medvision_ray.serving.segmentation import masks_of

OFFERED = ("application/json", "image/png", "application/dicom")
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def http(bundle: Bundle) -> Iterator[TestClient]:
    settings = ServeJob(bundles=(bundle.uri,), scale=ScaleConfig(decoders=1))
    engine = LocalEngine(settings)
    engine.start()
    with TestClient(create_app(engine, settings), base_url="http://127.0.0.1") as client:
        yield client
    engine.close()


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("application/dicom", "application/dicom"),
        ("image/png;q=0.5, application/dicom;q=0.7", "application/dicom"),
        ("application/*;q=0, image/png;q=0.1", "image/png"),
        ("text/html", None),
        ("image/png;q=none", None),
    ],
)
def test_accept_chooses_the_form(accept: str, expected: str | None) -> None:
    assert choose(accept, OFFERED) == expected


def test_a_segmentation_object_lies_where_its_source_does(
    http: TestClient, phantom_series: Callable[..., list[bytes]]
) -> None:
    data = phantom_series(3)[1]
    answer = http.post("/v1/predict?mask=rle", content=data, headers=RAW).json()
    response = http.post("/v1/predict", content=data, headers={**RAW, "Accept": "application/dicom"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/dicom"
    made = highdicom.seg.segread(BytesIO(response.content))
    source = pydicom.dcmread(BytesIO(data))
    assert made.PatientID == source.PatientID
    assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
    masks = made.get_pixels_by_source_instance(source_sop_instance_uids=[source.SOPInstanceUID])
    mask = answer["mask"]
    expected = masks_of([mask["rle"]["counts"]], answer["image"]["height"], answer["image"]["width"])
    assert mask["pixels"] > 0
    assert np.array_equal(masks[..., 0].astype(bool), expected)
    volume = made.get_volume()
    assert np.allclose(volume.spacing[1:], source.PixelSpacing)
    assert made.SegmentSequence[0].SegmentAlgorithmName == answer["model_id"]


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_a_real_object_has_a_segmentation(http: TestClient, name: str) -> None:
    data = Path(str(get_testdata_file(name))).read_bytes()
    response = http.post("/v1/predict", content=data, headers={**RAW, "Accept": "application/dicom"})
    assert response.status_code == 200, response.text
    assert highdicom.seg.segread(BytesIO(response.content)).Rows == pydicom.dcmread(BytesIO(data)).Rows


def test_an_enhanced_object_s_segmentation_has_its_frames(http: TestClient, corpora_dir: Path) -> None:
    path = min((corpora_dir / "dcm_qa_enh").rglob("*.dcm"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    answer = http.post("/v1/predict?mask=rle", content=data, headers=RAW).json()
    response = http.post("/v1/predict", content=data, headers={**RAW, "Accept": "application/dicom"})
    assert response.status_code == 200, response.text
    made = highdicom.seg.segread(BytesIO(response.content))
    uid = pydicom.dcmread(BytesIO(data)).SOPInstanceUID
    frames = [frame["frame"] + 1 for frame in answer["frames"]]
    masks = made.get_pixels_by_source_frame(uid, frames, assert_missing_frames_are_empty=True)[..., 0]
    lengths = [frame["mask"]["rle"]["counts"] for frame in answer["frames"]]
    assert np.array_equal(masks.astype(bool), masks_of(lengths, answer["image"]["height"], answer["image"]["width"]))
    assert masks.any()


def test_an_overlay_is_the_picture_with_outlines(http: TestClient, phantom: PhantomArchive) -> None:
    data = next(data for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if len(data := path.read_bytes()) > 9999)
    answer = http.post("/v1/predict", content=data, headers=RAW).json()
    response = http.post("/v1/predict", content=data, headers={**RAW, "Accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    picture = cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[:2] == (answer["image"]["height"], answer["image"]["width"])
    coloured = picture.max(axis=2) != picture.min(axis=2)
    assert coloured.any() == bool(answer["mask"]["contours"])


def test_a_segmentation_of_a_png_is_refused(http: TestClient) -> None:
    png = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
    for accept in ("application/dicom", "text/html"):
        response = http.post("/v1/predict", content=png, headers={**RAW, "Accept": accept})
        assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")


def test_an_object_without_pixels_is_422_and_names_no_patient(http: TestClient, corpora_dir: Path) -> None:
    seen: dict[str, int] = {}
    for path in sorted(corpora_dir.rglob("*.dcm"))[::12]:
        if path.stat().st_size > 2 << 20:
            continue
        response = http.post("/v1/predict", content=path.read_bytes(), headers=RAW)
        assert response.status_code in (200, 400, 415, 422)
        if response.status_code != 200:
            seen[response.json()["code"]] = seen.get(response.json()["code"], 0) + 1
    assert seen
