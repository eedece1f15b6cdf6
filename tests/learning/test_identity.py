"""What a training is known by: hashes of earlier versions stay, and an option that is added changes none until it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medvision_ray.config import (
    AugmentConfig,
    ClaheConfig,
    LabelsConfig,
    PreprocessConfig,
    Section,
    TrainJob,
    build_job,
)
from medvision_ray.learning.identity import config_hash_of

TABLE = "image,label\na.png,a\n"
# Taken when trainings were known by the whole configuration (but `folds: 0`): those that began then must still resume.
EARLIER = {
    "f66c1044e23b1d657b8676aefa505773d9e027dddb29ba9d20547d0907d75f5e": {},
    "ed325ff1950798f0ed9e34fb4973911b73dd97986678403ca4ae2990fbd52f13": {"workers": 1, "epochs": 3},
    "b4e428e1e26bb0e5d7947ffd79e8d6a4fee07aecb0dd2877573b7e23e474e27b": {"folds": 5},
    "9a5951a5bc47d343d168e24bca7f7c8fedd625c8376800ba150943cdc6436c1a": {
        "preprocess": {"clahe": {"tiles": 4}},
        "loss": {"class_weights": [1, 2]},
        "model": {"weights": "w.safetensors"},
        "freeze_epochs": 1,
    },
    "7a52a1ec95eb7a7404509b34b01d2b442a47bc0f7b386fc8f3bd4a7c5c323044": {
        "labels": {"findings": ["x", "y"]},
        "operating_points": {"decide_at": "f1", "cost": [10, 1]},
    },
}


class _Mixing(Section):
    alpha: float = 0.4
    classes: tuple[str, ...] = ()


class _LaterClahe(ClaheConfig):
    passes: int = 1


class _LaterPreprocess(PreprocessConfig):
    sharpen: float = 0.0
    clahe: _LaterClahe | None = None


class _LaterAugment(AugmentConfig):
    mixing: _Mixing = _Mixing()


class _LaterLabels(LabelsConfig):
    weight_column: str | None = None


class _LaterJob(TrainJob):
    """The train job of a version to come, with an option more in every kind of place."""

    labels: _LaterLabels
    preprocess: _LaterPreprocess = _LaterPreprocess()
    augment: _LaterAugment = _LaterAugment()
    momentum: float = 0.9


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labels.csv").write_text(TABLE)
    monkeypatch.chdir(tmp_path)


def hash_of(options: dict[str, Any], model: type[TrainJob] = TrainJob) -> str:
    data = {"output": "o", **options, "labels": {"table": "labels.csv", **options.get("labels", {})}}
    return config_hash_of(build_job(model, data, "the test"))


@pytest.mark.parametrize("known", EARLIER, ids=range(len(EARLIER)))
def test_trainings_of_earlier_versions_are_known_by_the_same_hash(known: str) -> None:
    assert hash_of(EARLIER[known]) == known


@pytest.mark.parametrize("known", EARLIER, ids=range(len(EARLIER)))
def test_an_option_that_is_added_leaves_the_hash_while_it_is_at_its_default(known: str) -> None:
    assert hash_of(EARLIER[known], _LaterJob) == known


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.8},
        {"labels": {"weight_column": "w"}},
        {"preprocess": {"sharpen": 0.1}},
        {"preprocess": {"clahe": {"passes": 2}}},
        {"augment": {"mixing": {"alpha": 0.2}}},
        {"augment": {"mixing": {"classes": ["a"]}}},
    ],
)
def test_an_option_that_is_added_and_used_is_another_training(options: dict[str, Any]) -> None:
    plain = {"preprocess": {"clahe": {}}} if "clahe" in str(options) else {}
    found = {hash_of(options, _LaterJob), hash_of(plain, _LaterJob), *EARLIER}
    assert len(found) == len(EARLIER) + 1 + bool(plain)


def test_every_option_of_today_decides_but_those_that_only_look_or_say_where() -> None:
    plain = hash_of({})
    for options in (
        {"seed": 1},
        {"augment": {"noise": 0.1}},
        {"loss": {"focal_gamma": 3.0}},
        {"decode": {"reduced": True}},
    ):
        assert hash_of(options) != plain
    for options in (
        {"name": "other"}, {"output": "elsewhere"}, {"ray": {"num_cpus": 1}}, {"privacy": {"demo_key": True}},
        {"labels": {"near_duplicates": "off", "acquisition_columns": ["site"]}},
    ):  # fmt: skip
        assert hash_of(options) == plain
    Path("labels.csv").write_text(TABLE + "b.png,b\n")
    assert hash_of({}) != plain
