"""The report's pages: self-contained, escaped, honest about what is absent, of every kind."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medvision_ray import storage
from medvision_ray.bundle import Bundle
from medvision_ray.cli import main
from medvision_ray.config import ReportJob, build_job
from medvision_ray.errors import ConfigError, UsageError
from medvision_ray.reporting.collect import build_report
from medvision_ray.reporting.comparison_page import Compared, comparison_sections, verdict
from medvision_ray.reporting.evaluation_page import Evaluated, evaluation_sections
from medvision_ray.reporting.figures import Scored
from medvision_ray.reporting.folds_section import Folds, folds_section
from medvision_ray.reporting.guards_section import guards_section
from medvision_ray.reporting.night_page import Night, night_sections
from medvision_ray.reporting.overlays import Example
from medvision_ray.reporting.page import Gallery, Page, Section, render
from medvision_ray.reporting.summary import METRIC_COLUMNS, headline, metric_tables
from medvision_ray.reporting.training_page import Trained, training_sections

HOSTILE = "<script>alert('x')</script>"
CLASSES = ("cavity", HOSTILE)

ABSENT = {
    "model": ((), "There are no facts about the model."),
    "runs": (None, "This model has no finished run."),
    "metrics": (None, "This model has not been evaluated."),
    "history": (None, "There is no record of this model&#39;s training."),
    "scored": (None, "There are no labelled predictions to draw curves from."),
    "failures": (None, "There is no record of failures."),
    "spread": ((), "There are no example images."),
}
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2],
        "train_loss": [1.0, 0.5],
        "val_loss": [1.1, 0.7],
        "seconds": [2.0, 1.0],
        "wait_seconds": [0.5, 0.01],
        "images_per_second": [20.0, 41.5],
    }
)


def metric(class_name: str, name: str, value: float | None, **other: object) -> dict[str, object]:
    row = dict.fromkeys(METRIC_COLUMNS) | {"subgroup": "all", "dataset": "phantom", "split": "test"}
    row |= {"class_name": class_name, "metric": name, "value": value, "n_images": 50, "n_patients": 10}
    return row | other


def example(caption: str = HOSTILE, heat: bool = False) -> Example:
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 10:20] = True
    grey = np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    return Example(grey, mask, mask, caption, mask.astype(np.float32) if heat else None)


def failures() -> pd.DataFrame:
    return pd.DataFrame(
        {"error_code": ["truncated", "truncated", HOSTILE], "stage": ["decode"] * 3, "image_id": [11, 12, 13]}
    )


@pytest.fixture
def content() -> Evaluated:
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    probabilities = rng.dirichlet((1, 1), 20)
    return Evaluated(
        model=[("Name", HOSTILE)],
        metrics=pd.DataFrame(
            [
                metric("all", "accuracy", 0.9, ci_low=0.8, ci_high=0.95),
                metric(HOSTILE, "recall", None),
                metric("cavity", "recall", 0.75, ci_low=0.5, ci_high=1.0),
                metric("cavity", f"confusion:{HOSTILE}", 3.0),
                metric("all", "missed_masks", 4.0),
                metric("all", "failed_images", 2.0),
            ]
        ),
        scored=Scored(labels, probabilities, CLASSES),
        predicted=probabilities.argmax(axis=1),
        spread=[example()],
        history=HISTORY,
        best_epoch=2,
        runs=pd.DataFrame(
            {
                "run_key": [HOSTILE],
                "started_at": [pd.Timestamp("2026-01-02T03:04:05Z")],
                "listed": [1206],
                "already_done": [6],
                "scored": [1194],
                "failed": [6],
                "seconds": [12.34],
                "images_per_second": [97.2],
            }
        ),
        failures=failures(),
    )


def night(**other: Any) -> Night:
    run = {"run_key": HOSTILE, "listed": 12, "scored": 8, "failed": 3, "already_done": 1, "state": "complete"}
    run |= {"images_per_second": 10.0, "seconds": 1.5, "read_seconds": 1.25, "predict_seconds": 7.5}
    rows = pd.DataFrame(
        {
            "predicted_label": ["cavity"] * 6 + [HOSTILE] * 2,
            "predicted_probability": [0.9] * 8,
            "mask_fraction": [0.1] * 4 + [0.0] * 4,
            "frames": [1] * 7 + [20],
            "modality": ["CT"] * 5 + [None] * 3,
            "manufacturer": [HOSTILE] * 8,
        }
    )
    drift = pd.DataFrame(
        [
            metric("all", "drift_psi", 0.41, subgroup="drift", subgroup_value="kvp"),
            metric("all", "drift_shifted", 1.0, subgroup="drift", subgroup_value="kvp"),
            metric("all", "drift_ks", 0.3, subgroup="drift", subgroup_value="kvp"),
            metric("all", "drift_psi", 0.02, subgroup="drift", subgroup_value=HOSTILE),
        ]
    )
    probabilities = np.random.default_rng(1).dirichlet((1, 1), 8)
    given = {"probabilities": probabilities, "predictions": rows, "failures": failures(), "drift": drift}
    return Night(run, CLASSES, **{**given, "versions": {"ray": "2.60"}, **other})


def difference(metric_: str, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    row = {"class_name": "all", "metric": metric_, "value": 0.5 + value, "baseline": 0.5, "difference": value}
    return row | {"ci_low": low, "ci_high": high}


def compared() -> Compared:
    facts = {
        "model_id": HOSTILE,
        "baseline_id": "b",
        "dataset": "phantom",
        "split": "test",
        "left_out": 2,
        "images": 50,
        "patients": 10,
        "differences": [
            difference("accuracy", 0.1, 0.02, 0.2),
            difference("ece", -0.1, -0.2, -0.05),
            difference("dice", 0.0, None, None),
        ],
        "auroc_tests": {HOSTILE: {"auroc": 0.9, "baseline": 0.8, "standard_error": 0.02, "z": 5.0, "p": 0.0001}},
        "accuracy_tests": {"all": {"only_model": 6, "only_baseline": 1, "p": 0.125}},
    }
    return Compared([facts], [("Model", HOSTILE)], [("Model", "b")])


def trained() -> Trained:
    labels = {
        "train": {"images": 120, "patients": 24, "classes": {HOSTILE: 40, "b": 80}, "with_mask": 9, "unlabelled": 0}
    }
    facts = {"labels": labels, "best_epoch": 2, "versions": {"torch": HOSTILE}}
    return Trained([("Name", HOSTILE)], HISTORY, facts, {"val_accuracy": 0.75}, {"Preprocessing": {"size": [64, 64]}})


def page(sections: list[Section], **options: Any) -> str:
    return render(Page(HOSTILE, "subtitle", "2026-01-02 03:04 UTC", sections), **options)


PAGES = {
    "evaluation": lambda content: page(evaluation_sections(content)),
    "training": lambda _: page(training_sections(trained())),
    "comparison": lambda _: page(comparison_sections(compared())),
    "night": lambda _: page(night_sections(night())),
}


class Parsed(HTMLParser):
    """Sources of images, alternative texts, anchors and their targets, and tags that are still open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.sources.append(given["src"] or "")
            self.alts.append(given["alt"] or "")
        if tag == "a":
            self.links.append(given["href"] or "")
        if "id" in given:
            self.ids.append(given["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_self_contained_whole_and_described(content: Evaluated, kind: str) -> None:
    html = PAGES[kind](content)
    parsed = Parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    assert parsed.open == []
    assert parsed.sources
    assert all(
        source.startswith(("data:image/svg+xml;base64,", "data:image/jpeg;base64,")) for source in parsed.sources
    )
    assert all(len(alt) > 20 for alt in parsed.alts)
    assert not re.search(r"url\(|@import|https?://", html)
    assert all(link[1:] in parsed.ids for link in parsed.links)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "Not a medical device." in html


@pytest.mark.parametrize("kind", PAGES)
def test_figures_inside_load_nothing_and_run_nothing(content: Evaluated, kind: str) -> None:
    for source in Parsed(PAGES[kind](content)).sources:
        data = base64.b64decode(source.split(",", 1)[1])
        if data.startswith(b"\xff\xd8"):
            continue
        assert b"<script" not in data
        assert all(link.startswith((b"#", b"data:image/png;base64,")) for link in re.findall(rb'href="([^"]*)"', data))


@pytest.mark.parametrize(("kind", "least"), [("evaluation", 8), ("training", 4), ("comparison", 4), ("night", 5)])
def test_hostile_text_is_escaped_everywhere(content: Evaluated, kind: str, least: int) -> None:
    html = PAGES[kind](content)
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= least


@pytest.mark.parametrize("part", ABSENT)
def test_absent_part_is_named_in_a_sentence(content: Evaluated, part: str) -> None:
    value, sentence = ABSENT[part]
    assert sentence not in page(evaluation_sections(content))
    assert sentence in page(evaluation_sections(replace(content, **{part: value})))


def test_pages_of_nothing_say_so() -> None:
    html = page(evaluation_sections(Evaluated()))
    assert all(sentence in html for part, (_, sentence) in ABSENT.items() if part != "failures")
    assert "There is no headline" in html
    assert Parsed(html).sources == []
    assert "no record" in page(training_sections(Trained()))
    bare = page(night_sections(Night({"run_key": "r", "scored": 0, "failed": 0})))
    assert "nothing was tried" in bare
    assert "no drift rows" in bare
    assert "This run has no predictions." in bare


def test_no_failures_is_told_from_no_record_of_them(content: Evaluated) -> None:
    html = page(evaluation_sections(replace(content, failures=failures().iloc[:0])))
    assert "No object has failed." in html
    assert "no record of failures" not in html


def test_failures_show_their_sentence_their_count_and_where_to_look(content: Evaluated) -> None:
    html = page(evaluation_sections(content))
    assert "The object ends before its pixels do." in html
    assert "A reason that this version does not know." in html
    assert "11, 12" in html
    assert "2 images of the split have no prediction" in html


def test_runs_show_their_counts(content: Evaluated) -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page(evaluation_sections(content)))
    start = cells.index("2026-01-02 03:04")
    assert cells[start + 1 : start + 7] == ["1,206", "6", "1,194", "6", "12.3", "97.2"]


def test_a_large_index_that_is_no_shift_is_explained() -> None:
    html = page(night_sections(night()))
    assert "one that chance reaches" not in html
    few = night()
    assert few.drift is not None
    calm = few.drift.assign(value=few.drift["value"].where(few.drift["metric"] != "drift_shifted", 0.0))
    html = page(night_sections(replace(few, drift=calm)))
    assert "No feature is marked as shifted. A PSI over 0.25 that is not marked is one that chance reaches" in html


def test_a_night_counts_its_objects_its_failures_and_what_shifted() -> None:
    html = page(night_sections(night()))
    assert "27.27% of 11 tried" in html
    assert "Shifted: kvp." in html
    assert "4 of 8" in html  # masks
    cells = [re.sub(r"<[^>]+>", "", row) for row in re.findall(r"<tr>.*?</tr>", html)]
    assert any(row.startswith("CT5") for row in cells)
    assert any(row.startswith("unknown3") for row in cells)
    assert any(row.startswith("kvp0.4100.300shifted") for row in cells)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (difference("accuracy", 0.1, 0.02, 0.2), "better"),
        (difference("accuracy", -0.1, -0.2, -0.02), "worse"),
        (difference("ece", -0.1, -0.2, -0.02), "better"),
        (difference("hd95_mm", 3.0, 1.0, 5.0), "worse"),
        (difference("false_positives_per_image", -0.1, -0.2, -0.1), "better"),
        (difference("dice", 0.1, -0.1, 0.2), "no clear difference"),
        (difference("dice", 0.1, 0.0, 0.2), "no clear difference"),
        (difference("dice", 0.0, None, None), "no clear difference"),
    ],
)
def test_a_difference_is_read_by_its_interval_and_by_what_is_better(row: dict[str, Any], said: str) -> None:
    assert verdict(row) == said


def test_a_comparison_says_what_was_left_out_and_how_often_one_alone_was_right() -> None:
    html = page(comparison_sections(compared()))
    assert "2 images of the split are left out" in html
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", html)]
    assert ["all", "images", "6", "1", "0.1250"] in cells


def test_a_training_says_that_its_figures_are_of_validation() -> None:
    html = page(training_sections(trained()))
    assert "validation split, which chose this model" in html
    assert "41.5 images per second after the first epoch, 1.0% of the time waiting" in html


def test_pictures_beyond_the_limit_are_left_out_and_counted() -> None:
    gallery = Gallery("Pictures", [example(str(number)) for number in range(20)])
    whole = page([Section("a", "A", [gallery])])
    small = page([Section("a", "A", [gallery])], max_megabytes=0.2)
    shown = len(Parsed(small).sources)
    assert len(Parsed(whole).sources) == 20
    assert 0 < shown < 20
    assert f"{20 - shown} more pictures were left out" in small
    assert len(small) < 0.2e6 + 12_000


def test_subgroups_are_drawn_and_their_tables_fold_away(content: Evaluated) -> None:
    assert content.metrics is not None
    groups = [metric("all", "accuracy", 0.8, subgroup="modality", subgroup_value=value) for value in ("CT", "MR")]
    html = page(evaluation_sections(replace(content, metrics=pd.concat([content.metrics, pd.DataFrame(groups)]))))
    assert "Tables by modality" in html
    assert "Accuracy by group: all images 0.90; modality: CT 0.80; modality: MR 0.80." in html


def test_headline_is_of_the_whole_test_split() -> None:
    rows = [
        metric("all", "accuracy", 0.5, split="val"),
        metric("all", "accuracy", 0.6, subgroup="CT"),
        metric("all", "accuracy", 0.7, ci_low=0.61, ci_high=0.78),
        metric("macro", "auroc", 0.8),
        metric("macro", "recall", 0.81),
        metric("macro", "f1", 0.82),
        metric("all", "dice", 0.9, n_images=40),
    ]
    basis, tiles = headline(pd.DataFrame(rows))
    assert basis == "test split of phantom"
    assert [tile.value for tile in tiles] == ["0.700", "0.800", "0.810", "0.900"]
    assert tiles[0].interval == "0.610 to 0.780"
    assert tiles[1].interval == ""
    assert tiles[3].basis == "no interval, 40 images of 10 patients"


def test_metric_tables_keep_groups_apart_and_leave_confusion_out(content: Evaluated) -> None:
    assert content.metrics is not None
    found = content.metrics[content.metrics["metric"] != "failed_images"]
    other = found.assign(subgroup="CT")
    tables = metric_tables(pd.concat([found, other], ignore_index=True))
    assert [table.title for table in tables] == [
        f"test split of phantom{group}: {part}"
        for group in ("", ", subgroup CT")
        for part in ("over all images", "by class", "masks")
    ]
    assert tables[0].rows == (("all images", "50", "10", (("0.900", "0.800 to 0.950"),)),)
    assert dict((row[0], row[3]) for row in tables[1].rows) == {
        HOSTILE: (("undefined", ""),),
        "cavity": (("0.750", "0.500 to 1.000"),),
    }
    assert tables[2].rows[0][3] == (("4", ""),)


def test_missing_columns_are_named(content: Evaluated) -> None:
    assert content.runs is not None
    with pytest.raises(ValueError, match="seconds"):
        evaluation_sections(replace(content, runs=content.runs.drop(columns="seconds")))


def job(bundle: Bundle, output: Path, **options: object) -> ReportJob:
    return build_job(ReportJob, {"output": str(output), "bundle": bundle.uri, **options}, "a test")


def test_what_there_is_decides_the_kind(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected an evaluation, a training or a run"):
        build_report(job(bundle, tmp_path))
    assert list(tmp_path.glob("reports/*")) == []
    history = json.dumps({"epoch": 1, "train_loss": 1.0, "val_loss": 1.0})
    storage.write_bytes(storage.join(str(tmp_path), "training", bundle.name, "metrics.jsonl"), history.encode())
    place = build_report(job(bundle, tmp_path))
    assert place.endswith(f"{bundle.model_id}-training.html")
    assert "Learning curves: 1 epochs" in Path(place).read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "night"}, "finished scoring run"),
        ({"run_key": "r-9"}, "r-9"),
        ({"baseline": "SAME"}, "medvision compare"),
    ],
)
def test_a_report_of_what_is_not_there_is_refused(
    bundle: Bundle, tmp_path: Path, options: dict[str, str], said: str
) -> None:
    given = {key: bundle.uri if value == "SAME" else value for key, value in options.items()}
    with pytest.raises(UsageError, match=said):
        build_report(job(bundle, tmp_path, **given))


@pytest.mark.parametrize(
    "options",
    [{"kind": "comparison"}, {"kind": "night", "baseline": "/b"}, {"kind": "training", "run_key": "r"}],
)
def test_options_of_another_kind_are_refused(bundle: Bundle, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        job(bundle, tmp_path, **options)


def test_the_comparison_that_was_written_is_reported(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = storage.join(
        str(tmp_path), "comparisons", f"{bundle.model_id}-against-{bundle.model_id}", "phantom-test.json"
    )
    storage.write_bytes(place, json.dumps(compared().comparisons[0]).encode())
    given = [f"output={tmp_path}", f"bundle={bundle.uri}", f"baseline={bundle.uri}"]
    assert main(["report", *[part for item in given for part in ("--set", item)], "--json"]) == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert "Only the model right" in Path(written).read_text()


# Guards, shortcuts and folds


def guarded(pairs: int = 2, told: bool = True, **leakage: Any) -> dict[str, Any]:
    examples = [{"rows": [3, 41], "splits": ["train", "test"], "distance": 7}] if pairs else []
    near = {"pairs": pairs, "compared": 900, "images": {"train": 1, "val": 0, "test": 2}, "examples": examples}
    return {
        "leakage": {
            "patients_in_two_splits": 0,
            "exact_copies_across_splits": 0,
            "exact_copies_within_a_split": {"train": 32, "val": 0, "test": 1},
            "near_duplicates": near,
            **leakage,
        },
        "shortcuts": {
            "told": told,
            "sentence": f"SHORTCUT: {HOSTILE} can be told",
            "classes": {"all": {HOSTILE: {"auroc": 0.71, "ci_low": 0.58, "ci_high": 0.82}}},
            "alike": ["format"],
        },
    }


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_what_the_guards_and_the_shortcut_probe_found_is_on_the_page(kind: str) -> None:
    guards = [(HOSTILE, guarded())]
    shown = (
        training_sections(Trained(guards=guards))
        if kind == "training"
        else evaluation_sections(Evaluated(guards=guards))
    )
    html = page(shown)
    for words in (
        "2 pairs of images in different splits look nearly the same: metrics on these images are too good",
        "train 32, test 1",
        "2 pairs (1 of train, 2 of test)",
        "3 and 41",
        "train and test",
        "AUROC of the shortcut probe",
        "0.71",
        "can be told",
        "Alike in all images, so they tell nothing: format.",
    ):
        assert words in html
    assert HOSTILE not in html


@pytest.mark.parametrize(
    ("trainings", "words"),
    [
        ([("m", {})], "did not record its guards"),
        ([], "did not record its guards"),
        ([("m", guarded(pairs=0))], "No two images of different splits look nearly the same"),
        ([("m", guarded(near_duplicates=None))], "were not looked for"),
        ([("m", {**guarded(), "shortcuts": None})], "the model tells no classes"),
    ],
)
def test_what_was_not_looked_at_is_said(trainings: list[Any], words: str) -> None:
    assert words in page([guards_section(trainings)])


def test_an_ensemble_shows_every_training_and_the_same_probe_once() -> None:
    section = guards_section([(f"fold-{number}", guarded(pairs=number)) for number in range(3)])
    html = page([section])
    assert all(f"fold-{number}" in html for number in range(3))
    assert html.count("can be told") == 1
    assert "3 pairs of images in different splits" in html


def folds_of(metrics: pd.DataFrame | None) -> Folds:
    rows = [
        {
            "fold": fold,
            "images": 1200,
            "patients": 9,
            "best_epoch": 3,
            "metrics": {"val_f1": 0.8 + fold / 100, "val_dice": None},
        }
        for fold in (1, 2)
    ]
    return Folds({"folds": rows, "mean": {"val_f1": 0.815}, "std": {"val_f1": 0.0071}}, metrics)


def test_folds_stand_side_by_side_and_together() -> None:
    pooled = pd.DataFrame([metric("all", "accuracy", 0.912, ci_low=0.88, ci_high=0.94, split="out_of_fold")])
    html = page([folds_section(folds_of(pooled))])
    for words in ("1,200", "0.810", "0.815", "± 0.007", "0.912", "0.880 to 0.940", "it is not measured here"):
        assert words in html
    assert "Dice" not in html  # no fold has it
    assert "are not recorded" in page([folds_section(folds_of(None))])


def test_an_evaluation_of_nothing_but_folds_says_what_it_measures() -> None:
    pooled = pd.DataFrame([metric("all", "accuracy", 0.9, split="out_of_fold")])
    assert "it is not measured here" in page(evaluation_sections(Evaluated(metrics=pooled)))
    assert "it is not measured here" not in page(evaluation_sections(Evaluated(metrics=pooled.assign(split="test"))))
