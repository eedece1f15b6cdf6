"""What the viewer page asks for: pixels of uploads, worklist rows, images from the archive."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from filled_tables import CLASSES, MODEL, commit_run, entries, failure, prediction
from numpy.typing import NDArray

from medvision_ray.archive.series import SUFFIX, grouped
from medvision_ray.config import DecodeConfig
from medvision_ray.config.serving import ServeJob, ServingDecodeConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.demo.encode import Subject, nifti, png
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import ErrorCode
from medvision_ray.imaging.geometry import Geometry
from medvision_ray.imaging.image import Display, LookupTable, MedicalImage, Window
from medvision_ray.listing import LISTING, list_batches
from medvision_ray.privacy import HASHED
from medvision_ray.serving import worklist
from medvision_ray.serving.app import create_app
from medvision_ray.serving.pixel_format import MEDIA_TYPE, edge_letters, encode, header_of, ready_to_send

TOKEN = "a-token-of-the-tests-0123456789"
SESSION = "0123456789abcdef" * 2
OCTETS = {"Content-Type": "application/octet-stream"}


def client(output: str | None = None, token: str | None = None, **more: Any) -> TestClient:
    app = create_app(FakeEngine(), ServeJob(bundles=("somewhere",), worklist=output, **more), token)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def unpack(content: bytes) -> tuple[dict[str, Any], NDArray[Any]]:
    """What the page makes of an answer: header and frames."""
    size = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + size])
    assert (4 + size) % 8 == 0
    colour = header["type"] == "rgb8"
    values = np.frombuffer(content, np.uint8 if colour else np.dtype(header["type"]).newbyteorder("<"), offset=4 + size)
    shape = (header["count"], header["height"], header["width"], *((3,) if colour else ()))
    return header, values.reshape(shape)


def problem(response: Any, status: int, code: str) -> str:
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["detail"])


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, phantom: PhantomArchive) -> tuple[str, list[dict[str, Any]]]:
    """Two nights over phantom objects: 6 predictions and 2 failures in the newer one, the rest in the older."""
    output = str(tmp_path_factory.mktemp("tables"))
    files = sorted(Path(phantom.night_1).rglob("chest.dcm"))
    broken = [Path(phantom.night_1) / "incoming" / name for name in ("cut-off.dcm", "empty.dcm")]
    scored, failed = entries(files), entries(broken)
    newer = [prediction(entry, CLASSES[i % 3], 0.5 + i / 20) for i, entry in enumerate(scored[:6])]
    newer[0]["modality"] = "MR"
    commit_run(
        output, "score-2", newer, [failure(failed[0], ErrorCode.TRUNCATED), failure(failed[1], ErrorCode.EMPTY_FILE)]
    )
    older = [prediction(entry, "cavity", 0.99) for entry in scored[6:]]
    commit_run(output, "score-1", older, [], days_ago=40)
    return output, [*newer, *older]


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("chest_ct_dicom/**/*.dcm", ("dicom", "CT", "HU")),
        ("chest_xray/**/*.jp*g", ("jpeg", "OT", "")),
        ("brain_mri/**/*.png", ("png", "OT", "")),
    ],
)
def test_pixels_are_the_stored_values_that_scoring_decodes(data_dir: Path, pattern: str, kind: tuple[str, ...]) -> None:
    data = next(iter(sorted(data_dir.glob(pattern)))).read_bytes()
    image = decode(data, DecodeConfig())
    response = client().post("/v1/pixels", content=data, headers=OCTETS)
    assert response.status_code == 200
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["cache-control"] == "no-store"
    header, values = unpack(response.content)
    assert (header["format"], header["modality"], header["unit"]) == kind
    np.testing.assert_array_equal(values, image.pixels)
    assert header["spacing_mm"] == (list(image.spacing_mm) if image.spacing_mm else None)
    assert (header["displays"][0]["slope"], header["displays"][0]["intercept"]) == (
        image.display.slope,
        image.display.intercept,
    )


def test_frames_come_in_parts_that_make_the_whole() -> None:
    image = MedicalImage(np.arange(5 * 4 * 6, dtype=np.int16).reshape(5, 4, 6))
    header = header_of(image)
    parts = [unpack(encode(image, header, first, 2 * 4 * 6 * 2)) for first in (0, 2, 4)]
    assert [(part["first"], part["count"], part["frames"]) for part, _ in parts] == [(0, 2, 5), (2, 2, 5), (4, 1, 5)]
    np.testing.assert_array_equal(np.concatenate([values for _, values in parts]), image.pixels)
    assert unpack(encode(image, header, 3, 1))[0]["count"] == 1  # a frame over the budget comes alone


def test_further_frames_are_asked_for_by_number() -> None:
    data = nifti(Subject("A^B", "1", "2", 1, seed=0), np.random.default_rng(0).random((3, 32, 32), np.float32))
    http = client()
    whole, values = unpack(http.post("/v1/pixels", content=data, headers=OCTETS).content)
    later, rest = unpack(http.post("/v1/pixels?first=2", content=data, headers=OCTETS).content)
    assert (whole["count"], later["first"], later["count"]) == (3, 2, 1)
    np.testing.assert_array_equal(rest[0], values[2])
    problem(http.post("/v1/pixels?first=3", content=data, headers=OCTETS), 422, "unsupported_shape")


@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        (np.array([-5, 5], np.int8), "int16"),
        (np.array([0, 65535], np.int32), "uint16"),
        (np.array([-32768, 32767], np.int64), "int16"),
        (np.array([-1, 65535], np.int32), "float32"),
        (np.array([0.5, 1.5], np.float64), "float32"),
        (np.array([0, 65535], ">u2"), "uint16"),
    ],
)
def test_every_pixel_type_is_sent_as_one_that_a_browser_has(stored: NDArray[Any], sent: str) -> None:
    image = ready_to_send(MedicalImage(stored.reshape(1, 1, 2)))
    header, values = unpack(encode(image, header_of(image), 0, 1 << 20))
    assert header["type"] == sent
    np.testing.assert_array_equal(values.ravel(), stored)


def test_a_modality_lut_is_applied_and_a_voi_lut_is_sent() -> None:
    modality_lut = LookupTable(first=0, values=np.array([10, 20, 30], np.uint16), bits=8)
    voi_lut = LookupTable(first=10, values=np.array([0, 255], np.uint16), bits=8)
    display = Display(modality_lut=modality_lut, voi_lut=voi_lut, slope=7)
    image = ready_to_send(MedicalImage(np.array([[[0, 1, 2]]], np.uint8), display=display))
    header, values = unpack(encode(image, header_of(image), 0, 1 << 20))
    assert values.ravel().tolist() == [10, 20, 30]
    shown = header["displays"][0]
    assert (shown["slope"], shown["lut"], shown["window"]["center"]) == (1.0, 0, 10.5)
    assert np.frombuffer(base64.b64decode(header["luts"][0]["values"]), "<u2").tolist() == [0, 255]


def test_frames_with_windows_of_their_own_keep_them() -> None:
    displays = tuple(Display(window=Window(center, 10.0)) for center in (1.0, 2.0))
    header = header_of(MedicalImage(np.zeros((2, 2, 2), np.int16), display=displays[0], frame_display=displays))
    assert [item["window"]["center"] for item in header["displays"]] == [1.0, 2.0]


def test_numbers_that_json_has_not_do_not_leave() -> None:
    display = Display(padding=(float("nan"), float("inf")))
    pixels = np.array([[[np.finfo(np.float32).min, np.finfo(np.float32).max, np.nan]]], np.float32)
    image = MedicalImage(pixels, display=display)
    header, _ = unpack(encode(image, header_of(image), 0, 1 << 20))
    assert header["displays"][0]["padding"] is None


@pytest.mark.parametrize(
    ("across", "down", "letters"),
    [
        ((1, 0, 0), (0, 1, 0), ("R", "L", "A", "P")),  # axial
        ((0, 1, 0), (0, 0, -1), ("A", "P", "H", "F")),  # sagittal
        ((0.8, 0.6, 0), (0, 0, -1), ("RA", "LP", "H", "F")),  # turned by 37 degrees
    ],
)
def test_edges_name_the_patients_sides(across: Any, down: Any, letters: tuple[str, ...]) -> None:
    edges = edge_letters(Geometry((0.0, 0.0, 0.0), across, down, (1.0, 1.0)))
    assert (edges["left"], edges["right"], edges["top"], edges["bottom"]) == letters


def test_slices_of_a_series_find_one_another_within_a_session(phantom_series: Callable[..., list[bytes]]) -> None:
    http = client()

    def stack(data: bytes, session: str) -> Any:
        answer = http.post(f"/v1/pixels?session={session}", content=data, headers=OCTETS)
        return unpack(answer.content)[0]["stack"]

    one, two = (stack(data, SESSION) for data in phantom_series(2))
    other = stack(phantom_series(1, series=1)[0], SESSION)
    assert one["name"] == two["name"] != other["name"]
    assert two["position_mm"] - one["position_mm"] == pytest.approx(2.5)
    assert stack(phantom_series(1)[0], "f" * 32)["name"] != one["name"]
    assert stack(phantom_series(1)[0], "") is None


def test_no_identifier_is_in_an_answer(phantom: PhantomArchive) -> None:
    http = client()
    for path in sorted(Path(phantom.night_1).glob("case-000/*")):
        content = http.post(f"/v1/pixels?session={SESSION}", content=path.read_bytes(), headers=OCTETS).content
        header = content[: 4 + int.from_bytes(content[:4], "little")].decode("latin-1")
        assert not [word for word in phantom.identifiers if word in header]


def test_what_cannot_be_decoded_is_refused_with_its_code(phantom: PhantomArchive) -> None:
    http, incoming = client(), Path(phantom.night_1) / "incoming"
    cut = http.post("/v1/pixels", content=(incoming / "cut-off.dcm").read_bytes(), headers=OCTETS)
    assert "ends before its pixels" in problem(cut, 422, "truncated")
    pdf = http.post("/v1/pixels", content=(incoming / "referral.pdf").read_bytes(), headers=OCTETS)
    problem(pdf, 415, "unsupported_format")
    small = client(decode=ServingDecodeConfig(max_bytes=100))
    problem(small.post("/v1/pixels", content=bytes(200), headers=OCTETS), 413, "too_large")
    problem(http.post("/v1/pixels?session=x", content=b"1", headers=OCTETS), 400, "bad_request")


def test_everything_but_the_page_wants_the_token(night: tuple[str, list[dict[str, Any]]]) -> None:
    http = client(night[0], TOKEN)
    image_id = night[1][0]["image_id"]
    paths = ("", "/choices", f"/{image_id}", f"/{image_id}/pixels")
    for path in paths:
        problem(http.get(f"/v1/worklist{path}"), 401, "unauthorized")
        assert http.get(f"/v1/worklist{path}", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    problem(http.post("/v1/pixels", content=png(np.zeros((8, 8), np.float32)), headers=OCTETS), 401, "unauthorized")
    assert http.get("/").status_code == 200


def test_the_page_may_load_nothing_from_elsewhere() -> None:
    http = client()
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert len(links) >= 3
    for link in links:
        part = http.get("/" + link.removeprefix("./"))
        assert part.status_code == 200
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]+\.[a-z]", part.text)
    assert "not a medical device" in page.text.lower()
    assert http.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304


def rows(http: TestClient, **query: Any) -> list[dict[str, Any]]:
    answer = http.get("/v1/worklist", params=query).json()
    assert answer["total"] >= len(answer["rows"])
    return list(answer["rows"])


def test_the_worklist_begins_with_the_last_nights(night: tuple[str, list[dict[str, Any]]]) -> None:
    http = client(night[0])
    listed = rows(http)
    assert len(listed) == 6
    assert {row["run_key"] for row in listed} == {"score-2"}
    assert {int(row["image_id"]) for row in listed} == {row["image_id"] for row in night[1][:6]}
    assert len(rows(http, nights=60)) == len(night[1]) > 6
    assert {row["run_key"] for row in rows(http, run_key="score-1")} == {"score-1"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"label": "pleural effusion"}, [5, 2]),
        ({"label": "cavity", "min_probability": 0.6}, [3]),
        ({"max_probability": 0.6}, [2, 1, 0]),
        ({"modality": "MR"}, [0]),
        ({"model_id": "another"}, []),
        ({"label": "cav.*"}, []),
        ({"order": "uncertain", "limit": 2}, [0, 1]),
        ({"order": "probability", "limit": 2, "offset": 2}, [3, 2]),
        ({"offset": 100}, []),
    ],
)
def test_filters_order_and_pages(
    night: tuple[str, list[dict[str, Any]]], query: dict[str, Any], expected: list[int]
) -> None:
    listed = rows(client(night[0]), **{"order": "probability", **query})
    assert [int(row["image_id"]) for row in listed] == [night[1][place]["image_id"] for place in expected]


def test_a_finding_among_several_is_found(tmp_path: Path, phantom: PhantomArchive) -> None:
    entry = entries([next(Path(phantom.night_1).rglob("chest.dcm"))])[0]
    row = prediction(entry, "cavity", 0.9, predicted_label="cavity|pleural effusion")
    commit_run(str(tmp_path), "score-1", [row], [])
    http = client(str(tmp_path))
    assert [len(rows(http, label=name)) for name in (*CLASSES, "effusion")] == [1, 0, 1, 0]
    assert rows(http, label="pleural effusion")[0]["probability"] == pytest.approx(0.05)


def test_failures_are_a_list_of_their_own(night: tuple[str, list[dict[str, Any]]]) -> None:
    http = client(night[0])
    assert {row["error_code"] for row in rows(http, table="failures")} == {"truncated", "empty_file"}
    (one,) = rows(http, table="failures", error_code="truncated")
    assert (one["stage"], one["attempts"]) == ("decode", 1)
    record = http.get(f"/v1/worklist/{one['image_id']}").json()
    assert (record["table"], record["error"]) == ("failures", "The object ends before its pixels do.")
    problem(http.get(f"/v1/worklist/{one['image_id']}/pixels"), 422, "truncated")


def test_choices_name_what_the_rows_have(night: tuple[str, list[dict[str, Any]]]) -> None:
    choices = client(night[0]).get("/v1/worklist/choices").json()
    assert [(run["run_key"], run["scored"], run["failed"]) for run in choices["runs"]] == [("score-2", 6, 2)]
    assert choices["labels"] == ["cavity", "consolidation", "pleural effusion"]
    assert (choices["models"], choices["modalities"]) == ([MODEL], ["CT", "MR"])
    assert choices["error_codes"] == ["empty_file", "truncated"]


def test_a_row_has_its_mask_as_contours_and_neither_address_nor_name(
    night: tuple[str, list[dict[str, Any]]], phantom: PhantomArchive
) -> None:
    stored = night[1][2]
    answer = client(night[0]).get(f"/v1/worklist/{stored['image_id']}")
    row = answer.json()
    assert row["mask"]["box"] == [10, 20, 20, 50]
    (outline,) = row["mask"]["contours"]  # along the edges of pixels
    assert sorted(outline) == [[9.5, 19.5], [9.5, 49.5], [19.5, 19.5], [19.5, 49.5]]
    assert row["image_id"] == str(stored["image_id"])
    assert [item["name"] for item in row["classes"]] == list(CLASSES)  # as predicted, not as the column
    assert stored["uri"] not in answer.text
    assert "chest.dcm" not in answer.text


def test_an_image_of_a_row_is_read_from_the_archive(night: tuple[str, list[dict[str, Any]]]) -> None:
    stored = night[1][1]
    header, values = unpack(client(night[0]).get(f"/v1/worklist/{stored['image_id']}/pixels").content)
    image = decode(Path(stored["uri"]).read_bytes(), DecodeConfig())
    np.testing.assert_array_equal(values, image.pixels)
    assert header["modality"] == "CT"


def test_a_volume_of_single_slices_is_found_again_and_read_whole(
    tmp_path: Path, phantom_series: Callable[..., list[bytes]]
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    for number, data in enumerate(phantom_series(4)):
        (folder / f"{9 - number}.dcm").write_bytes(data)
    (folder / "other.dcm").write_bytes(phantom_series(1, series=1)[0])
    listed = pa.Table.from_batches(list(list_batches(str(folder))), LISTING).sort_by("path")
    series = next(entry for entry, group in zip(*grouped(listed, 2), strict=True) if group)
    assert series[0].endswith(SUFFIX)
    entry = {"image_id": 5, "uri": series[0], "etag": series[1]}
    output = str(tmp_path / "out")
    commit_run(output, "score-1", [prediction(entry, "cavity", 0.9, frames=4)], [])
    header, values = unpack(client(output).get("/v1/worklist/5/pixels").content)
    assert (header["frames"], header["slice_spacing_mm"]) == (4, pytest.approx(2.5))
    lowest = decode(phantom_series(4)[0], DecodeConfig())
    np.testing.assert_array_equal(values[0], lowest.pixels[0])
    (folder / "9.dcm").unlink()
    problem(client(output).get("/v1/worklist/5/pixels"), 409, "series_scattered")


@pytest.mark.parametrize(
    ("uri", "etag", "status", "code"),
    [
        (HASHED + "abc", "", 409, "hashed_address"),
        ("upload:abc", "", 404, "not_found"),
        ("upload://abc", "", 409, "not_in_archive"),
        ("/nowhere/DOE^JANE.dcm", "", 404, "not_found"),
        ("here", "other", 409, "changed_while_reading"),
    ],
)
def test_an_image_that_cannot_be_had_says_why(tmp_path: Path, uri: str, etag: str, status: int, code: str) -> None:
    if uri == "here":
        (tmp_path / "here.png").write_bytes(png(np.zeros((8, 8), np.float32)))
        uri = str(tmp_path / "here.png")
    output = str(tmp_path / "out")
    commit_run(output, "score-1", [prediction({"image_id": 7, "uri": uri, "etag": etag}, "cavity", 0.9)], [])
    detail = problem(client(output).get("/v1/worklist/7/pixels"), status, code)
    assert "DOE" not in detail
    assert str(tmp_path) not in detail


def test_only_images_that_a_table_names_are_read(night: tuple[str, list[dict[str, Any]]]) -> None:
    http = client(night[0])
    for image_id in ("12345", "-1", str(1 << 64)):
        problem(http.get(f"/v1/worklist/{image_id}/pixels"), 404, "not_found")
        problem(http.get(f"/v1/worklist/{image_id}"), 404, "not_found")
    problem(http.get("/v1/worklist/%2Fetc%2Fpasswd/pixels"), 404, "not_found")
    problem(http.get("/v1/worklist/passwd/pixels"), 400, "bad_request")


def test_a_server_without_tables_says_so() -> None:
    problem(client().get("/v1/worklist"), 404, "no_tables")


def test_an_output_without_tables_is_an_empty_list(tmp_path: Path) -> None:
    http = client(str(tmp_path))
    assert http.get("/v1/worklist").json() == {"total": 0, "rows": []}
    assert http.get("/v1/worklist/choices").json()["runs"] == []


def test_a_mask_that_was_not_saved_has_no_contours(tmp_path: Path, phantom: PhantomArchive) -> None:
    entry = entries([next(Path(phantom.night_1).rglob("chest.dcm"))])[0]
    commit_run(str(tmp_path), "score-1", [prediction(entry, "cavity", 0.9, mask=None)], [])
    row = worklist.record(str(tmp_path), entry["image_id"])
    assert row is not None
    assert row["mask"]["contours"] is None


def test_default_windows_are_those_of_scoring() -> None:
    grey = MedicalImage(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), source_format="png")
    assert header_of(grey)["displays"][0]["window"]["bounds"] == [0.0, 255.0]
    hounsfield = MedicalImage(np.zeros((1, 2, 2), np.int16), modality="CT")
    assert header_of(hounsfield)["displays"][0]["window"]["center"] == 40.0
    own = replace(hounsfield, display=Display(window=Window(-600.0, 1500.0)))
    assert header_of(own)["displays"][0]["window"] == {"center": -600.0, "width": 1500.0, "function": "LINEAR"}
    flat = MedicalImage(np.full((1, 2, 2), 7, np.int16), modality="MR")
    assert header_of(flat)["displays"][0]["window"]["width"] == 0.0
