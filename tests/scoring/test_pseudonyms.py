"""Runs under pseudonyms of addresses: what they are bound to, and that nothing is written beside them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from medvision_ray.archive.inventory import image_ids, list_archive, list_uris, read_frozen
from medvision_ray.bundle import Bundle, image_digest
from medvision_ray.config import ArchiveConfig, EvaluateJob, PrivacyConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.errors import LabelError, MedVisionError
from medvision_ray.evaluation.collect import _check
from medvision_ray.evaluation.evaluate import _write_details
from medvision_ray.learning.labels import load_labels
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.run import RunPlan, _freeze

NAMES = Pseudonymiser(b"k" * 32, PrivacyConfig(uri="hash"))


def freeze(bundle: Bundle, phantom: PhantomArchive, folder: Path, names: Pseudonymiser) -> Any:
    settings = {"archive": {"uri": phantom.night_2}, "bundle": bundle.uri, "output": str(folder)}
    plan = RunPlan("score", phantom.night_2, build_job(ScoreJob, settings, "a test"))
    inventory = list_archive(ArchiveConfig(uri=phantom.night_2), names)
    return _freeze(plan, bundle, str(folder / "a-run"), lambda _: inventory, names)


def test_a_run_is_finished_with_the_key_and_the_form_of_addresses_it_began_with(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    freeze(bundle, phantom, tmp_path, NAMES)
    freeze(bundle, phantom, tmp_path, NAMES)
    for other in (Pseudonymiser(b"l" * 32, NAMES.policy), Pseudonymiser(NAMES.key)):
        with pytest.raises(MedVisionError, match="pseudonym key"):
            freeze(bundle, phantom, tmp_path, other)


def test_a_frozen_inventory_can_be_read_from_and_its_ids_are_of_pseudonyms(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    inventory, _ = freeze(bundle, phantom, tmp_path, NAMES)
    frozen = read_frozen(str(tmp_path / "a-run" / "inventory.parquet")).objects
    assert frozen.equals(inventory.objects)
    assert all(Path(uri).is_file() for uri in frozen["uri"].to_pylist())
    assert frozen["image_id"].to_pylist() == image_ids(frozen["uri"], frozen["etag"], NAMES).tolist()
    assert not set(frozen["image_id"].to_pylist()) & set(image_ids(frozen["uri"], frozen["etag"]).tolist())


def test_named_objects_have_the_ids_that_listing_gives_them(phantom: PhantomArchive) -> None:
    listed = list_archive(ArchiveConfig(uri=phantom.night_2), NAMES).objects
    assert list_uris(listed["uri"].to_pylist(), NAMES).objects["image_id"].equals(listed["image_id"])


def test_details_of_an_evaluation_hold_pseudonyms(bundle: Bundle, tmp_path: Path) -> None:
    names = [
        "image_id",
        "uri",
        "mask_uri",
        "frames",
        "height",
        "width",
        "true_label",
        "predicted_label",
        "dice",
        "mask_box",
        "mask",
    ]
    names += [f"{kind}_{name}" for name in ("cavity", "consolidation", "nodule") for kind in ("p", "c")]
    rows = pd.DataFrame(
        [dict.fromkeys(names) | {"uri": "/a/DOE.png", "mask_uri": mask} for mask in ("/m/DOE.png", None)]
    )
    _write_details(str(tmp_path / "details.parquet"), bundle, rows, NAMES)
    data = (tmp_path / "details.parquet").read_bytes()
    assert b"DOE" not in data
    found = pq.read_table(io.BytesIO(data))
    assert found["uri"].to_pylist() == [NAMES.address("/a/DOE.png")] * 2
    assert found["mask_uri"].to_pylist() == [NAMES.address("/m/DOE.png"), None]


def test_leakage_is_seen_through_pseudonyms_and_never_overlooked(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"labels": {"table": str(phantom.labels)}, "bundle": bundle.uri, "output": str(tmp_path)}
    (tmp_path / "key").write_text("q7Jm2xVt9LrYw4KsN8bHd3PzG6cFa5Tu")
    plain = build_job(EvaluateJob, settings, "a test")
    privacy = {"uri": "hash", "key_file": str(tmp_path / "key")}
    hashed = build_job(EvaluateJob, {**settings, "privacy": privacy}, "a test")
    table = load_labels(plain.labels).select("test")
    keyed = Pseudonymiser((tmp_path / "key").read_bytes(), PrivacyConfig(uri="hash"))
    trained = replace(bundle, train_digest=(image_digest(table.uris[0], keyed),), trained={"image_digests": "hashed"})
    assert image_digest(table.uris[0], keyed) != image_digest(table.uris[0])
    with pytest.raises(LabelError, match="1 of"):
        _check(hashed, trained, table)
    with pytest.raises(LabelError, match="uri: hash"):
        _check(plain, trained, table)
    _check(hashed, replace(trained, train_digest=()), table)
    with pytest.raises(LabelError, match="1 of"):  # a bundle of plain digests, evaluated under pseudonyms
        _check(hashed, replace(bundle, train_digest=(image_digest(table.uris[0]),)), table)
