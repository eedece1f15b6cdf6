"""Bundles: what is saved is what is loaded, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medvision_ray import storage
from medvision_ray.bundle import Bundle, image_digest, load_bundle, save_bundle
from medvision_ray.calibration import PlattScaling, TemperatureScaling
from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import BundleError
from medvision_ray.fingerprint import Fingerprint, reference_of_numbers
from medvision_ray.learning.model import HybridCNN, batch_norm_eps, build_model, set_batch_norm_eps
from medvision_ray.operating_points import ClassThreshold, OperatingPoint

ARCHITECTURE = ModelConfig(
    encoder="tu-resnet10t", decoder_channels=(16, 16, 8, 8, 8), weights="/machine/w.safetensors", allow_download=True
)
PREPROCESS = PreprocessConfig(size=(64, 64), mean=(0.3,), std=(0.2,))
FACTS: dict[str, Any] = {"epochs": 3, "versions": {"torch": "2.10"}, "best": float("nan"), "date": "2026-11-24"}
POINT = OperatingPoint("f1", "largest F1", (ClassThreshold(0.25, 0.9, 0.8, 9, 2, 1, 8, 20), None))
Save = Callable[..., Bundle]


@pytest.fixture(scope="module")
def model() -> HybridCNN:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    built = build_model(ARCHITECTURE, PREPROCESS, 2).eval()
    set_batch_norm_eps(built.encoder, 1e-3)
    return built


@pytest.fixture
def save(model: HybridCNN, tmp_path: Path) -> Save:
    def call(uri: str | None = None, **changes: Any) -> Bundle:
        fields: dict[str, Any] = {
            "name": "brain",
            "architecture": ARCHITECTURE,
            "preprocess": PREPROCESS,
            "classes": ("a", "b"),
            "multi_label": True,
            "thresholds": (0.4, 0.6),
            "mask_threshold": 0.5,
            "trained": FACTS,
            "metrics": {"auroc": 0.9},
            "train_digest": [image_digest("/data/2.png"), image_digest("/data/1.png")],
            "model": model,
        }
        return save_bundle(uri or str(tmp_path / "bundle"), **{**fields, **changes})

    return call


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "bundle.yaml"
    document = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not ...}))


def test_a_loaded_bundle_equals_the_saved_one_and_predicts_the_same(
    save: Save, model: HybridCNN, tmp_path: Path
) -> None:
    saved = save()
    loaded = load_bundle(str(tmp_path / "bundle"))
    assert loaded == saved
    assert loaded.metrics == {"auroc": 0.9}
    assert loaded.trained == {**FACTS, "best": None}
    x = torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)
    rebuilt = loaded.build_model()
    with torch.no_grad():
        expected, got = model(x), rebuilt(x)
    assert not rebuilt.training
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.mask_logits, expected.mask_logits)


def test_the_batch_norm_eps_survives(save: Save) -> None:
    bundle = save()
    assert bundle.batch_norm_eps == 1e-3
    assert batch_norm_eps(bundle.build_model().encoder) == 1e-3


def test_initial_weights_are_forgotten_so_that_nothing_is_fetched(save: Save, tmp_path: Path) -> None:
    bundle = save()
    assert (bundle.architecture.weights, bundle.architecture.allow_download) == (None, False)
    assert "/machine" not in "".join(path.read_text() for path in (tmp_path / "bundle").glob("*.[ymj]*"))
    assert "/machine" not in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_the_model_id_is_name_and_content(save: Save) -> None:
    first, again = save(), save(trained={"epochs": 99}, metrics={})
    assert first.model_id.startswith("brain-")
    assert len(first.model_id) == len("brain-") + 12
    assert first.model_id == again.model_id
    other = PREPROCESS.model_copy(update={"denoise": "median"})
    changed = [save(thresholds=(0.4, 0.7)), save(preprocess=other), save(classes=("b", "a"))]
    assert len({bundle.model_id for bundle in [first, *changed]}) == 4


def test_other_weights_are_another_model(save: Save) -> None:
    torch.manual_seed(1)
    other = build_model(ARCHITECTURE, PREPROCESS, 2)
    assert save().model_id != save(model=other).model_id


def test_train_images_are_kept_as_digests_of_absolute_addresses(save: Save) -> None:
    bundle = save()
    assert len(bundle.train_digest) == 2
    assert all(len(digest) == 16 for digest in bundle.train_digest)
    assert image_digest("file:///data/1.png") in bundle.train_digest
    assert image_digest("/data/3.png") not in bundle.train_digest


def test_the_model_card_has_the_facts_and_leaves_the_intended_use_to_the_owner(save: Save, tmp_path: Path) -> None:
    bundle = save()
    card = (tmp_path / "bundle/MODEL_CARD.md").read_text()
    for text in (bundle.model_id, "Not a medical device", "To be filled in by the owner", "a, b", "auroc: 0.9"):
        assert text in card


def test_a_calibration_is_saved_read_and_part_of_the_identity(save: Save, tmp_path: Path) -> None:
    plain = save()
    assert plain.calibration is None
    assert "calibration" not in yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())
    calibration = PlattScaling(((1.5, -0.25), None))
    saved = save(calibration=calibration)
    assert load_bundle(saved.uri).calibration == calibration
    assert saved.model_id != plain.model_id
    assert save(calibration=PlattScaling(((1.5, -0.5), None))).model_id != saved.model_id
    one = TemperatureScaling(1.5)
    assert load_bundle(save(multi_label=False, thresholds=(), calibration=one).uri).calibration == one


def test_operating_points_are_saved_read_and_part_of_the_identity(save: Save, tmp_path: Path) -> None:
    plain = save()
    assert plain.operating_points == ()
    assert "operating_points" not in yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())
    saved = save(operating_points=[POINT])
    assert load_bundle(saved.uri).operating_points == (POINT,)
    assert saved.model_id != plain.model_id
    with pytest.raises(BundleError, match="operating_points: different names"):
        save(operating_points=[POINT, POINT])


def test_class_offsets_are_saved_read_shown_and_part_of_the_identity(save: Save, tmp_path: Path) -> None:
    single: dict[str, Any] = {"multi_label": False, "thresholds": ()}
    plain = save(**single)
    assert plain.class_offsets == ()
    assert "class_offsets" not in yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())
    saved = save(**single, class_offsets=(-0.75, 0.0))
    assert load_bundle(saved.uri).class_offsets == (-0.75, 0.0)
    assert saved.model_id != plain.model_id
    assert "a -0.75, b +0" in (tmp_path / "bundle/MODEL_CARD.md").read_text()
    for wrong in ({"class_offsets": (0.5,)}, {"class_offsets": (0.5, float("inf"))}):
        with pytest.raises(BundleError, match="class_offsets: a number a class"):
            save(**single, **wrong)
    with pytest.raises(BundleError, match="class_offsets: a number a class"):
        save(class_offsets=(0.5, 0.5))  # findings have thresholds


def test_a_bundle_of_an_earlier_version_keeps_its_model_id(save: Save, tmp_path: Path) -> None:
    """The hash of that version, over its keys alone, by hand."""
    saved = save()
    document = yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())
    keys = "architecture preprocess classes multi_label thresholds mask_threshold batch_norm_eps weights_sha256"
    content = json.dumps({key: document[key] for key in keys.split()}, sort_keys=True, separators=(",", ":"))
    assert saved.model_id == f"brain-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def test_the_card_shows_figures_and_no_diagrams(save: Save, tmp_path: Path) -> None:
    saved = save(metrics={"val_ece": 0.125, "reliability": {"raw": {"all": [{"low": 0.0}]}}})
    assert saved.metrics["reliability"] == {"raw": {"all": [{"low": 0.0}]}}
    card = (tmp_path / "bundle/MODEL_CARD.md").read_text()
    assert "val_ece: 0.125" in card
    assert "reliability" not in card


def _fingerprint(value: float) -> Fingerprint:
    reference = reference_of_numbers([value, 2.0, 3.0], ["a", "b", "b"], "train")
    assert reference is not None
    return Fingerprint({"input_mean": reference})


def test_a_fingerprint_travels_along_without_making_another_model(save: Save, tmp_path: Path) -> None:
    plain = save()
    assert load_bundle(plain.uri).fingerprint is None  # as bundles of earlier versions
    marked = save(fingerprint=_fingerprint(1.0))
    assert marked.model_id == plain.model_id
    assert load_bundle(marked.uri).fingerprint == marked.fingerprint == _fingerprint(1.0)
    assert load_bundle(save().uri).fingerprint is None  # a file that is left over belongs to nothing


def test_a_fingerprint_that_was_altered_lost_or_is_of_a_later_version_is_refused(save: Save, tmp_path: Path) -> None:
    save(fingerprint=_fingerprint(1.0))
    path = tmp_path / "bundle/fingerprint.json"
    path.write_text(path.read_text().replace("2.0", "2.5"))
    with pytest.raises(BundleError, match="sha256 differs"):
        load_bundle(str(tmp_path / "bundle"))
    later = b'{"version": 99}'
    path.write_bytes(later)
    files = yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())["files"]
    edit(tmp_path / "bundle", files={**files, "fingerprint.json": hashlib.sha256(later).hexdigest()})
    with pytest.raises(BundleError, match="version that wrote"):
        load_bundle(str(tmp_path / "bundle"))
    path.unlink()
    with pytest.raises(BundleError, match=r"lacks fingerprint\.json"):
        load_bundle(str(tmp_path / "bundle"))


def test_bundle_yaml_is_written_last(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save()
    real, written = storage.write_bytes, []

    def write(uri: str, data: bytes) -> None:
        written.append(Path(uri).name)
        if len(written) == 3:
            raise KeyboardInterrupt  # the process dies half way
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        save(thresholds=(0.1, 0.1))
    monkeypatch.undo()
    assert "bundle.yaml" not in written
    with pytest.raises(BundleError, match=r"no bundle\.yaml"):
        load_bundle(str(tmp_path / "bundle"))
    save()
    load_bundle(str(tmp_path / "bundle"))


@pytest.mark.parametrize("part", ["weights.safetensors", "metrics.json", "train_images.json"])
def test_an_altered_or_missing_file_is_refused(save: Save, tmp_path: Path, part: str) -> None:
    save()
    path = tmp_path / "bundle" / part
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{part}.*sha256 differs"):
        load_bundle(str(path.parent))
    path.unlink()
    with pytest.raises(BundleError, match=f"lacks {part}"):
        load_bundle(str(path.parent))


def test_weights_altered_after_loading_are_refused(save: Save, tmp_path: Path) -> None:
    bundle = save()
    path = tmp_path / "bundle/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BundleError, match="sha256 differs"):
        bundle.build_model()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema version 1"),
        ({"thresholds": [0.4, 0.5]}, "was altered"),
        ({"name": "heart"}, "was altered"),
        ({"stage": "production"}, "has unknown stage"),
        ({"classes": ...}, "lacks classes"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"thresholds": [0.4]}, "thresholds: 2 probabilities"),
        ({"thresholds": [0.4, 1.5]}, "thresholds: 2 probabilities"),
        ({"multi_label": "yes"}, "multi_label: true or false"),
        ({"architecture": {"encodr": "resnet18"}}, "did you mean `encoder`"),
        ({"preprocess": {"size": [63, 64]}}, "multiples of 32"),
        ({"files": {}}, "to name metrics.json"),
        ({"calibration": None}, "calibration: a temperature"),
        ({"calibration": {"method": "temperature", "temperature": 2.0}}, "calibration: a temperature"),
        ({"calibration": {"method": "platt", "sigmoids": [[1.0, 0.0], None]}}, "was altered"),
        ({"operating_points": []}, "operating_points: different names"),
        ({"operating_points": [{"name": "f1", "rule": "", "thresholds": [None, None]}]}, "operating_points: different"),
        ({"operating_points": [POINT.document(), POINT.document()]}, "operating_points: different names"),
        ({"operating_points": [{**POINT.document(), "thresholds": [None]}]}, "operating_points: different names"),
        ({"operating_points": [{**POINT.document(), "thresholds": [{"threshold": 0.5}, None]}]}, "operating_points: "),
        ({"operating_points": [POINT.document()]}, "was altered"),
        ({"class_offsets": [0.0, 0.5]}, "class_offsets: a number a class"),
    ],
)
def test_an_edited_or_unknown_bundle_yaml_is_refused(
    save: Save, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save()
    edit(tmp_path / "bundle", **changes)
    with pytest.raises(BundleError, match=words):
        load_bundle(str(tmp_path / "bundle"))


@pytest.mark.parametrize("data", [b"a: [", b"\xff\xfe\x00", b"- 1"])
def test_a_bundle_yaml_that_is_no_mapping_is_refused(save: Save, tmp_path: Path, data: bytes) -> None:
    save()
    (tmp_path / "bundle/bundle.yaml").write_bytes(data)
    with pytest.raises(BundleError, match="YAML mapping"):
        load_bundle(str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name: letters"),
        ({"thresholds": (0.5,)}, "thresholds: 2"),
        ({"multi_label": False}, "thresholds: 0"),
        ({"trained": {"when": object()}}, "`trained`"),
    ],
)
def test_fields_that_do_not_fit_are_refused_before_anything_is_written(
    save: Save, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        save(**changes)
    assert not (tmp_path / "bundle").exists()


def test_weights_of_another_architecture_are_refused(save: Save) -> None:
    bundle = save(classes=("a", "b", "c"), thresholds=(0.5, 0.5, 0.5))
    with pytest.raises(BundleError, match="2 tensors differ, classification_head"):
        bundle.build_model()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a loopback S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    storage.s3_client().create_bucket(Bucket="models")
    yield "s3://models"
    server.stop()


def test_a_bundle_on_s3_is_saved_again_and_loaded(save: Save, bucket: str) -> None:
    save(f"{bucket}/bundles/brain", thresholds=(0.1, 0.1))
    saved = save(f"{bucket}/bundles/brain")
    loaded = load_bundle(f"{bucket}/bundles/brain/")
    assert loaded == saved
    loaded.build_model()


def test_the_files_are_plain_json_and_yaml(save: Save, tmp_path: Path) -> None:
    save()
    assert json.loads((tmp_path / "bundle/metrics.json").read_text()) == {"auroc": 0.9}
    document = yaml.safe_load((tmp_path / "bundle/bundle.yaml").read_text())
    assert document["schema_version"] == 1


def test_importing_the_module_imports_neither_torch_nor_ray() -> None:
    code = "import sys, medvision_ray.bundle; sys.exit(bool({'torch', 'ray', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
