"""`medvision explain`: pictures and facts of single images."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle
from medvision_ray.cli import main
from medvision_ray.config import DecodeConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.errors import DecodeError
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.scoring.explain import to_source
from medvision_ray.scoring.predictor import Predictor


@pytest.fixture(scope="module")
def ct(phantom: PhantomArchive) -> Path:
    found = [path for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if _modality(path) == "CT"]
    return found[0]


def _modality(path: Path) -> str:
    try:
        return decode(path.read_bytes(), DecodeConfig()).modality
    except DecodeError:
        return ""


def run(capsys: pytest.CaptureFixture[str], bundle: Bundle, output: Path, *given: str) -> tuple[int, dict]:
    code = main(["explain", "--bundle", bundle.uri, "--output", str(output), "--json", *given])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_image_is_explained_on_its_own_grid(
    bundle: Bundle, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run(capsys, bundle, tmp_path, "--image", str(ct), "--class", "nodule")
    assert (code, told["failed"]) == (0, [])
    [place] = told["written"]
    facts = json.loads(Path(place).read_text())
    image = decode(ct.read_bytes(), DecodeConfig())
    ready = prepare(image, bundle.preprocess)
    expected = to_source(
        Predictor(bundle).explain(ready.pixels[:1], bundle.classes.index("nodule"))[0], ready.transform
    )
    drawn = cv2.imread(str(tmp_path / facts["map"]), cv2.IMREAD_UNCHANGED)
    assert drawn.shape == image.shape == (facts["rows"], facts["columns"])
    np.testing.assert_array_equal(drawn, np.rint(expected * 255))
    assert facts["strongest_row_column"] == list(np.unravel_index(expected.argmax(), expected.shape))
    prediction = Predictor(bundle).predict(ready.pixels)
    assert prediction.probabilities is not None
    assert list(facts["probabilities"].values()) == pytest.approx(prediction.probabilities[0].tolist())
    assert facts["image_id"] == list_uris([str(ct)]).objects["image_id"][0].as_py()
    picture = cv2.imread(str(tmp_path / facts["overlay"]))
    assert picture.shape[1] == 2 * picture.shape[0] * image.shape[1] // image.shape[0]


def test_names_of_files_and_patients_stay_out(
    bundle: Bundle, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "in" / "DOE_JANE.dcm"
    named.parent.mkdir()
    named.write_bytes(ct.read_bytes())
    _, told = run(capsys, bundle, tmp_path / "out", "--image", str(named))
    written = [path.name + path.read_bytes().decode("latin-1") for path in (tmp_path / "out").iterdir()]
    assert len(written) == 3
    assert told["written"]
    assert not [text for text in written if "DOE" in text or "PHANTOM" in text]


def test_an_image_that_cannot_be_read_is_told_and_the_others_explained(
    bundle: Bundle, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, told = run(capsys, bundle, tmp_path / "out", "--image", str(tmp_path / "bad.png"), "--image", str(ct))
    assert code == 3
    assert [failure["error_code"] for failure in told["failed"]] == ["unsupported_format"]
    assert len(told["written"]) == 1


@pytest.mark.parametrize(
    ("given", "said"), [(("--class", "fracture"), "cavity"), (("--set", "frame=9"), "`frame` below 1")]
)
def test_what_is_not_there_is_refused(
    given: tuple[str, ...], said: str, bundle: Bundle, ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run(capsys, bundle, ct.parent / "out", "--image", str(ct), *given)
    assert code == 2
    assert said in told["error"]


def test_no_image_is_refused(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(capsys, bundle, tmp_path)
    assert code == 2
    assert "images" in told["error"]
