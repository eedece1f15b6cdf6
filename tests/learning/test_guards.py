"""Leaks and shortcuts: found where they are, named by row, silent where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvision_ray.config import DecodeConfig, LabelsConfig, PreprocessConfig, PrivacyConfig
from medvision_ray.errors import LabelError
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.learning.guards import look_for_leaks
from medvision_ray.learning.image_facts import FACTS, header_reader, image_facts
from medvision_ray.learning.ingest import DecodedImages
from medvision_ray.learning.labels import LabelTable, load_labels
from medvision_ray.learning.near_duplicates import perceptual_hash
from medvision_ray.learning.shortcuts import ProbedImages, probe_shortcuts

PLAIN: dict[str, Any] = {field.name: None for field in FACTS} | {"height": 224, "width": 224, "frames": 1}


def _decoded(table: LabelTable, hashes: list[bytes], facts: list[dict[str, Any] | None] | None = None) -> DecodedImages:
    digests = tuple(f"digest {row}" for row in range(len(table)))
    return DecodedImages(None, digests, ("",) * len(table), tuple(hashes), tuple(facts or [PLAIN] * len(table)))


def _hash(number: int) -> bytes:
    return b"\x80" + np.random.default_rng(number).bytes(31)


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    lines = [f"{i}.png,{'ab'[i % 2]},DOE-{i},{('train', 'val', 'test')[i % 3]}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label,patient_id,split", *lines]))
    return load_labels(LabelsConfig(table=str(tmp_path / "labels.csv")))


def _look(table: LabelTable, decoded: DecodedImages, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return look_for_leaks(table, decoded, LabelsConfig(table="x", **options), said.append), said


def test_near_duplicates_across_splits_are_counted_and_named_by_row(table: LabelTable) -> None:
    hashes = [_hash(i) for i in range(12)]
    hashes[4] = hashes[3]  # val and train
    hashes[8] = hashes[3][:-1] + bytes([hashes[3][-1] ^ 1])  # test
    facts, said = _look(table, _decoded(table, hashes))
    found = facts["leakage"]["near_duplicates"]
    assert found["pairs"] == 3
    assert found["images"] == {"train": 1, "val": 1, "test": 1}
    assert found["examples"][0] == {"rows": [4, 5], "splits": ["train", "val"], "distance": 0}
    assert "LEAK?" in said[0]
    assert "rows 4 and 5" in said[0]
    text = json.dumps(facts) + said[0]
    assert "DOE" not in text
    assert ".png" not in text


def test_they_are_refused_or_not_looked_for_where_wanted(table: LabelTable) -> None:
    decoded = _decoded(table, [_hash(0)] * 12)
    with pytest.raises(LabelError, match="near-duplicates across splits") as caught:
        _look(table, decoded, near_duplicates="refuse")
    assert "DOE" not in str(caught.value)
    facts, said = _look(table, decoded, near_duplicates="off")
    assert facts["leakage"]["near_duplicates"] is None
    assert said == []


def test_exact_copies_within_a_split_are_counted(table: LabelTable) -> None:
    decoded = DecodedImages(None, ("same",) * 12, ("",) * 12, tuple(_hash(i) for i in range(12)), tuple([PLAIN] * 12))
    facts, _ = _look(table, decoded)
    assert facts["leakage"]["exact_copies_within_a_split"] == {"train": 3, "val": 3, "test": 3}


# The probe


def _images(facts: list[dict[str, Any]], labels: np.ndarray, patients: list[str], **columns: list[str]) -> ProbedImages:
    truth = (labels[:, None] == np.arange(2)).astype(float)
    return ProbedImages(facts, columns, patients, truth, ("no", "yes"))


def _made(n: int, share: float) -> tuple[list[dict[str, Any]], np.ndarray, list[str]]:
    """Labels that go with the manufacturer in `share` of the patients; three images a patient."""
    generator = np.random.default_rng(5)
    label = generator.integers(0, 2, n)
    other = generator.random(n) > share
    facts = [
        {**PLAIN, "manufacturer": "GE" if value != swap else "Siemens"}
        for value, swap in zip(label, other, strict=True)
    ]
    return [item for item in facts for _ in range(3)], np.repeat(label, 3), [str(i) for i in range(n) for _ in range(3)]


def test_a_scanner_that_tells_the_label_is_found() -> None:
    found = probe_shortcuts(_images(*_made(120, 0.9)))
    assert found["told"]
    assert "SHORTCUT" in found["sentence"]
    assert "device" in found["sentence"]
    assert found["classes"]["device"]["yes"]["auroc"] == pytest.approx(0.9, abs=0.06)
    assert set(found["alike"]) == {"size", "spacing", "exposure", "format"}


@pytest.mark.parametrize("first", [True, False])
def test_of_two_findings_both_are_probed(first: bool) -> None:
    facts, told, patients = _made(120, 0.95)
    other = np.repeat(np.random.default_rng(1).integers(0, 2, 120), 3)
    truth = np.stack([told, other] if first else [other, told], axis=1).astype(float)
    names = ("told", "other") if first else ("other", "told")
    found = probe_shortcuts(ProbedImages(facts, {}, patients, truth, names, multi_label=True))
    assert found["told"]
    assert set(found["classes"]["device"]) == {"told", "other"}
    assert "`told`" in found["sentence"]


def test_a_scanner_that_says_nothing_is_no_shortcut() -> None:
    found = probe_shortcuts(_images(*_made(120, 0.5)))
    assert not found["told"]
    assert found["sentence"].startswith("No shortcut")
    assert found["classes"]["device"]["yes"]["ci_low"] < 0.5


def test_patients_are_kept_apart() -> None:
    """Heights that name the patient, and nothing else: without groups a forest would look the label up."""
    generator = np.random.default_rng(0)
    labels, heights = generator.integers(0, 2, 60), generator.permutation(60) * 10 + 100
    facts = [{**PLAIN, "height": int(height)} for height in np.repeat(heights, 5)]
    found = probe_shortcuts(_images(facts, np.repeat(labels, 5), [str(i) for i in np.repeat(np.arange(60), 5)]))
    assert not found["told"]


def test_columns_of_the_label_table_are_probed_too() -> None:
    _, labels, patients = _made(60, 1.0)
    sites = ["north" if label else "south" for label in labels]
    found = probe_shortcuts(_images([PLAIN] * len(labels), labels, patients, site=sites))
    assert found["told"]
    assert found["classes"]["columns"]["yes"]["auroc"] == 1.0
    assert "north" not in json.dumps(found)


def test_images_that_are_all_alike_cannot_tell_anything() -> None:
    _, labels, patients = _made(30, 1.0)
    found = probe_shortcuts(_images([PLAIN] * len(labels), labels, patients))
    assert not found["told"]
    assert found["classes"] == {}
    assert "Nothing of the acquisition differs" in found["sentence"]


def test_too_few_patients_are_not_probed() -> None:
    facts, labels, patients = _made(12, 1.0)
    assert "Not probed" in probe_shortcuts(_images(facts, labels, patients))["sentence"]


def test_real_chest_ct_whose_acquisition_goes_with_contrast_is_found(data_dir: Path) -> None:
    table = load_labels(LabelsConfig(table=str(data_dir / "chest_ct_dicom/labels.csv")))
    reader = header_reader(PrivacyConfig())
    facts, hashes = [], []
    for uri in table.uris:
        image = decode(Path(uri).read_bytes(), DecodeConfig(), reader)
        prepared = prepare(image, PreprocessConfig(size=(64, 64)))
        facts.append(image_facts(image, prepared))
        hashes.append(perceptual_hash(prepared, 0))
    found, said = _look(table, _decoded(table, hashes, facts))
    assert found["leakage"]["near_duplicates"]["pairs"] == 0
    shortcuts = found["shortcuts"]
    assert shortcuts["told"]
    assert shortcuts["classes"]["all"]["no_contrast"]["ci_low"] > 0.5
    assert "`no_contrast`" in said[0]
    # Without a model: the manufacturers alone order the classes better than chance.
    ge = np.array([(item or {})["manufacturer"] != "GE MEDICAL SYSTEMS" for item in facts])
    assert roc_auc_score(table.labels == 1, ge) != pytest.approx(0.5, abs=0.05)
