"""The report's page: self-contained, escaped, honest about what is absent."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from medvision_ray.reporting.overlays import Example
from medvision_ray.reporting.report import ReportContent, render
from medvision_ray.reporting.summary import METRIC_COLUMNS, headline, metric_tables

HOSTILE = "<script>alert('x')</script>"
CLASSES = ("cavity", HOSTILE)

ABSENT = {
    "model": ((), "There are no facts about the model."),
    "runs": (None, "This model has no finished run."),
    "metrics": (None, "This model has not been evaluated."),
    "history": (None, "There is no record of this model's training."),
    "labels": (None, "There are no labelled predictions to draw curves from."),
    "failures": (None, "There is no record of failures."),
    "examples": ((), "There are no example images."),
}


def metric(class_name: str, name: str, value: float | None, **other: object) -> dict[str, object]:
    row = dict.fromkeys(METRIC_COLUMNS) | {"subgroup": "all", "dataset": "phantom", "split": "test"}
    row |= {"class_name": class_name, "metric": name, "value": value, "n_images": 50, "n_patients": 10}
    return row | other


@pytest.fixture
def content() -> ReportContent:
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    probabilities = rng.dirichlet((1, 1), 20)
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 10:20] = True
    return ReportContent(
        title=HOSTILE,
        generated_at="2026-01-02 03:04 UTC",
        model=[("Name", HOSTILE)],
        classes=CLASSES,
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
        metrics=pd.DataFrame(
            [
                metric("all", "accuracy", 0.9, ci_low=0.8, ci_high=0.95),
                metric(HOSTILE, "recall", None),
                metric("cavity", "recall", 0.75, ci_low=0.5, ci_high=1.0),
                metric("cavity", f"confusion:{HOSTILE}", 3.0),
                metric("all", "missed_masks", 4.0),
            ]
        ),
        history=pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_loss": [1.1, 0.7]}),
        labels=labels,
        predicted=probabilities.argmax(axis=1),
        probabilities=probabilities,
        failures=pd.Series({"truncated": 2, HOSTILE: 1}),
        examples=[Example(np.zeros((40, 50), dtype=np.uint8), mask, None, HOSTILE)],
    )


class Page(HTMLParser):
    """Collects tags and every address that a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_is_self_contained(content: ReportContent) -> None:
    html = render(content)
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert len(page.sources) == 6
    assert all(source.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,")) for source in page.sources)
    assert not re.search(r"url\(|@import", html)


def test_figures_inside_load_nothing_and_run_nothing(content: ReportContent) -> None:
    for source in Page(render(content)).sources:
        data = base64.b64decode(source.split(",", 1)[1])
        if data.startswith(b"\x89PNG"):
            continue
        assert b"<script" not in data
        assert all(link.startswith((b"#", b"data:image/png;base64,")) for link in re.findall(rb'href="([^"]*)"', data))


def test_hostile_text_is_escaped_everywhere(content: ReportContent) -> None:
    html = render(content)
    assert "<script" not in html.lower()
    escaped = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"
    # Title twice, model, run, class, failure code, caption.
    assert html.count(escaped) == 7


@pytest.mark.parametrize("part", ABSENT)
def test_absent_part_is_named_in_a_sentence(content: ReportContent, part: str) -> None:
    value, sentence = ABSENT[part]
    assert sentence not in render(content)
    assert sentence in render(replace(content, **{part: value}))


def test_page_of_nothing_says_so_throughout() -> None:
    html = render(ReportContent(title="t", generated_at="now"))
    assert all(sentence in html for _, sentence in ABSENT.values())
    assert "There is no headline" in html
    assert Page(html).sources == []


def test_no_failures_is_told_from_no_record_of_them(content: ReportContent) -> None:
    html = render(replace(content, failures=pd.Series(dtype="int64")))
    assert "No object has failed." in html
    assert "no record of failures" not in html


def test_page_says_that_it_is_no_medical_device() -> None:
    assert "Not a medical device." in render(ReportContent(title="t", generated_at="now"))


def test_runs_show_their_counts(content: ReportContent) -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", render(content))
    start = cells.index("2026-01-02 03:04")
    assert cells[start + 1 : start + 7] == ["1,206", "6", "1,194", "6", "12.3", "97.2"]


def test_failure_codes_carry_their_sentences(content: ReportContent) -> None:
    html = render(content)
    assert "The object ends before its pixels do." in html
    assert "A reason that this version does not know." in html


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
    assert tiles[3].basis == "40 images of 10 patients"


def test_metric_tables_keep_groups_apart_and_leave_confusion_out(content: ReportContent) -> None:
    assert content.metrics is not None
    other = content.metrics.assign(subgroup="CT")
    tables = metric_tables(pd.concat([content.metrics, other], ignore_index=True))
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


def test_missing_columns_are_named(content: ReportContent) -> None:
    assert content.runs is not None
    with pytest.raises(ValueError, match="seconds"):
        render(replace(content, runs=content.runs.drop(columns="seconds")))
