"""Which model is current: a pointer that is moved by one put, moved back, and that jobs and servers follow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from medvision_ray import promotion
from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.cli import main
from medvision_ray.config import ModelConfig, ScoreJob, build_job
from medvision_ray.errors import BundleError, MedVisionError
from medvision_ray.promotion import current, moves, promote, resolve, resolved, rollback


def _bundle(uri: str, name: str, seed: int) -> Bundle:
    from medvision_ray.config import PreprocessConfig
    from medvision_ray.learning.model import build_model

    torch.manual_seed(seed)
    config = ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=(16, 16, 8, 8, 8))
    preprocess = PreprocessConfig(size=(32, 32))
    return save_bundle(
        uri,
        name=name,
        architecture=config,
        preprocess=preprocess,
        classes=("a", "b"),
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=build_model(config, preprocess, 2),
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return _bundle(str(folder / "old"), "old", 0), _bundle(str(folder / "new"), "new", 1)


def test_a_bundle_is_itself_and_a_pointer_names_the_promoted_one(two: tuple[Bundle, Bundle], store: str) -> None:
    old, new = two
    pointer = f"{store}/chest/current"
    assert resolve(old.uri) == old.uri
    with pytest.raises(BundleError, match="Expected a promoted bundle"):
        resolve(pointer)
    promote(old.uri, pointer)
    assert resolve(pointer + "/") == old.uri
    promote(new.uri, pointer)
    assert load_bundle(resolve(pointer)).model_id == new.model_id
    assert [(move.number, move.model_id, move.by) for move in moves(pointer)] == [
        (1, old.model_id, "promote"),
        (2, new.model_id, "promote"),
    ]


def test_a_rollback_goes_back_and_on_record_stays_what_was(two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    old, new = two
    pointer = str(tmp_path / "current")
    third = _bundle(str(tmp_path / "third"), "third", 2)
    for uri in (old.uri, new.uri, third.uri):
        promote(uri, pointer)
    assert rollback(pointer).model_id == new.model_id
    assert rollback(pointer).model_id == old.model_id
    with pytest.raises(BundleError, match="Expected a model before"):
        rollback(pointer)
    promote(third.uri, pointer)
    assert rollback(pointer).model_id == old.model_id
    assert [move.by for move in moves(pointer)] == ["promote"] * 3 + ["rollback"] * 2 + ["promote", "rollback"]
    assert resolve(pointer) == old.uri


def test_of_two_moves_at_once_one_wins_and_the_other_is_told(two: tuple[Bundle, Bundle], store: str) -> None:
    pointer = f"{store}/current"

    def move(bundle: Bundle) -> str:
        try:
            return promotion._move(pointer, [], bundle.uri, bundle.model_id, before=0, by="promote").model_id
        except MedVisionError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(move, two))
    assert sum("Somebody else moved" in answer for answer in answers) == 1
    assert current(pointer).model_id in answers
    assert len(moves(pointer)) == 1


def test_a_promoted_bundle_that_was_replaced_is_refused(two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    """A training writes to the same folder again: nobody has promoted that model."""
    pointer, place = str(tmp_path / "current"), str(tmp_path / "chest")
    _bundle(place, "chest", 3)
    promote(place, pointer)
    _bundle(place, "chest", 4)
    with pytest.raises(BundleError, match="Promote it, if it is meant"):
        resolve(pointer)
    promote(two[0].uri, pointer)
    with pytest.raises(BundleError, match="Promote the copy"):
        rollback(pointer)
    assert resolve(pointer) == two[0].uri


def test_what_is_no_bundle_or_no_pointer_is_not_promoted(two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.yaml"):
        promote(str(tmp_path), str(tmp_path / "current"))
    with pytest.raises(MedVisionError, match="Expected the address of a pointer"):
        promote(two[0].uri, str(tmp_path / "newest"))
    promote(two[0].uri, str(tmp_path / "current"))
    with pytest.raises(BundleError, match="nothing was moved"):
        promote(two[0].uri, str(tmp_path / "current"))
    assert len(moves(str(tmp_path / "current"))) == 1


def test_a_bundle_in_a_folder_called_current_is_a_bundle(tmp_path: Path) -> None:
    place = str(tmp_path / "current")
    bundle = _bundle(place, "chest", 0)
    assert resolve(place) == place
    with pytest.raises(MedVisionError, match="that is no bundle"):
        promote(bundle.uri, place)


def test_a_job_takes_the_bundle_that_is_current_when_it_begins(two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    pointer = str(tmp_path / "current")
    promote(two[0].uri, pointer)
    settings = {"archive": {"uri": str(tmp_path)}, "bundle": pointer, "output": str(tmp_path / "out")}
    job = resolved(build_job(ScoreJob, settings, "a test"))
    promote(two[1].uri, pointer)
    assert job.bundle == two[0].uri


def test_a_server_takes_over_what_is_promoted(two: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    from medvision_ray.config.serving import ServeJob
    from medvision_ray.serving.models import Models

    pointer = str(tmp_path / "current")
    promote(two[0].uri, pointer)
    models = Models(build_job(ServeJob, {"bundles": [pointer]}, "a test"))
    assert models.find(None).bundle.model_id == two[0].model_id
    assert models.refresh() == []
    promote(two[1].uri, pointer)
    assert models.refresh() == [two[1].model_id]
    rollback(pointer)
    assert models.refresh() == [two[0].model_id]


def test_the_command_line(two: tuple[Bundle, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pointer = str(tmp_path / "current")
    for bundle in two:
        assert main(["bundle", "promote", bundle.uri, "--to", pointer]) == 0
    assert main(["bundle", "rollback", pointer]) == 0
    capsys.readouterr()
    assert main(["bundle", "current", pointer]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2:4] for line in shown] == [
        ["promote", two[0].model_id],
        ["promote", two[1].model_id],
        ["rollback", two[0].model_id],
    ]
    assert main(["bundle", "show", pointer]) == 0
    assert two[0].model_id in capsys.readouterr().out
