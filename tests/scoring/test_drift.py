"""A night against its model's fingerprint: real X-rays against themselves, changed ones, and images of another organ."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pytest

from medvision_ray import tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import ArchiveConfig, DecodeConfig, DriftConfig, FailureBudget, PrivacyConfig, ScoringConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.fingerprint import (
    CATEGORIES,
    NUMBERS,
    Drift,
    Fingerprint,
    reference_of_categories,
    reference_of_numbers,
)
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.learning.image_facts import FACTS, header_reader, image_facts
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.drift import SUBGROUP, compare, judge_drift, read_drift
from medvision_ray.scoring.publish import publish_rows
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.summary import RunIdentity, RunSummary, over_budget
from medvision_ray.scoring.worker import ScoringWorker

HEADER = ("manufacturer", "body_part", "view", "patient_sex", "patient_age_band", "kvp", "slice_thickness_mm")
NIGHT, DRIFT = 120, DriftConfig()
Images = list[np.ndarray]


def _identity(bundle: Bundle, name: str) -> RunIdentity:
    return RunIdentity(f"night-{name}", "score", bundle.model_id, "the archive", datetime.now(timezone.utc))


def _score(bundle: Bundle, name: str, archive: str, work: Path) -> RunIdentity:
    """A night through the real worker and the real publication, without Ray."""
    inventory, identity = list_archive(ArchiveConfig(uri=archive)), _identity(bundle, name)
    settings = WorkerSettings(
        bundle.uri,
        str(work / "runs" / name),
        ScoringConfig(precision="float32"),
        DecodeConfig(),
        Pseudonymiser(b"k" * 32),
    )
    ScoringWorker(settings)(inventory.objects)
    publish_rows(str(work), identity, bundle.classes, settings.run_folder, inventory)
    return identity


def _frame(output: Path, identity: RunIdentity) -> pd.DataFrame:
    rows = tables.read(str(output), "predictions", None, pads.field("run_key") == identity.run_key)
    assert rows is not None
    return rows.to_pandas()


def _fingerprint(frame: pd.DataFrame, names: tuple[str, ...]) -> Fingerprint:
    patients = [str(i) for i in range(len(frame))]
    found = {}
    for name in names:
        if name in CATEGORIES:
            found[name] = reference_of_categories(frame[name].tolist(), patients, "train")
        else:
            found[name] = reference_of_numbers(frame[name].tolist(), patients, "train")
    return Fingerprint({name: reference for name, reference in found.items() if reference is not None})


@pytest.fixture(scope="module")
def xrays(data_dir: Path) -> Images:
    """Chest X-rays, one a patient, spread over the training folder."""
    with (data_dir / "chest_xray/labels.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "train"]
    first = list({row["patient_id"]: row["image"] for row in rows}.values())
    chosen = np.random.default_rng(0).permutation(first)[: 3 * NIGHT]
    return [cv2.imread(str(data_dir / "chest_xray" / path), cv2.IMREAD_GRAYSCALE) for path in chosen]


@pytest.fixture(scope="module")
def trained(bundle: Bundle, xrays: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A bundle whose fingerprint is of 240 X-rays."""
    work = tmp_path_factory.mktemp("reference")
    identity = _score(bundle, "reference", _written(work / "archive", xrays[: 2 * NIGHT]), work)
    scores = tuple(tables.probability_columns(bundle.classes))
    names = ("input_mean", "input_sd", "input_p05", "input_p50", "input_p95", "height", "modality", "mask_fraction")
    return replace(bundle, fingerprint=_fingerprint(_frame(work, identity), (*names, *scores))), work


@pytest.fixture
def night(trained: tuple[Bundle, Path], tmp_path: Path) -> Callable[[Images], RunIdentity]:
    """Scores images with the bundle; its tables are in `tmp_path`."""

    def score(images: Images) -> RunIdentity:
        return _score(trained[0], "now", _written(tmp_path / "archive", images), tmp_path)

    return score


def _written(folder: Path, images: Images) -> str:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number:04d}.png"), image)
    return str(folder)


def test_other_xrays_of_the_same_hospital_are_no_shift(
    trained: tuple[Bundle, Path], night: Callable[[Images], RunIdentity], xrays: Images, tmp_path: Path
) -> None:
    identity = night(xrays[2 * NIGHT :])
    found = judge_drift(str(tmp_path), trained[0], identity, DRIFT, HEADER)
    assert found.judged
    assert found.shifted == ()
    assert {item.feature for item in found.features} == set(trained[0].fingerprint.features)  # type: ignore[union-attr]
    assert "No shift" in found.line()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda image: 255 - image, "input_p05"),
        (lambda image: np.clip(image.astype(int) + 60, 0, 255).astype(np.uint8), "input_mean"),
        (lambda image: cv2.resize(image, (300, 300)), "height"),
    ],
    ids=["inverted", "brighter", "larger"],
)
def test_changed_xrays_are_flagged_and_named(  # noqa: PLR0917
    change: Callable[[np.ndarray], np.ndarray],
    told: str,
    trained: tuple[Bundle, Path],
    night: Callable[[Images], RunIdentity],
    xrays: Images,
    tmp_path: Path,
) -> None:
    identity = night([change(image) for image in xrays[2 * NIGHT :]])
    found = judge_drift(str(tmp_path), trained[0], identity, DRIFT, HEADER)
    assert told in found.shifted
    assert "SHIFTED" in found.line()


def test_brain_mri_through_an_xray_model_is_flagged_and_written_once(
    trained: tuple[Bundle, Path], night: Callable[[Images], RunIdentity], data_dir: Path, tmp_path: Path
) -> None:
    files = sorted((data_dir / "brain_mri/images").glob("*.jpg"))[:: max(1, 1500 // NIGHT)][:NIGHT]
    identity = night([cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in files])
    config = DriftConfig(max_psi=2.0)
    found = judge_drift(str(tmp_path), trained[0], identity, config, HEADER)
    assert {"input_mean", "input_p50", "height"} <= set(found.shifted)
    assert found.over_budget
    assert judge_drift(str(tmp_path), trained[0], identity, config, HEADER) == found
    rows = tables.read(str(tmp_path), "metrics")
    assert rows is not None
    assert set(rows["subgroup"].to_pylist()) == {SUBGROUP}
    keys = list(zip(rows["metric"].to_pylist(), rows["subgroup_value"].to_pylist(), strict=True))
    assert len(keys) == len(set(keys))
    assert set(rows["metric"].to_pylist()) == {"drift_psi", "drift_ks", "drift_shifted"}
    assert read_drift(str(tmp_path), identity.run_key, config) == found


def test_few_images_and_old_bundles_are_not_judged(
    trained: tuple[Bundle, Path], night: Callable[[Images], RunIdentity], xrays: Images, bundle: Bundle, tmp_path: Path
) -> None:
    identity = night(xrays[:49])
    found = judge_drift(str(tmp_path), trained[0], identity, DRIFT, HEADER)
    assert (found.judged, found.features) == (False, ())
    assert "49 images are fewer than `drift.min_images` (50)" in found.line()
    assert "no fingerprint" in judge_drift(str(tmp_path), bundle, identity, DRIFT, HEADER).line()
    assert tables.read(str(tmp_path), "metrics") is None
    assert not read_drift(str(tmp_path), identity.run_key, DRIFT).judged


def test_fields_that_the_policy_keeps_back_are_not_taken_for_a_shift() -> None:
    frame = pd.DataFrame({"frames": [1] * 100, "patient_key": None, "manufacturer": [None] * 100})
    reference = reference_of_categories(["GE"] * 100, [str(i) for i in range(100)], "train")
    assert reference is not None
    fingerprint = Fingerprint({"manufacturer": reference})
    assert compare(fingerprint, frame, 50, ()) == []
    assert [item.shifted for item in compare(fingerprint, frame, 50, HEADER)] == [True]


def test_scores_of_volumes_are_left_out() -> None:
    frame = pd.DataFrame({"frames": [8] * 60 + [1] * 60, "patient_key": None, "p_a": [0.99] * 60 + [0.5] * 60})
    reference = reference_of_numbers([0.5] * 100, [str(i) for i in range(100)], "val")
    assert reference is not None
    found = compare(Fingerprint({"p_a": reference}), frame, 50)
    assert [(item.n_images, item.shifted) for item in found] == [(60, False)]


def test_a_psi_over_the_budget_is_a_reason_of_its_own(bundle: Bundle) -> None:
    summary = RunSummary("r", "score", bundle.model_id, "a", 9, 0, 0, 9, 0, drift=Drift(True, over_budget=True))
    assert over_budget(FailureBudget(), summary) == ("drift",)


def test_training_says_of_an_image_what_its_prediction_row_says(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    identity = _score(bundle, "facts", phantom.night_1, tmp_path)
    reader = header_reader(PrivacyConfig())
    compared = 0
    for row in _frame(tmp_path, identity).to_dict("records"):
        image = decode(Path(row["uri"]).read_bytes(), DecodeConfig(), reader)
        facts = image_facts(image, prepare(image, load_bundle(bundle.uri).preprocess))
        row.update(zip(("row_spacing_mm", "column_spacing_mm"), _pair(row["spacing_mm"]), strict=True))
        for name in (*NUMBERS, *CATEGORIES, "frames"):
            mine, other = facts[name], row[name]
            assert (mine is None and pd.isna(other)) or mine == pytest.approx(other), name
        assert set(facts) == {field.name for field in FACTS}
        compared += 1
    assert compared > 20


def _pair(spacing: object) -> tuple[object, object]:
    return (None, None) if spacing is None else (spacing[0], spacing[1])  # type: ignore[index]
