"""The evaluate and compare jobs from committed prediction rows, without scoring: what is written and what is grouped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tifffile

from medvision_ray import tables
from medvision_ray.archive.inventory import list_uris
from medvision_ray.bundle import Bundle, image_digest
from medvision_ray.calibration import TemperatureScaling
from medvision_ray.config import CompareJob, EvaluateJob, ModelConfig, PreprocessConfig, build_job
from medvision_ray.errors import ConfigError, LabelError, MedVisionError
from medvision_ray.evaluation.compare import compare
from medvision_ray.evaluation.evaluate import Evaluation, evaluate
from medvision_ray.scoring.masks import encode_mask
from medvision_ray.scoring.summary import RunSummary

CLASSES = ("glioma", "meningioma")
SIDE = 32
SHARPER = TemperatureScaling(0.5)


def bundle_of(name: str) -> Bundle:
    return Bundle(
        uri=f"/bundles/{name}",
        name=name,
        architecture=ModelConfig(),
        preprocess=PreprocessConfig(),
        classes=CLASSES,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        batch_norm_eps=None,
        weights_sha256="0" * 64,
        content_hash=name * 12,
        calibration=SHARPER if name == "k" else None,
    )


def disc(centre: tuple[int, int], radius: int) -> np.ndarray:
    rows, columns = np.ogrid[:SIDE, :SIDE]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


class Site:
    """A label table with images and masks, and two models' rows: `b` draws nothing in every fourth image."""

    def __init__(self, folder: Path, n: int = 48) -> None:
        self.folder, self.n, self.output = folder, n, str(folder / "out")
        generator = np.random.default_rng(0)
        lines = ["image,mask,label,patient_id,split,site"]
        self.labels = generator.integers(0, 2, n)
        self.truth = [disc((10 + number % 10, 14), 2 + number % 5) for number in range(n)]
        for number in range(n):
            cv2.imwrite(str(folder / f"{number}.png"), np.full((SIDE, SIDE), number, np.uint8))
            cv2.imwrite(str(folder / f"m{number}.png"), self.truth[number].astype(np.uint8) * 255)
            site = "north" if number < n - 6 else "south"
            lines.append(f"{number}.png,m{number}.png,{CLASSES[self.labels[number]]},P{number // 2},test,{site}")
        (folder / "labels.csv").write_text("\n".join(lines))
        self.uris = [str(folder / f"{number}.png") for number in range(n)]

    def commit(self, name: str, *, right: float, images: int | None = None) -> None:
        """Rows of one model, the first `images` of them, with a share of right labels."""
        generator = np.random.default_rng(len(name))
        ids = list_uris(self.uris).objects["image_id"].to_pylist()
        rows: list[dict[str, Any]] = []
        for number in range(images or self.n):
            label = int(self.labels[number]) if generator.random() < right else 1 - int(self.labels[number])
            drawn = np.zeros((SIDE, SIDE), bool)
            if name == "a" or number % 4:
                drawn = np.roll(self.truth[number], 1, axis=0)
            mask, share = encode_mask(drawn), float(generator.uniform(0.5, 1))
            probabilities = (share, 1 - share) if label == 0 else (1 - share, share)
            calibrated = SHARPER.apply(np.array([probabilities], np.float32))[0] if name == "k" else (None, None)
            rows.append(
                {
                    "run_key": name, "model_id": bundle_of(name).model_id, "image_id": ids[number],
                    "uri": self.uris[number], "modality": "MR", "height": SIDE, "width": SIDE, "frames": 1,
                    "spacing_mm": [0.5, 0.5], "spacing_source": "pixel_spacing" if number % 3 else "imager",
                    "predicted_label": CLASSES[label], "p_glioma": probabilities[0], "p_meningioma": probabilities[1],
                    "c_glioma": calibrated[0], "c_meningioma": calibrated[1],
                    "key_frame": 0, "mask_box": list(mask.box) if mask.box else None, "mask": mask.data,
                    "patient_sex": "F" if number % 8 < 4 else "M",
                }
            )  # fmt: skip
        schema = tables.predictions_schema(CLASSES)
        tables.commit(self.output, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), name)

    def job(self, model: type[Any] = EvaluateJob, **options: Any) -> Any:
        settings = {"labels": {"table": str(self.folder / "labels.csv")}, "output": self.output, "bundle": "a"}
        return build_job(model, {**settings, "dataset": "phantom", "resamples": 100, **options}, "the test")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    def scored_already(plan: Any, inventory_of: Any, say: Any) -> RunSummary:
        return RunSummary("run", "evaluate", "", plan.archive, 0, 0, 0, 0, 0)

    monkeypatch.setattr("medvision_ray.evaluation.collect.execute", scored_already)
    for job in ("evaluate", "compare"):
        monkeypatch.setattr(f"medvision_ray.evaluation.{job}.load_bundle", bundle_of)
    made = Site(tmp_path)
    made.commit("a", right=0.9)
    made.commit("b", right=0.6)
    return made


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


def run(job: EvaluateJob) -> Evaluation:
    return evaluate(job, quiet)  # type: ignore[arg-type]


def test_distances_are_in_mm_only_where_the_spacing_is_true_in_the_patient(site: Site) -> None:
    found = run(site.job(bundle="b"))
    rows = {row.metric: row for row in found.metrics if row.class_name == "all" and row.subgroup == "all"}
    assert (rows["hd95_mm"].n_images, rows["hd95_px"].n_images) == (32, 16)
    assert rows["undrawn_masks"].value == 12
    # Shifted by one pixel: 1 px, or 0.5 mm; nothing drawn: the diagonal.
    diagonal = float(np.hypot(SIDE, SIDE))
    undrawn = [number for number in range(48) if number % 4 == 0]
    in_mm, in_px = (sum((number % 3 > 0) == true for number in undrawn) for true in (True, False))
    assert rows["hd95_px"].value == pytest.approx((in_px * diagonal + (16 - in_px)) / 16)
    assert rows["hd95_mm"].value == pytest.approx(0.5 * (in_mm * diagonal + (32 - in_mm)) / 32)
    assert rows["surface_dice_2mm"].value == pytest.approx((32 - in_mm) / 32)
    assert rows["lesion_sensitivity"].value == pytest.approx(36 / 48)
    assert rows["false_positives_per_image"].value == 0


def test_groups_stand_beside_the_whole_in_the_metrics_table(site: Site) -> None:
    found = run(site.job(subgroup_columns=["site"]))
    rows = tables.read(site.output, "metrics").to_pylist()
    whole = [row for row in rows if row["subgroup"] == "all"]
    assert {row["subgroup_value"] for row in whole} == {None}
    groups = {(row["subgroup"], row["subgroup_value"]) for row in rows} - {("all", None)}
    assert groups == {
        ("patient_sex", "F"), ("patient_sex", "M"), ("site", "north"), ("site", "south"),
        ("mask_size", "0.5 to 2 %"), ("mask_size", "over 2 %"),
    }  # fmt: skip
    south = [row for row in rows if row["subgroup_value"] == "south"]
    assert [(row["metric"], row["value"], row["n_patients"]) for row in south] == [("images", 6.0, 3)]
    women = [row for row in rows if (row["subgroup_value"], row["metric"]) == ("F", "accuracy")]
    assert (women[0]["n_images"], women[0]["n_patients"]) == (24, 12)
    assert found.value("accuracy") == next(row["value"] for row in whole if row["metric"] == "accuracy")
    assert not [row for row in rows if "P1" in str(row.values())]


def test_calibrated_probabilities_are_measured_beside_the_raw_ones(site: Site) -> None:
    site.commit("k", right=0.9)
    found = run(site.job(bundle="k"))
    rows = tables.read(site.output, "predictions", ["image_id", "model_id", "p_glioma", "c_glioma"]).to_pandas()
    rows = rows[rows["model_id"] == bundle_of("k").model_id].set_index("image_id")
    truth = pd.Series(site.labels == 0, index=list_uris(site.uris).objects["image_id"].to_pylist())
    for suffix, column in (("", "p_glioma"), ("_calibrated", "c_glioma")):
        raw = rows[column].astype(float)
        assert found.value(f"brier{suffix}") == pytest.approx(2 * ((raw - truth.reindex(raw.index)) ** 2).mean())
        assert found.value(f"ece{suffix}") is not None
    assert found.value("brier_calibrated") != found.value("brier")
    assert "ece_calibrated" not in {row.metric for row in run(site.job()).metrics}
    intervals = [row for row in found.metrics if row.metric == "brier_calibrated" and row.subgroup == "all"]
    assert intervals[0].ci_low < intervals[0].value < intervals[0].ci_high


def test_the_same_evaluation_is_written_once_and_other_settings_are_another(site: Site) -> None:
    first, again = run(site.job()), run(site.job())
    assert first.key == again.key
    count = tables.read(site.output, "metrics").num_rows
    assert count == len(first.metrics)
    other = run(site.job(surface_tolerance_mm=0.4))
    assert other.key != first.key
    assert tables.read(site.output, "metrics").num_rows == count + len(other.metrics)


def accuracy_of(site: Site, key: str) -> float:
    rows = tables.read(site.output, "metrics").to_pylist()
    return next(
        row["value"]
        for row in rows
        if (row["run_key"], row["metric"], row["subgroup"], row["class"]) == (key, "accuracy", "all", "all")
    )


def newest(site: Site) -> str:
    rows = tables.read(site.output, "metrics").to_pylist()
    return str(max(rows, key=lambda row: row["measured_at"])["run_key"])


def test_what_is_measured_again_after_other_labels_is_the_newest_again(site: Site) -> None:
    first = run(site.job())
    right = (site.folder / "labels.csv").read_text()
    (site.folder / "labels.csv").write_text(
        right.replace("glioma", "x").replace("meningioma", "glioma").replace("x", "meningioma")
    )
    wrong = run(site.job())
    assert (newest(site), wrong.value("accuracy")) == (wrong.key, pytest.approx(1 - accuracy_of(site, first.key)))
    (site.folder / "labels.csv").write_text(right)
    again, once_more = run(site.job()), run(site.job())
    assert again.key == once_more.key == newest(site) == f"{first.key}-2"
    assert accuracy_of(site, again.key) == accuracy_of(site, first.key)


def test_images_scored_since_and_patients_put_right_are_another_measurement(site: Site) -> None:
    site.commit("c", right=0.5, images=40)
    first = run(site.job(bundle="c"))
    assert first.failed == 8
    rows = tables.read(site.output, "predictions").to_pylist()
    one = next(row for row in rows if row["model_id"] == bundle_of("a").model_id and row["image_id"] not in
               {row["image_id"] for row in rows if row["model_id"] == bundle_of("c").model_id})  # fmt: skip
    schema = tables.predictions_schema(CLASSES)
    late = pa.Table.from_pylist([{**one, "run_key": "late", "model_id": bundle_of("c").model_id}], schema)
    tables.commit(site.output, "predictions", schema, late.to_batches(), "late")
    later = run(site.job(bundle="c"))
    assert (later.failed, later.key == first.key) == (7, False)
    table = site.folder / "labels.csv"
    table.write_text(table.read_text().replace("P1,", "P0,"))  # of two patients one
    fewer = run(site.job(bundle="c"))
    assert newest(site) == fewer.key not in (first.key, later.key)
    assert (
        len(
            {
                row["n_patients"]
                for row in tables.read(site.output, "metrics").to_pylist()
                if row["metric"] == "failed_images"
            }
        )
        == 2
    )


def test_masks_that_were_drawn_and_not_kept_are_not_taken_for_none(site: Site) -> None:
    with pytest.raises(ConfigError, match="save_masks: true"):
        run(site.job(scoring={"save_masks": False}))
    rows = tables.read(site.output, "predictions").to_pylist()
    bare = [
        {**row, "run_key": "d", "model_id": bundle_of("d").model_id, "mask": None}
        for row in rows
        if row["run_key"] == "b"
    ]
    schema = tables.predictions_schema(CLASSES)
    tables.commit(site.output, "predictions", schema, pa.Table.from_pylist(bare, schema).to_batches(), "d")
    with pytest.raises(
        MedVisionError, match="masks of 48 images with a true one, but 36 rows were written with `save_masks: false`"
    ):
        run(site.job(bundle="d"))


def test_a_true_mask_of_several_frames_is_named_by_its_row_of_the_label_table(site: Site) -> None:
    table = site.folder / "labels.csv"
    text = table.read_text().replace("P0,test", "P0,train").replace("P1,test", "P1,val")  # the first four rows
    table.write_text(text.replace(",m5.png,", ",two.tif,").replace("5.png,m5.png", "5.png,two.tif"))
    tifffile.imwrite(site.folder / "two.tif", np.stack([site.truth[5]] * 2).astype(np.uint8))
    with pytest.raises(LabelError, match=r"one frame like its image, but got 2 \(row 6,"):
        run(site.job())


def test_findings_and_labels_are_not_taken_for_each_other(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = replace(bundle_of("a"), multi_label=True, thresholds=(0.5, 0.5))
    monkeypatch.setattr("medvision_ray.evaluation.evaluate.load_bundle", lambda uri: findings)
    with pytest.raises(LabelError, match=r"Expected findings, which may occur together.*Set `labels.findings`"):
        run(site.job())


def test_images_that_chose_the_epoch_are_no_test_images(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = replace(bundle_of("a"), fitted_digest=tuple(image_digest(uri) for uri in site.uris[:3]))
    monkeypatch.setattr("medvision_ray.evaluation.evaluate.load_bundle", lambda uri: fitted)
    with pytest.raises(LabelError, match="3 of 48 were in the val split that chose its epoch"):
        run(site.job())


@pytest.mark.parametrize("dataset", ["", "..", "a/b", "../../x", "a\\b", "line\nbreak", "n" * 129])
def test_a_dataset_is_a_name_and_no_path(site: Site, dataset: str) -> None:
    with pytest.raises(ConfigError, match="a name of 1 to 128 characters without slashes"):
        site.job(dataset=dataset)


@pytest.mark.parametrize("columns", [["modality"], ["all"], ["site", "site"]])
def test_a_column_does_not_take_the_place_of_another_group(site: Site, columns: list[str]) -> None:
    with pytest.raises(ConfigError, match="must not name a group that is there already"):
        site.job(subgroup_columns=columns)


def test_a_metrics_table_of_an_earlier_version_takes_the_new_rows(site: Site) -> None:
    first = pa.schema([field for field in tables.METRICS if field.name not in tables.LATER["metrics"]])
    old = pa.Table.from_pylist([{"run_key": "old", "subgroup": "all", "metric": "accuracy", "value": 0.5}], first)
    tables.commit(site.output, "metrics", first, old.to_batches(), "old")
    found = run(site.job())
    rows = tables.read(site.output, "metrics").to_pylist()
    assert len(rows) == 1 + len(found.metrics)
    assert next(row for row in rows if row["run_key"] == "old")["subgroup_value"] is None


def test_a_column_that_is_not_there_or_names_patients_is_refused(site: Site) -> None:
    with pytest.raises(LabelError, match="it lacks scanner"):
        run(site.job(subgroup_columns=["scanner"]))
    with pytest.raises(LabelError, match="which identifies patients"):
        run(site.job(subgroup_columns=["patient_id"]))


def test_two_models_are_compared_on_the_images_that_both_have(site: Site) -> None:
    site.commit("c", right=0.5, images=40)
    found = compare(site.job(CompareJob, baseline="c"), quiet)  # type: ignore[arg-type]
    assert (found.comparison.images, found.comparison.patients, found.left_out) == (40, 20, 8)
    kept = json.loads(Path(found.uri.removeprefix("file://")).read_text())
    rows = {(row["class_name"], row["metric"]): row for row in kept["differences"]}
    accuracy = rows["all", "accuracy"]
    assert accuracy["difference"] == pytest.approx(accuracy["value"] - accuracy["baseline"])
    assert accuracy["ci_low"] < accuracy["difference"] < accuracy["ci_high"]
    test = kept["accuracy_tests"]["all"]
    assert (test["only_model"] - test["only_baseline"]) / 40 == pytest.approx(accuracy["difference"])
    assert kept["auroc_tests"]["glioma"]["auroc"] == pytest.approx(rows["glioma", "auroc"]["value"])
    assert rows["all", "hd95_mm"]["difference"] < 0
    assert (kept["model_id"], kept["baseline_id"]) == (bundle_of("a").model_id, bundle_of("c").model_id)


def test_a_model_is_not_compared_with_itself(site: Site) -> None:
    with pytest.raises(MedVisionError, match="Expected two models to compare"):
        compare(site.job(CompareJob, baseline="a"), quiet)  # type: ignore[arg-type]
