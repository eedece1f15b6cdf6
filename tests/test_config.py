"""Configurations: what is refused and how, what overrides do, what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvision_ray.config import (
    JOBS,
    EvaluateJob,
    InventoryJob,
    ReportJob,
    ScoreJob,
    Section,
    TrainJob,
    build_job,
    load_job,
    show_job,
)
from medvision_ray.errors import ConfigError

REQUIRED: dict[str, dict[str, Any]] = {
    "inventory": {"archive": {"uri": "/a"}},
    "train": {"output": "/o", "labels": {"table": "/t.csv"}},
    "evaluate": {"output": "/o", "bundle": "/b", "labels": {"table": "/t.csv"}},
    "compare": {"output": "/o", "bundle": "/b", "baseline": "/c", "labels": {"table": "/t.csv"}},
    "calibrate": {"output": "/o", "bundle": "/b", "labels": {"table": "/t.csv"}},
    "score": {"output": "/o", "bundle": "/b", "archive": {"uri": "/a"}},
    "explain": {"output": "/o", "bundle": "/b", "images": ("/i.dcm",)},
    "report": {"output": "/o", "bundle": "/b"},
    "tune": {"train": {"output": "/o", "labels": {"table": "/t.csv"}}, "search": {"seed": {"choice": (1, 2)}}},
    "serve": {"bundles": ("/b",)},
}


def refusal(model: type[Section], data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_job(model, data, "here")
    return str(caught.value)


def train(**options: Any) -> dict[str, Any]:
    return {**REQUIRED["train"], **options}


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def sections(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """A model and every section below it, `X | None` included."""
    yield path, model
    for name, field in model.model_fields.items():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part, f"{path}{name}.")


OPTIONS = [
    (job, path + name, field)
    for job in JOBS
    for path, model in sections(JOBS[job])
    for name, field in model.model_fields.items()
]


@pytest.mark.parametrize(("job", "path", "field"), OPTIONS, ids=[f"{job}:{path}" for job, path, _ in OPTIONS])
def test_every_option_is_documented_on_one_line(job: str, path: str, field: Any) -> None:
    assert field.description
    assert field.description.strip().endswith(".")
    assert "\n" not in field.description


@pytest.mark.parametrize("job", JOBS)
def test_what_a_job_requires_is_enough(job: str) -> None:
    assert build_job(JOBS[job], REQUIRED[job], "here").model_dump(exclude_unset=True) == REQUIRED[job]


@pytest.mark.parametrize(
    ("data", "wrong", "right"),
    [
        (train(epoch=3), "epoch", "epochs"),
        (train(model={"decoder_chanels": [1]}), "model.decoder_chanels", "model.decoder_channels"),
        (train(preprocess={"clahe": {"clip_limt": 1.0}}), "preprocess.clahe.clip_limt", "preprocess.clahe.clip_limit"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(data: dict[str, Any], wrong: str, right: str) -> None:
    assert f"`{wrong}` is not an option; did you mean `{right}`?" in refusal(TrainJob, data)


def test_an_unknown_key_near_to_none_lists_the_known_ones() -> None:
    message = refusal(TrainJob, train(preprocess={"clahe": {"zzz": 1}}))
    assert "`preprocess.clahe.zzz` is not an option; known here: clip_limit, tiles." in message


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"epochs": "ten"}, '`epochs`: expected a whole number, but got "ten".'),
        ({"epochs": 2.5}, "`epochs`: expected a whole number, but got 2.5."),
        ({"epochs": True}, "`epochs`: expected a whole number, but got true."),
        ({"epochs": 0}, "`epochs`: expected greater than 0, but got 0."),
        ({"output": 5}, "`output`: expected text, but got 5."),
        ({"learning_rate": "fast"}, '`learning_rate`: expected a number, but got "fast".'),
        ({"model": {"segmentation": "yes"}}, '`model.segmentation`: expected true or false, but got "yes".'),
        ({"model": {"dropout": 1.5}}, "`model.dropout`: expected less than or equal to 1, but got 1.5."),
        ({"model": 3}, "`model`: expected a mapping of options, but got 3."),
        ({"model": {"decoder_channels": 8}}, "`model.decoder_channels`: expected a list, but got 8."),
        (
            {"model": {"decoder_channels": [8, "x"]}},
            '`model.decoder_channels.1`: expected a whole number, but got "x".',
        ),
        ({"precision": "fp8"}, "`precision`: expected 'auto', 'bf16' or 'float32', but got \"fp8\"."),
        ({"use_gpu": 3}, "`use_gpu`: expected true or false or 'auto', but got 3."),
        (
            {"loss": {"class_weights": "x"}},
            "`loss.class_weights`: expected 'none' or 'balanced' or a list, but got \"x\".",
        ),
        ({"preprocess": {"size": [32, 32, 32]}}, "`preprocess.size`: expected at most 2 values, but got [32, 32, 32]."),
        ({"preprocess": {"size": [32]}}, "`preprocess.size.1` is required, but was not given."),
        ({"labels": {}}, "`labels.table` is required, but was not given."),
    ],
)
def test_a_wrong_value_is_refused_with_key_expectation_and_value(options: dict[str, Any], line: str) -> None:
    message = refusal(TrainJob, train(**options))
    assert message == f"The configuration from here is refused:\n  - {line}"


def test_every_wrong_option_is_told_at_once() -> None:
    message = refusal(TrainJob, train(epochs="x", sed=1, model={"dropout": -1}))
    assert message.count("\n  - ") == 3


def test_a_long_value_is_cut() -> None:
    assert len(refusal(TrainJob, train(epochs="x" * 10_000))) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
def test_a_value_without_meaning_in_a_configuration_is_refused(value: object) -> None:
    assert "no text, finite number, list or mapping" in refusal(TrainJob, train(learning_rate=value))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freeze_epochs": 20, "model": {"weights": "/w"}}, "`freeze_epochs` (20) must be below `epochs` (20)"),
        ({"freeze_epochs": 1}, "randomly initialised encoder"),
        ({"preprocess": {"color": "rgb"}}, "needs `model.in_channels: 3`"),
        (
            {"preprocess": {"slices": 5}, "model": {"in_channels": 3}},
            "`preprocess.slices: 5` needs `model.in_channels: 5`",
        ),
        ({"preprocess": {"slices": 3, "color": "rgb"}, "model": {"in_channels": 3}}, "needs `color: grey`"),
        (
            {"labels": {"table": "t", "findings": ["a"]}, "loss": {"label_smoothing": 0.1}},
            "can't go with `labels.findings`",
        ),
        ({"model": {"classification": False, "segmentation": False}}, "`model`: at least one of"),
        ({"model": {"weights": "imagenet"}}, "`model`: `weights: imagenet` downloads"),
        ({"preprocess": {"size": [224, 225]}}, "`preprocess`: `size` must be multiples of 32"),
        ({"preprocess": {"mean": [0.5, 0.5]}}, "`preprocess`: `mean` and `std` must have the same length, 1 or 1"),
        (
            {"preprocess": {"color": "rgb", "mean": [0.5, 0.5], "std": [1.0, 1.0]}, "model": {"in_channels": 3}},
            "the same length, 1 or 3 with color=rgb",
        ),
        ({"ray": {"address": "auto", "num_cpus": 2}}, "`ray`: `num_cpus` and `object_store_bytes` belong"),
        ({"ray": {"address": "auto", "object_store_bytes": 1}}, "`ray`: `num_cpus` and `object_store_bytes` belong"),
        (
            {"labels": {"table": "t", "fractions": [0.7, 0.2, 0.2]}},
            "`labels`: `fractions` must sum to 1, but they sum to 1.1",
        ),
    ],
)
def test_options_that_cannot_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    assert told in refusal(TrainJob, train(**options))


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/5000", "-1/3", "1/3/4", "a/b", ""])
def test_a_part_that_there_is_none_of_is_refused(part: str) -> None:
    assert "`part` must be which of how many" in refusal(InventoryJob, {"archive": {"uri": "/a", "part": part}})


def test_a_part_of_volumes_is_refused() -> None:
    archive = {"uri": "/a", "part": "1/3", "volumes": True}
    assert "`part` can't go with `volumes`" in refusal(InventoryJob, {"archive": archive})


@pytest.mark.parametrize("half", [{"bundle": "/b"}, {"output": "/o"}])
def test_an_inventory_needs_both_or_neither_of_bundle_and_output(half: dict[str, str]) -> None:
    assert "`bundle` and `output` go together" in refusal(InventoryJob, {**REQUIRED["inventory"], **half})


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_epochs": 19, "model": {"weights": "/w"}},
        {"preprocess": {"color": "rgb", "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}, "model": {"in_channels": 3}},
        {"preprocess": {"slices": 5, "mean": [0.5], "std": [0.5]}, "model": {"in_channels": 5}},
        {"model": {"weights": "imagenet", "allow_download": True}},
        {"labels": {"table": "t", "fractions": [0.1, 0.2, 0.7]}},
    ],
)
def test_their_possible_neighbours_are_taken(options: dict[str, Any]) -> None:
    assert build_job(TrainJob, train(**options), "here").model_dump(mode="json", exclude_unset=True) == train(**options)


def test_set_wins_over_the_file_and_reaches_nested_and_list_values(tmp_path: Path) -> None:
    path = written(tmp_path, "output: /o\nepochs: 5\nlabels: {table: /t, classes: [x]}\nmodel: {dropout: 0.1}\n")
    overrides = ["epochs=7", "labels.classes=[a, b]", "preprocess.clahe.tiles=4", "preprocess.size=[64, 96]"]
    job = load_job(TrainJob, path, overrides)
    assert job.epochs == 7
    assert job.labels.classes == ("a", "b")
    assert job.labels.table == "/t"
    assert job.model.dropout == 0.1
    assert job.preprocess.size == (64, 96)
    assert job.preprocess.clahe is not None
    assert job.preprocess.clahe.tiles == 4


def test_the_last_set_wins_and_may_turn_a_section_off() -> None:
    overrides = ["output=/o", "bundle=/b", "examples=1", "examples=2"]
    assert load_job(ReportJob, None, overrides).examples == 2
    clahe = ["output=/o", "labels.table=/t", "preprocess.clahe.tiles=4", "preprocess.clahe=null"]
    assert load_job(TrainJob, None, clahe).preprocess.clahe is None


def test_a_set_value_may_hold_the_equals_sign() -> None:
    assert load_job(ReportJob, None, ["output=/o", "bundle=/b", "title=a=b"]).title == "a=b"


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("epochs", "Expected --set KEY.PATH=VALUE, but got 'epochs'"),
        ("=3", "Expected --set KEY.PATH=VALUE"),
        ("epochs.x=3", "`epochs` is 5 and has no options below it"),
        ("epochs=[1", "to be YAML, but got '[1'"),
        ("epoch=3", "did you mean `epochs`?"),
    ],
)
def test_a_wrong_set_is_refused(item: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_job(TrainJob, None, ["output=/o", "labels.table=/t", "epochs=5", item])


def test_a_date_stays_text(tmp_path: Path) -> None:
    path = written(tmp_path, "output: /o\nbundle: /b\ntitle: 2026-11-24\n")
    assert load_job(ReportJob, path).title == "2026-11-24"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".1e-2", "+1.e-3"])
def test_a_number_with_an_exponent_is_a_number(text: str) -> None:
    job = load_job(TrainJob, None, ["output=/o", "labels.table=/t", f"learning_rate={text}"])
    assert job.learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["1e", "e3", "1e-3x", "a1e3"])
def test_text_that_resembles_an_exponent_stays_text(text: str) -> None:
    assert load_job(ReportJob, None, ["output=/o", "bundle=/b", f"title={text}"]).title == text


def test_bad_yaml_names_file_line_and_column(tmp_path: Path) -> None:
    path = written(tmp_path, "output: /o\nlabels: {table: [x\nepochs: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_job(TrainJob, path)
    with pytest.raises(yaml.MarkedYAMLError) as reference:
        yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    mark = reference.value.problem_mark
    assert mark is not None
    assert f"Expected YAML in {path}, but it cannot be parsed at line {mark.line + 1}, column {mark.column + 1}" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- 1\n- 2\n", "Expected a mapping of options"),
        (b"title: \xff\n", "Expected UTF-8 text"),
        (b"title: \x00\n", "cannot be parsed"),
        (b"examples: 0x_\n", "cannot be parsed"),
        (b"title: !!python/object/apply:os.getcwd []\n", "cannot be parsed at line 1"),
        (b"title: &a [*a]\n", "no text, finite number"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_job(ReportJob, str(tmp_path / "job.yaml"))


def test_a_missing_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml, but No such file"):
        load_job(ReportJob, str(tmp_path / "absent.yaml"))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_job(ReportJob, written(tmp_path, ""), ["output=/o", "bundle=/b"]).examples == 12


def test_a_job_cannot_be_changed() -> None:
    job = build_job(ReportJob, REQUIRED["report"], "here")
    with pytest.raises(ValueError, match="frozen"):
        job.title = "x"  # type: ignore[misc]


@pytest.mark.parametrize("job", JOBS)
def test_show_prints_every_option_under_its_documentation(job: str) -> None:
    lines = show_job(JOBS[job]).splitlines()
    shown = [(lines[i - 1].strip(" #"), line.strip(" #").split(":")[0]) for i, line in enumerate(lines)]
    expected = [(field.description.strip(" #"), path.split(".")[-1]) for name, path, field in OPTIONS if name == job]
    assert expected
    for option in expected:
        assert shown.count(option) >= expected.count(option), option


@pytest.mark.parametrize("job", JOBS)
def test_the_shown_template_with_required_keys_filled_in_is_the_default_job(tmp_path: Path, job: str) -> None:
    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}: {json.dumps(values[match[2]])}"

    def inside(section: dict[str, Any]) -> dict[str, Any]:
        below = [inside(value) for value in section.values() if isinstance(value, dict)]
        return {key: value for part in [*below, section] for key, value in part.items()}

    values = inside(REQUIRED[job])

    template = re.sub(r"^( *)# (\w+): \(required\)$", fill, show_job(JOBS[job]), flags=re.MULTILINE)
    assert "(required)" not in template
    assert load_job(JOBS[job], written(tmp_path, template)) == build_job(JOBS[job], REQUIRED[job], "here")


SHOWN = [
    (
        TrainJob,
        train(
            learning_rate=1e-5,
            epochs=3,
            name="a.b-1",
            model={"weights": "/w: # c\nx"},
            labels={"table": "Müller.csv", "classes": ["no", "1", "null", "a\nb"]},
            preprocess={"clahe": {"tiles": 3}, "ct_window_hu": None},
            loss={"class_weights": [1.0, 2.5]},
        ),
    ),
    (ScoreJob, {**REQUIRED["score"], "run_key": "2026-11-24", "archive": {"uri": "s3://b/a b", "exclude": []}}),
    (EvaluateJob, {**REQUIRED["evaluate"], "dataset": "a: b # c", "ray": {"address": "host:6379"}}),
]


@pytest.mark.parametrize(("model", "data"), SHOWN)
def test_what_is_shown_of_a_job_loads_as_the_same_job(
    tmp_path: Path, model: type[Section], data: dict[str, Any]
) -> None:
    job = build_job(model, data, "here")
    assert load_job(model, written(tmp_path, show_job(model, job))) == job


def test_elastic_workers_are_the_fewest_and_the_most() -> None:
    fixed, elastic = build_job(TrainJob, train(), "here"), build_job(TrainJob, train(workers=[1, 4]), "here")
    assert (fixed.fewest_workers, fixed.most_workers) == (2, 2)
    assert (elastic.workers, elastic.fewest_workers, elastic.most_workers) == ((1, 4), 1, 4)
    assert "the fewest and the most" in refusal(TrainJob, train(workers=[3, 2]))
    assert "fixed number" in refusal(TrainJob, train(workers=[1, 2], folds=3))
    for wrong in ([0, 2], [1], [1, 2, 3], 0, "many"):
        assert "workers" in refusal(TrainJob, train(workers=wrong))
