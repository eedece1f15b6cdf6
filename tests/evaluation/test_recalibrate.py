"""The calibrate job on committed rows of ensembles and single models: what is fitted to, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scipy.special import expit, softmax

from medvision_ray import tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle, image_digest, load_bundle, save_bundle
from medvision_ray.cli import main
from medvision_ray.config import CalibrateJob, EvaluateJob, ModelConfig, PreprocessConfig, PrivacyConfig, build_job
from medvision_ray.ensemble import save_ensemble
from medvision_ray.errors import BundleError, ConfigError, LabelError, MedVisionError, UsageError
from medvision_ray.evaluation.collect import join_split
from medvision_ray.evaluation.recalibrate import recalibrate
from medvision_ray.learning.calibrate import ValidationScores, fit_temperature
from medvision_ray.learning.model import build_model
from medvision_ray.learning.operating import choose_points
from medvision_ray.privacy import Pseudonymiser, load_pseudonymiser
from medvision_ray.scoring.drift import compare
from medvision_ray.scoring.summary import RunSummary

CLASSES = ("glioma", "meningioma", "pituitary")
TOO_SURE = 3.0
IMAGES = 260  # 100 of val, 80 of test, 80 of train


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Bundle]]:
    """Two small members, single-label and multi-label."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("members")
    config, preprocess = (
        ModelConfig(encoder="tu-resnet10t", segmentation=False, decoder_channels=(8, 8, 8, 8, 8)),
        PreprocessConfig(size=(64, 64)),
    )
    found: dict[bool, list[Bundle]] = {}
    for multi_label in (False, True):
        for seed in (1, 2):
            torch.manual_seed(seed)
            bundle = save_bundle(
                str(place / f"{multi_label}-{seed}"),
                name=f"m{seed}",
                architecture=config,
                preprocess=preprocess,
                classes=CLASSES,
                multi_label=multi_label,
                thresholds=(0.5, 0.4, 0.5 + seed / 10) if multi_label else (),
                mask_threshold=0.5,
                trained={"image_digests": "plain"},
                metrics={"val_f1": 0.5},
                train_digest=[image_digest("/seen/0.png")],
                model=build_model(config, preprocess, len(CLASSES)),
            )
            found.setdefault(multi_label, []).append(bundle)
    return found


class Site:
    """A label table with all three splits, and a model's committed rows: too sure of itself by a known temperature."""

    def __init__(self, folder: Path, multi_label: bool) -> None:
        self.folder, self.multi_label, self.output = folder, multi_label, str(folder / "out")
        generator = np.random.default_rng(0)
        honest = generator.normal(0, 2, (IMAGES, len(CLASSES)))
        if multi_label:
            self.truth = generator.random(honest.shape) < expit(honest)
            self.probabilities = expit(TOO_SURE * honest).astype(np.float32)
        else:
            labels = np.array([generator.choice(len(CLASSES), p=row) for row in softmax(honest, axis=1)])
            self.truth = labels[:, None] == np.arange(len(CLASSES))
            self.probabilities = softmax(TOO_SURE * honest, axis=1).astype(np.float32)
        self.splits = np.array(["val"] * 100 + ["test"] * 80 + ["train"] * 80)
        self.uris = [str(folder / f"{number}.png") for number in range(IMAGES)]
        head = f"image,patient_id,split,{','.join(CLASSES) if multi_label else 'label'}"
        lines = [head]
        for number, uri in enumerate(self.uris):
            cv2.imwrite(uri, np.full((8, 8), number % 256, np.uint8))
            cells = ",".join("01"[int(one)] for one in self.truth[number])
            if not multi_label:
                cells = CLASSES[int(self.truth[number].argmax())]
            lines.append(f"{number}.png,P{number // 2},{self.splits[number]},{cells}")
        (folder / "labels.csv").write_text("\n".join(lines))

    def commit(self, bundle: Bundle, splits: tuple[str, ...] = ("val",), names: Pseudonymiser | None = None) -> None:
        ids = list_uris(self.uris, names).objects["image_id"].to_pylist()
        columns = tables.probability_columns(CLASSES)
        rows = [
            {
                "run_key": "r", "model_id": bundle.model_id, "image_id": ids[number], "uri": self.uris[number],
                "height": 8, "width": 8, "frames": 1, "spacing_source": "none", "input_mean": number % 7, "modality": "MR",
                "predicted_label": CLASSES[int(self.probabilities[number].argmax())],
                **dict(zip(columns, self.probabilities[number].tolist(), strict=True)),
            }
            for number in range(IMAGES)
            if self.splits[number] in splits
        ]  # fmt: skip
        schema = tables.predictions_schema(CLASSES)
        batches = pa.Table.from_pylist(rows, schema).to_batches()
        tables.commit(self.output, "predictions", schema, batches, bundle.model_id)

    def labels(self) -> dict[str, Any]:
        return {"table": str(self.folder / "labels.csv"), **({"findings": CLASSES} if self.multi_label else {})}

    def job(self, bundle: Bundle, **options: Any) -> CalibrateJob:
        settings = {"labels": self.labels(), "output": self.output, "bundle": bundle.uri}
        return build_job(CalibrateJob, {**settings, **options}, "the test")

    def scores(self, rows: np.ndarray) -> ValidationScores:
        patients = np.array([f"p:P{number // 2}" for number in rows])
        truth = self.truth[rows].astype(np.float64)
        return ValidationScores(CLASSES, self.multi_label, self.probabilities[rows], truth, patients)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows that a run would write are there."""

    def nothing_new(plan: Any, inventory_of: Any, say: Any) -> RunSummary:
        return RunSummary("run", "evaluate", "", plan.archive, 0, 0, 0, 0, 0)

    monkeypatch.setattr("medvision_ray.evaluation.collect.execute", nothing_new)


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize("vote", ["soft", "majority"])
def test_an_ensemble_gets_what_a_training_would_fit_to_the_same_val_scores(
    members: dict[bool, list[Bundle]], tmp_path: Path, vote: Any
) -> None:
    site = Site(tmp_path, multi_label=False)
    ensemble = save_ensemble(str(tmp_path / "e"), "both", vote, members[False])
    site.commit(ensemble)
    found = recalibrate(site.job(ensemble), quiet)
    val = site.scores(np.flatnonzero(site.splits == "val"))
    temperature = fit_temperature(val.probabilities, val.truth)
    bundle = load_bundle(f"{site.output}/bundles/both-calibrated")
    assert bundle.calibration is not None
    assert bundle.calibration.document() == {"method": "temperature", "temperature": temperature}
    assert temperature == pytest.approx(TOO_SURE, rel=0.3)
    job = site.job(ensemble)
    assert bundle.operating_points == choose_points(val, job.operating_points)[0]
    assert {point.name for point in bundle.operating_points} == {"specificity_90", "specificity_95", "f1"}
    assert (found.images, found.patients, found.failed) == (100, 50, 0)
    assert bundle.metrics["val_ece_calibrated"] < bundle.metrics["val_ece"]


@pytest.mark.usefixtures("scored")
def test_the_new_bundle_is_another_model_of_the_same_members_and_the_old_one_stays(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    ensemble = save_ensemble(str(tmp_path / "e"), "both", "soft", members[False])
    card = Path(ensemble.uri, "MODEL_CARD.md")
    card.write_text(card.read_text().replace("**To be filled in by the owner:** purpose", "For our ward. Purpose"))
    site.commit(ensemble)
    recalibrate(site.job(ensemble, to=str(tmp_path / "new"), name="ward"), quiet)
    new = load_bundle(str(tmp_path / "new"))
    assert (new.vote, [one.content_hash for one in new.members]) == (
        "soft",
        [one.content_hash for one in ensemble.members],
    )
    assert (new.name, new.weights_sha256) == ("ward", ensemble.weights_sha256)
    assert new.content_hash != ensemble.content_hash
    assert load_bundle(ensemble.uri) == ensemble
    assert new.train_digest == ensemble.train_digest
    assert set(new.fitted_digest) == {image_digest(uri) for uri in np.array(site.uris)[site.splits == "val"]}
    assert new.trained["calibrated_from"] == ensemble.model_id
    assert new.trained["calibrated_on"]["images"] == 100
    assert "For our ward." in Path(new.uri, "MODEL_CARD.md").read_text()
    again = recalibrate(site.job(ensemble, to=str(tmp_path / "new"), name="ward"), quiet)
    assert again.bundle.model_id == new.model_id


@pytest.mark.usefixtures("scored")
def test_a_network_that_favours_a_class_here_gets_offsets_and_those_that_serve_stay(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    favoured = np.log(site.probabilities.astype(np.float64)) + np.array([6.0, 0.0, 0.0])
    site.probabilities = softmax(favoured, axis=1).astype(np.float32)
    ensemble = save_ensemble(str(tmp_path / "e"), "both", "soft", members[False])
    site.commit(ensemble)
    new = recalibrate(site.job(ensemble), quiet).bundle
    assert new.class_offsets[0] < min(new.class_offsets[1:]) - 1.5
    assert new.trained["class_offsets"]["gain"][1] > 0
    site.commit(new)
    again = recalibrate(site.job(new, name="again"), quiet)
    assert load_bundle(again.bundle.uri).class_offsets == new.class_offsets
    assert "not shown" in again.facts["class_offsets"]["reason"]
    plain = recalibrate(site.job(new, name="plain", operating_points={"class_offsets": "none"}), quiet)
    assert plain.bundle.class_offsets == ()


@pytest.mark.usefixtures("scored")
def test_an_ensemble_gets_a_fingerprint_of_the_val_rows_that_tells_a_shift(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    ensemble = save_ensemble(str(tmp_path / "e"), "both", "soft", members[False])
    site.commit(ensemble)
    assert ensemble.fingerprint is None
    fingerprint = load_bundle(recalibrate(site.job(ensemble), quiet).bundle.uri).fingerprint
    assert fingerprint is not None
    feature = fingerprint.features["p_glioma"]
    assert (feature.split, feature.images, feature.patients) == ("val", 100, 50)
    assert {"input_mean", "modality"} <= set(fingerprint.features)
    values = site.probabilities[site.splits == "val"]
    frame = pd.DataFrame({"patient_key": range(100), "frames": 1, "p_glioma": values[:, 0], "input_mean": 0.0})
    assert not [item for item in compare(fingerprint, frame, 50) if item.feature == "p_glioma" and item.shifted]
    shifted = compare(fingerprint, frame.assign(p_glioma=0.999), 50)
    assert [item.shifted for item in shifted if item.feature == "p_glioma"] == [True]


@pytest.mark.usefixtures("scored")
def test_findings_get_sigmoids_and_keep_the_thresholds_that_name_them_unless_asked(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=True)
    ensemble = save_ensemble(str(tmp_path / "e"), "both", "majority", members[True])
    site.commit(ensemble)
    kept = recalibrate(site.job(ensemble), quiet).bundle
    assert kept.calibration is not None
    assert kept.calibration.document()["method"] == "platt"
    assert kept.thresholds == ensemble.thresholds
    changed = recalibrate(site.job(ensemble, name="f1", operating_points={"decide_at": "f1"}), quiet).bundle
    point = next(point for point in changed.operating_points if point.name == "f1")
    assert changed.thresholds == tuple(one.threshold for one in point.thresholds if one is not None)
    assert changed.model_id != kept.model_id


@pytest.mark.usefixtures("scored")
def test_the_test_split_changes_nothing_and_what_was_fitted_to_is_no_test_image(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    member = members[False][0]
    site.commit(member, ("val", "test", "train"))
    first = recalibrate(site.job(member), quiet).bundle
    text = (tmp_path / "labels.csv").read_text().splitlines()
    turned = [text[0], *(line if ",test," not in line else line.rsplit(",", 1)[0] + ",glioma" for line in text[1:])]
    (tmp_path / "labels.csv").write_text("\n".join(turned))
    assert recalibrate(site.job(member), quiet).bundle.model_id == first.model_id
    moved = [line.replace(",val,", ",test,") for line in text]
    (tmp_path / "labels.csv").write_text("\n".join(moved))
    settings = {"labels": site.labels(), "output": site.output, "bundle": first.uri, "split": "test"}
    with pytest.raises(LabelError, match="but 100 of 180 were in the val split"):
        join_split(build_job(EvaluateJob, settings, "the test"), first, quiet)


@pytest.mark.usefixtures("scored")
def test_what_was_fitted_to_is_known_by_keyed_digests_where_addresses_are_keyed(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site, member = Site(tmp_path, multi_label=False), members[False][0]
    privacy = PrivacyConfig(uri="hash", demo_key=True)
    names = load_pseudonymiser(privacy)
    site.commit(member, ("val",), names)
    new = recalibrate(site.job(member, privacy=privacy.model_dump()), quiet).bundle
    assert set(new.fitted_digest) == {image_digest(uri, names) for uri in site.uris[:100]}
    settings = {"labels": site.labels(), "output": site.output, "bundle": new.uri, "split": "test"}
    with pytest.raises(LabelError, match="and the key"):
        join_split(build_job(EvaluateJob, settings, "the test"), new, quiet)


@pytest.mark.usefixtures("scored")
def test_too_few_patients_give_points_or_reasons_and_no_calibration(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    member = members[False][0]
    site.commit(member)
    found = recalibrate(site.job(member, calibration={"min_patients": 60}), quiet)
    assert found.bundle.calibration is None
    assert "50 validation patients" in found.facts["calibration"]["reasons"]["glioma"]
    assert found.bundle.operating_points


def test_images_that_were_trained_on_are_refused(members: dict[bool, list[Bundle]], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,patient_id,split,label\n/seen/0.png,P1,val,glioma\n")
    ensemble = save_ensemble(str(tmp_path / "e"), "both", "soft", members[False])
    settings = {"labels": {"table": str(tmp_path / "labels.csv")}, "output": str(tmp_path), "bundle": ensemble.uri}
    with pytest.raises(LabelError, match="1 of 1 in the val split were trained on"):
        recalibrate(build_job(CalibrateJob, settings, "the test"), quiet)


@pytest.mark.usefixtures("scored")
def test_places_options_and_tables_that_do_not_fit_are_refused_before_anything_is_written(
    members: dict[bool, list[Bundle]], tmp_path: Path
) -> None:
    site = Site(tmp_path, multi_label=False)
    one, two = members[False]
    for options, error, words in (
        ({"to": f"{one.uri}/inside"}, BundleError, "lie in one another"),
        ({"to": two.uri}, UsageError, "no bundle of another model"),
        ({"operating_points": {"decide_at": "f1"}}, UsageError, "is for findings"),
        ({"operating_points": {"positive_class": "cyst"}}, ConfigError, "one of the classes"),
    ):
        with pytest.raises(error, match=words):
            recalibrate(site.job(one, **options), quiet)
    assert load_bundle(two.uri) == two
    site.commit(members[True][0])
    with pytest.raises(LabelError, match=r"Set `labels.findings` to its columns"):
        recalibrate(site.job(members[True][0]), quiet)
    assert not Path(site.output, "bundles").exists()


def test_a_split_that_failed_beyond_the_budget_is_not_fitted_to(
    members: dict[bool, list[Bundle]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, multi_label=False)
    site.commit(members[False][0])

    def over(plan: Any, inventory_of: Any, say: Any) -> RunSummary:
        return RunSummary("run", "evaluate", "", plan.archive, 9, 0, 0, 5, 4, over_budget=("all",))

    monkeypatch.setattr("medvision_ray.evaluation.collect.execute", over)
    with pytest.raises(MedVisionError, match="over it"):
        recalibrate(site.job(members[False][0]), quiet)
    assert not Path(site.output, "bundles").exists()


@pytest.mark.usefixtures("scored")
def test_the_command_line_says_what_was_fitted(
    members: dict[bool, list[Bundle]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path, multi_label=False)
    member = members[False][1]
    site.commit(member)
    given = ["--bundle", member.uri, "--labels", site.labels()["table"], "--output", site.output, "--name", "new"]
    assert main(["calibrate", *given, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["calibration"]["method"] == "temperature"
    assert said["model_id"] == load_bundle(f"{site.output}/bundles/new").model_id
    assert (said["images"], said["patients"]) == (100, 50)
    assert main(["bundle", "show", said["bundle"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operating_points"] == said["operating_points"]
