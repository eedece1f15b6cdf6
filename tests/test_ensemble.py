"""Ensembles: members copied in, votes as documented, one bundle to everything that takes bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle, image_digest, load_bundle, save_bundle
from medvision_ray.cli import main
from medvision_ray.config import ArchiveConfig, DecodeConfig, EvaluateJob, ModelConfig, PreprocessConfig, ScoringConfig
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.ensemble import MOST_MEMBERS, TIE_WEIGHT, save_ensemble
from medvision_ray.errors import BundleError, LabelError
from medvision_ray.evaluation.collect import _check
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.model import HybridOutput, build_model
from medvision_ray.privacy import Pseudonymiser
from medvision_ray.scoring.pipeline import CommittedRows
from medvision_ray.scoring.predictor import Prediction, Predictor
from medvision_ray.scoring.rows import decide, working_schema
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.voting import VotingNetwork
from medvision_ray.scoring.worker import ScoringWorker

CLASSES = ("cavity", "consolidation", "nodule")
ENCODERS = ("mobilenet_v2", "tu-resnet10t", "tu-mobilenetv3_small_050")
PREPROCESS = PreprocessConfig(size=(64, 64))
FLOAT32_TOLERANCE = 2e-6
"""Of probabilities: through logits and back in float32."""
Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bundle with random weights whose head is steep, so that members disagree."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("members")
    made: dict[str, Bundle] = {}

    def call(encoder: str = ENCODERS[1], seed: int = 0, **changes: Any) -> Bundle:
        key = repr((encoder, seed, sorted(changes.items())))
        if key not in made:
            made[key] = build(len(made) + 1, encoder, seed, **changes)
        return made[key]

    def build(number: int, encoder: str, seed: int, **changes: Any) -> Bundle:
        torch.manual_seed(seed)
        classes = changes.pop("classes", CLASSES)
        preprocess = changes.pop("preprocess", PREPROCESS)
        heads = changes.pop("heads", {})
        config = ModelConfig(encoder=encoder, decoder_channels=(16, 16, 8, 8, 8), **heads)
        model = build_model(config, preprocess, len(classes))
        if model.classification_head is not None:
            last = [layer for layer in model.classification_head.modules() if isinstance(layer, torch.nn.Linear)][-1]
            torch.nn.init.normal_(last.weight, std=6.0)
        fields: dict[str, Any] = {
            "name": f"member-{number}",
            "multi_label": False,
            "thresholds": (),
            "trained": {"image_digests": "plain"},
            "metrics": {"val_f1": 0.5},
            "train_digest": [f"{number:016x}", f"{99:016x}"],
            **changes,
        }
        return save_bundle(
            str(place / str(number)),
            architecture=config,
            preprocess=preprocess,
            classes=classes if config.classification else (),
            mask_threshold=0.5,
            model=model,
            **fields,
        )

    return call


@pytest.fixture(scope="module")
def three(make: Make) -> list[Bundle]:
    """Three encoders; the second normalises its input in its own way."""
    imagenet = PREPROCESS.model_copy(update={"mean": (0.449,), "std": (0.226,)})
    return [
        make(encoder, seed, preprocess=imagenet if seed == 1 else PREPROCESS) for seed, encoder in enumerate(ENCODERS)
    ]


@pytest.fixture(scope="module")
def frames() -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(3)
    smooth = rng.integers(0, 256, (24, 1, 8, 8)).repeat(8, 2).repeat(8, 3)
    return np.asarray(smooth, dtype=np.uint8)


def predict(bundle: Bundle, frames: Any) -> Prediction:
    return Predictor(bundle, "float32", "cpu").predict(frames)


def test_soft_vote_is_the_mean_of_what_the_members_predict(three: list[Bundle], frames: Any, tmp_path: Path) -> None:
    together = predict(save_ensemble(str(tmp_path / "e"), "e", "soft", three), frames[:4])
    each = [predict(member, frames[:4]) for member in three]
    np.testing.assert_allclose(
        together.probabilities, np.mean([one.probabilities for one in each], axis=0), atol=FLOAT32_TOLERANCE
    )
    np.testing.assert_allclose(together.masks, np.mean([one.masks for one in each], axis=0), atol=FLOAT32_TOLERANCE)


def test_majority_vote_is_the_share_of_votes_and_ties_go_to_the_larger_mean(
    three: list[Bundle], frames: Any, tmp_path: Path
) -> None:
    bundle = save_ensemble(str(tmp_path / "e"), "e", "majority", three)
    together = predict(bundle, frames)
    each = np.stack([predict(member, frames).probabilities for member in three])
    votes = np.stack([np.bincount(column, minlength=3) for column in each.argmax(axis=2).T])
    mean = each.mean(axis=0)
    found = together.probabilities
    assert found is not None
    assert np.abs(found - votes / 3).max() <= TIE_WEIGHT
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=FLOAT32_TOLERANCE)
    chosen = [CLASSES.index(str(decide(bundle, row)[0])) for row in found]
    expected = [max(range(3), key=lambda k: (votes[row][k], mean[row][k])) for row in range(len(frames))]
    assert chosen == expected
    tied = votes.max(axis=1) == 1
    assert tied.any()
    assert (votes.max(axis=1) == 2).any()  # ... and cases where a majority overrules somebody
    np.testing.assert_allclose(
        together.masks, np.mean([predict(member, frames).masks for member in three], axis=0), atol=FLOAT32_TOLERANCE
    )


class _Says(torch.nn.Module):
    """A member that gives these logits to whatever it is shown."""

    def __init__(self, logits: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.logits = torch.from_numpy(logits)

    def forward(self, x: torch.Tensor) -> HybridOutput:
        return HybridOutput(self.logits, None)


@pytest.mark.parametrize("vote", ["soft", "majority"])
def test_findings_are_voted_on_by_each_members_own_threshold(make: Make, tmp_path: Path, vote: Any) -> None:
    thresholds = np.array([[0.2, 0.5, 0.9], [0.7, 0.5, 0.4], [0.5, 0.1, 0.5], [0.5, 0.6, 0.5]], np.float32)
    members = [make(seed=seed, multi_label=True, thresholds=tuple(row.tolist())) for seed, row in enumerate(thresholds)]
    bundle = save_ensemble(str(tmp_path / "e"), "e", vote, members)
    logits = np.random.default_rng(5).normal(0, 2, (4, 500, 3)).astype(np.float32)
    network = VotingNetwork([_Says(one) for one in logits], vote, torch.from_numpy(thresholds))
    answer = network(torch.zeros(1)).logits
    assert answer is not None
    found = answer.sigmoid().numpy()
    each = 1 / (1 + np.exp(-logits.astype(np.float64)))
    mean, half = each.mean(axis=0), thresholds.mean(axis=0)
    votes = (each >= thresholds[:, None, :]).sum(axis=0)
    if vote == "soft":
        np.testing.assert_allclose(bundle.thresholds, half, atol=1e-7)
        np.testing.assert_allclose(found, mean, atol=FLOAT32_TOLERANCE)
    else:
        expected = (votes > 2) | ((votes == 2) & (mean >= half))
        assert (found >= np.array(bundle.thresholds, np.float32)).tolist() == expected.tolist()
        assert 0.1 < expected[votes == 2].mean() < 0.9  # ties go both ways
        assert np.abs(found - votes / 4).max() <= TIE_WEIGHT + FLOAT32_TOLERANCE


def test_offsets_of_members_are_averaged_by_a_soft_vote_and_decide_their_votes_in_a_majority(
    make: Make, frames: Any, tmp_path: Path
) -> None:
    offsets = np.array([[0.0, -20.0, -1.0], [-3.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    members = [make(seed=seed, class_offsets=tuple(row) if row.any() else ()) for seed, row in enumerate(offsets)]
    each = np.stack([predict(member, frames).probabilities for member in members]).astype(np.float64)
    soft = save_ensemble(str(tmp_path / "s"), "e", "soft", members)
    np.testing.assert_allclose(soft.class_offsets, offsets.mean(axis=0))
    mean = predict(soft, frames).probabilities
    assert mean is not None
    np.testing.assert_allclose(mean, each.mean(axis=0), atol=FLOAT32_TOLERANCE)
    named = [CLASSES.index(str(decide(soft, row)[0])) for row in mean]
    assert named == (np.log(mean) + offsets.mean(axis=0)).argmax(axis=1).tolist()
    assert named != mean.argmax(axis=1).tolist()
    assert [decide(soft, row)[1] for row in mean] == [row[k] for row, k in zip(mean, named, strict=True)]

    majority = save_ensemble(str(tmp_path / "m"), "e", "majority", members)
    assert majority.class_offsets == ()
    votes = (np.log(each.clip(1e-30)) + offsets[:, None, :]).argmax(axis=2)
    counted = np.stack([np.bincount(column, minlength=3) for column in votes.T])
    assert (votes != each.argmax(axis=2)).any()
    found = predict(majority, frames).probabilities
    assert found is not None
    assert np.abs(found - counted / 3).max() <= TIE_WEIGHT
    given = save_ensemble(str(tmp_path / "g"), "e", "soft", members, class_offsets=(), mask_threshold=0.3)
    assert (given.class_offsets, given.mask_threshold) == ((), 0.3)


def test_with_the_most_members_a_tie_break_never_outweighs_a_vote() -> None:
    logits = np.full((MOST_MEMBERS, 1, 2), 0.0, np.float32)
    logits[:17, 0, 0], logits[17:, 0, 1] = 1e-3, 50.0  # 17 lukewarm votes against 15 certain ones
    answer = VotingNetwork([_Says(one) for one in logits], "majority", None)(torch.zeros(1)).logits
    assert answer is not None
    assert answer.argmax().item() == 0


def test_each_head_is_averaged_over_the_members_that_have_it(make: Make, frames: Any, tmp_path: Path) -> None:
    both, labels, masks = (
        make(seed=1),
        make(seed=2, heads={"segmentation": False}),
        make(seed=3, heads={"classification": False}),
    )
    bundle = save_ensemble(str(tmp_path / "e"), "e", "soft", [masks, both, labels])
    assert (bundle.classes, bundle.architecture.classification, bundle.architecture.segmentation) == (
        CLASSES,
        True,
        True,
    )
    found = predict(bundle, frames[:4])
    for values, having in (("probabilities", (both, labels)), ("masks", (both, masks))):
        mean = np.mean([getattr(predict(one, frames[:4]), values) for one in having], axis=0)
        np.testing.assert_allclose(getattr(found, values), mean, atol=FLOAT32_TOLERANCE)


def test_normalisations_of_every_member_are_folded(three: list[Bundle], tmp_path: Path) -> None:
    predictor = Predictor(save_ensemble(str(tmp_path / "e"), "e", "soft", three), "float32", "cpu")
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in predictor._model.modules())


def test_an_ensemble_is_whole_without_its_members_places(make: Make, frames: Any, tmp_path: Path) -> None:
    members = [make(seed=seed) for seed in (11, 12)]  # of its own: they are deleted
    saved = save_ensemble(str(tmp_path / "e"), "e", "soft", members)
    expected = predict(saved, frames[:4])
    for member in members:
        shutil.rmtree(member.uri)
    moved = load_bundle(str(shutil.move(tmp_path / "e", tmp_path / "elsewhere")))
    assert moved.model_id == saved.model_id
    np.testing.assert_array_equal(predict(moved, frames[:4]).probabilities, expected.probabilities)


def test_the_model_id_hangs_on_members_and_vote_alone(three: list[Bundle], tmp_path: Path) -> None:
    def model_id(vote: Any, members: list[Bundle], **facts: Any) -> str:
        return save_ensemble(str(tmp_path / "e"), "e", vote, members, **facts).model_id

    first = model_id("soft", three)
    assert first == model_id("soft", three, facts={"when": "later"}, metrics={"val_f1": 1.0})
    assert len({first, model_id("majority", three), model_id("soft", three[:2])}) == 3


def test_train_images_are_those_of_all_members_and_leaks_are_found(three: list[Bundle], tmp_path: Path) -> None:
    table = LabelTable(
        ("/data/a.png",), (None,), CLASSES, False, np.array([0]), None, ("P1",), np.array(["test"], dtype=np.str_)
    )
    bundle = save_ensemble(str(tmp_path / "e"), "e", "soft", three)
    assert set(bundle.train_digest) == {digest for member in three for digest in member.train_digest}
    job = EvaluateJob.model_validate({"labels": {"table": "/data/labels.csv"}, "bundle": "b", "output": "o"})
    _check(job, bundle, table)
    copied = tmp_path / "seen"
    shutil.copytree(three[2].uri, copied)
    _train_on(copied, image_digest("/data/a.png"))
    leaking = save_ensemble(str(tmp_path / "f"), "f", "soft", [*three[:2], load_bundle(str(copied))])
    with pytest.raises(LabelError, match="1 of 1 in the test split were trained on"):
        _check(job, leaking, table)


def _train_on(folder: Path, digest: str) -> None:
    data = json.dumps([digest]).encode()
    (folder / "train_images.json").write_bytes(data)
    document = yaml.safe_load((folder / "bundle.yaml").read_text())
    document["files"]["train_images.json"] = hashlib.sha256(data).hexdigest()
    (folder / "bundle.yaml").write_text(yaml.safe_dump(document))


def test_keyed_digests_of_one_member_make_the_key_necessary(make: Make, tmp_path: Path) -> None:
    members = [make(seed=1), make(seed=2, trained={"image_digests": "hashed"})]
    assert save_ensemble(str(tmp_path / "e"), "e", "soft", members).trained["image_digests"] == "hashed"


def test_ensembles_among_the_members_are_taken_apart(make: Make, frames: Any, tmp_path: Path) -> None:
    members = [make(seed=seed) for seed in (1, 2, 3)]
    pair = save_ensemble(str(tmp_path / "pair"), "pair", "majority", members[:2])
    whole = save_ensemble(str(tmp_path / "whole"), "whole", "soft", [pair, members[2]])
    assert [member.content_hash for member in whole.members] == [member.content_hash for member in members]
    mean = np.mean([predict(member, frames[:4]).probabilities for member in members], axis=0)
    np.testing.assert_allclose(predict(whole, frames[:4]).probabilities, mean, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"preprocess": PreprocessConfig(size=(64, 64), denoise="median")},
            "`preprocess.denoise`.*none in .* and median",
        ),
        ({"preprocess": PreprocessConfig(size=(96, 64))}, "`preprocess.size`.*64, 64 in .* and 96, 64"),
        ({"classes": ("cavity", "nodule", "consolidation")}, "`classes`.*cavity, consolidation, nodule in"),
        ({"multi_label": True, "thresholds": (0.5, 0.5, 0.5)}, "`multi_label`.*False in .* and True in"),
    ],
)
def test_members_that_differ_are_refused_by_the_option(
    make: Make, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        save_ensemble(str(tmp_path / "e"), "e", "soft", [make(seed=1), make(seed=2, **changes)])
    assert not (tmp_path / "e").exists()


def test_one_member_a_repeated_one_and_a_place_inside_are_refused(make: Make, tmp_path: Path) -> None:
    one, two = make(seed=1), make(seed=2)
    for members, words in (([one], "2 to 32 bundles"), ([one, two, one], "given twice")):
        with pytest.raises(BundleError, match=words):
            save_ensemble(str(tmp_path / "e"), "e", "soft", members)
    for place in (one.uri, f"{two.uri}/ensemble", str(Path(one.uri).parent)):
        with pytest.raises(BundleError, match="lie in one another"):
            save_ensemble(place, "e", "soft", [one, two])
    load_bundle(one.uri)


@pytest.mark.parametrize("part", ["weights.safetensors", "bundle.yaml", "train_images.json"])
def test_an_altered_or_missing_member_is_refused(three: list[Bundle], tmp_path: Path, part: str) -> None:
    save_ensemble(str(tmp_path / "e"), "e", "soft", three)
    path = tmp_path / "e/members/1" / part
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(BundleError, match=f"{part}.*sha256 differs"):
        load_bundle(str(tmp_path / "e"))
    path.unlink()
    with pytest.raises(BundleError, match="lacks"):
        load_bundle(str(tmp_path / "e"))


def test_swapped_votes_and_members_are_refused(three: list[Bundle], tmp_path: Path) -> None:
    save_ensemble(str(tmp_path / "e"), "e", "soft", three)
    path = tmp_path / "e/bundle.yaml"
    document = yaml.safe_load(path.read_text())
    for changes, words in (
        ({"vote": "majority"}, "was altered"),
        ({"vote": "loudest"}, "vote: soft or majority"),
        ({"members": document["members"][::-1]}, "holds others"),
        ({"members": []}, "to name metrics.json"),
    ):
        path.write_text(yaml.safe_dump({**document, **changes}))
        with pytest.raises(BundleError, match=words):
            load_bundle(str(tmp_path / "e"))


def test_a_smaller_ensemble_leaves_nothing_of_the_one_before(three: list[Bundle], tmp_path: Path) -> None:
    save_ensemble(str(tmp_path / "e"), "e", "soft", three)
    assert len(save_ensemble(str(tmp_path / "e"), "e", "soft", three[:2]).members) == 2
    assert sorted(path.name for path in (tmp_path / "e/members").iterdir()) == ["0", "1"]


def test_asking_an_ensemble_for_one_network_is_refused(three: list[Bundle], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="ensemble of 3"):
        save_ensemble(str(tmp_path / "e"), "e", "soft", three).build_model()


def test_the_scoring_worker_takes_an_ensemble_as_any_bundle(
    three: list[Bundle], phantom: PhantomArchive, tmp_path: Path
) -> None:
    def rows(bundle: Bundle) -> list[dict[str, Any]]:
        folder = tmp_path / bundle.name
        config = ScoringConfig.model_validate({"precision": "float32"})
        ScoringWorker(WorkerSettings(bundle.uri, str(folder), config, DecodeConfig(), Pseudonymiser(b"k" * 32)))(block)
        table: pa.Table = CommittedRows(str(folder)).dataset(working_schema(bundle.classes)).to_table()
        return [row for row in table.to_pylist() if row["status"] == "scored"]

    block = list_archive(ArchiveConfig(uri=phantom.night_1)).objects.slice(0, 6)
    together = rows(save_ensemble(str(tmp_path / "e"), "e", "soft", three))
    each = [rows(member) for member in three]
    assert together
    for place, row in enumerate(together):
        for column in ("p_cavity", "p_consolidation", "p_nodule"):
            assert row[column] == pytest.approx(np.mean([one[place][column] for one in each]), abs=1e-5)
        assert row["mask_fraction"] is not None


def test_the_command_writes_an_ensemble_and_shows_it(
    three: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "e")
    command = ["bundle", "ensemble", "--output", place, "--name", "trio", "--vote", "majority", "--json"]
    assert main([*command, *[member.uri for member in three]]) == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert written["members"] == [member.model_id for member in three]
    assert main(["bundle", "show", place, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["model_id"], shown["vote"]) == (written["model_id"], "majority")
    assert shown["architecture"]["encoder"] == " + ".join(ENCODERS)
    assert main(["bundle", "ensemble", "--output", f"{place}2", "--name", "one", three[0].uri]) == 1


def test_an_ensemble_on_s3_is_the_same_model(three: list[Bundle], s3: str, tmp_path: Path) -> None:
    local = save_ensemble(str(tmp_path / "e"), "e", "soft", three[1:])
    assert load_bundle(save_ensemble(f"{s3}/e", "e", "soft", three[1:]).uri).model_id == local.model_id
