"""A trained model as a folder: weights, preprocessing, classes, thresholds, metrics, model card.

`bundle.yaml` is written last and names the sha256 of every file, so a half-written or altered folder is no bundle.
Importing this module imports neither torch nor the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from medvision_ray import storage
from medvision_ray.calibration import Calibration, read_calibration
from medvision_ray.config import ModelConfig, PreprocessConfig, Section, build_job
from medvision_ray.errors import BundleError, ConfigError, StorageError
from medvision_ray.model_card import model_card
from medvision_ray.operating_points import OperatingPoint, read_operating_points
from medvision_ray.privacy import Pseudonymiser

if TYPE_CHECKING:
    from medvision_ray.learning.model import HybridCNN

SCHEMA_VERSION = 1
_YAML, _WEIGHTS, _METRICS, _IMAGES, _CARD = (
    "bundle.yaml",
    "weights.safetensors",
    "metrics.json",
    "train_images.json",
    "MODEL_CARD.md",
)
# What changes predictions, and so the model_id; facts about the training do not.
_IDENTITY = (
    "architecture",
    "preprocess",
    "classes",
    "multi_label",
    "thresholds",
    "mask_threshold",
    "batch_norm_eps",
    "weights_sha256",
)
_KEYS = {"schema_version", "name", "model_id", *_IDENTITY, "files", "trained"}
# Part of the identity where they are there; bundles of earlier versions lack them and keep their model_id.
_OPTIONAL = ("calibration", "operating_points")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class Bundle:
    """A trained model, described; its weights are read by `build_model`.

    Attributes:
        uri: the folder or prefix.
        name: given name: letters, digits, `.`, `_`, `-`.
        architecture: the network; its initial weights are not part of it.
        preprocess: the way from stored values to the model's input.
        classes: names in the order of the logits; empty without a classification head.
        multi_label: classes are findings that may occur together (sigmoid), else one of them (softmax).
        thresholds: multi-label: probability from which a finding counts as present, one a class; else empty.
        mask_threshold: probability from which a pixel counts as lesion.
        batch_norm_eps: epsilon of the encoder's batch normalisations; None where they differ by design.
        weights_sha256: of `weights.safetensors`, in hexadecimal.
        content_hash: sha256 of all that changes predictions, in hexadecimal.
        calibration: from raw to calibrated probabilities; None where none was fitted.
        operating_points: thresholds on raw probabilities, chosen on validation; none where none were chosen.
        trained: facts of the training (label summary, versions, epochs, best score).
        metrics: validation metrics.
        train_digest: `image_digest` of each image that was trained on.
    """

    uri: str
    name: str
    architecture: ModelConfig
    preprocess: PreprocessConfig
    classes: tuple[str, ...]
    multi_label: bool
    thresholds: tuple[float, ...]
    mask_threshold: float
    batch_norm_eps: float | None
    weights_sha256: str
    content_hash: str
    calibration: Calibration | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    trained: dict[str, Any] = field(default_factory=dict, repr=False)
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    train_digest: tuple[str, ...] = field(default=(), repr=False)

    @property
    def model_id(self) -> str:
        """Name and content hash: another weight, threshold or preprocessing is another model."""
        return f"{self.name}-{self.content_hash[:12]}"

    def build_model(self) -> HybridCNN:
        """The network with its trained weights, on the CPU, in evaluation mode. Nothing else is read or fetched.

        Raises:
            BundleError: the weights are not the ones that the bundle names, or not of this architecture.
        """
        import safetensors.torch

        from medvision_ray.learning.model import build_model, set_batch_norm_eps

        data = _read(self.uri, _WEIGHTS, self.weights_sha256)
        try:
            model = build_model(self.architecture, self.preprocess, len(self.classes), for_training=False)
        except ConfigError as error:
            raise BundleError(f"The architecture of the bundle at {self.uri} cannot be built here: {error}") from None
        state = safetensors.torch.load(data)
        expected = {name: value.shape for name, value in model.state_dict().items()}
        wrong = sorted(
            name
            for name in expected.keys() | state.keys()
            if name not in state or name not in expected or expected[name] != state[name].shape
        )
        if wrong:
            raise BundleError(
                f"Expected the weights of `{self.architecture.encoder}` at {self.uri}, but {len(wrong)} tensors differ, "
                f"{wrong[0]} first. Use the library versions in the bundle's `trained` facts, or train again."
            )
        model.load_state_dict(state)
        if self.batch_norm_eps is not None:
            set_batch_norm_eps(model.encoder, self.batch_norm_eps)
        return model.eval()


def image_digest(uri: str, names: Pseudonymiser | None = None) -> str:
    """First 16 hexadecimal digits of the sha256 of an image's absolute address, or of its pseudonym from `names`."""
    place = storage.absolute(uri)
    return hashlib.sha256((names.address(place) if names else place).encode()).hexdigest()[:16]


def save_bundle(
    uri: str,
    *,
    name: str,
    architecture: ModelConfig,
    preprocess: PreprocessConfig,
    classes: Sequence[str],
    multi_label: bool,
    thresholds: Sequence[float],
    mask_threshold: float,
    trained: Mapping[str, Any],
    metrics: Mapping[str, Any],
    train_digest: Iterable[str],
    model: HybridCNN,
    calibration: Calibration | None = None,
    operating_points: Sequence[OperatingPoint] = (),
) -> Bundle:
    """Write a bundle. A bundle that is there already stops being one first, so nobody reads a mixture.

    Args:
        uri: folder or prefix, local or S3.
        thresholds: one a class where `multi_label`, else none.
        train_digest: `image_digest` of each training image.
        model: the bare trained network (the moving average where there is one).
        calibration: fitted to validation; None where there is none.
        operating_points: chosen on validation.

    Raises:
        BundleError: fields do not fit each other, or facts are not plain text, numbers, lists and mappings.
        StorageError: the place cannot be written.
    """
    import safetensors.torch

    from medvision_ray.learning.model import batch_norm_eps

    weights = safetensors.torch.save({key: value.cpu().contiguous() for key, value in model.state_dict().items()})
    identity: dict[str, Any] = {
        # Initial weights are a path on the training machine and have no meaning in the bundle.
        "architecture": architecture.model_copy(update={"weights": None, "allow_download": False}).model_dump(
            mode="json"
        ),
        "preprocess": preprocess.model_dump(mode="json"),
        "classes": list(classes),
        "multi_label": multi_label,
        "thresholds": [float(value) for value in thresholds],
        "mask_threshold": float(mask_threshold),
        "batch_norm_eps": batch_norm_eps(model.encoder),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if calibration is not None:
        identity["calibration"] = calibration.document()
    if operating_points:
        identity["operating_points"] = [point.document() for point in operating_points]
    parts = {_METRICS: _json(metrics, "metrics"), _IMAGES: _json(sorted(train_digest), "train_digest")}
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "model_id": f"{name}-{_content_hash(identity)[:12]}",
        **identity,
        "files": {part: hashlib.sha256(data).hexdigest() for part, data in parts.items()},
        "trained": json.loads(_json(trained, "trained")),
    }
    bundle = _bundle(storage.absolute(uri), document, parts)
    storage.delete_object(storage.join(uri, _YAML))
    figures = {key: value for key, value in json.loads(parts[_METRICS]).items() if not isinstance(value, dict)}
    card = model_card(document, figures, len(bundle.train_digest))
    for part, data in {_WEIGHTS: weights, **parts, _CARD: card.encode()}.items():
        storage.write_bytes(storage.join(uri, part), data)
    storage.write_bytes(storage.join(uri, _YAML), yaml.safe_dump(document, sort_keys=False, width=120).encode())
    return bundle


def load_bundle(uri: str) -> Bundle:
    """Read and verify a bundle: version, keys, and the sha256 of every file that matters.

    Raises:
        BundleError: there is no bundle, it is incomplete, altered, or of an unknown version.
        StorageError: the store cannot be reached.
    """
    place = storage.absolute(uri)
    document = _document(place)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"Expected a bundle of schema version {SCHEMA_VERSION} at {place}, but it is "
            f"{document.get('schema_version')!r}. Update medvision_ray, or use the version that wrote it."
        )
    for kind, keys in (("lacks", _KEYS - document.keys()), ("has unknown", document.keys() - _KEYS - {*_OPTIONAL})):
        if keys:
            raise BundleError(
                f"The {_YAML} at {place} {kind} {', '.join(sorted(str(key) for key in keys))}. Take the bundle as it was "
                "written; options are changed by training again, not by hand."
            )
    files = document["files"]
    if not isinstance(files, dict) or set(files) != {_METRICS, _IMAGES}:
        raise BundleError(f"Expected `files` of the {_YAML} at {place} to name {_METRICS} and {_IMAGES}.")
    parts = {part: _read(place, part, str(files[part])) for part in (_METRICS, _IMAGES)}
    _read(place, _WEIGHTS, str(document["weights_sha256"]))
    bundle = _bundle(place, document, parts)
    if document["model_id"] != bundle.model_id:
        raise BundleError(
            f"The {_YAML} at {place} was altered: its content hashes to {bundle.model_id}, but it names another model. "
            "Take the bundle as it was written."
        )
    return bundle


def _bundle(place: str, document: dict[str, Any], parts: Mapping[str, bytes]) -> Bundle:
    _check_fields(place, document)
    return Bundle(
        uri=place,
        name=document["name"],
        architecture=_section(place, "architecture", ModelConfig, document),
        preprocess=_section(place, "preprocess", PreprocessConfig, document),
        classes=tuple(document["classes"]),
        multi_label=document["multi_label"],
        thresholds=tuple(document["thresholds"]),
        mask_threshold=document["mask_threshold"],
        batch_norm_eps=document["batch_norm_eps"],
        weights_sha256=document["weights_sha256"],
        # Over what is written, not over the models: an option added later leaves old bundles' hashes alone.
        content_hash=_content_hash({key: document[key] for key in (*_IDENTITY, *_OPTIONAL) if key in document}),
        calibration=_calibration(document),
        operating_points=_operating_points(document) or (),
        trained=document["trained"],
        metrics=json.loads(parts[_METRICS]),
        train_digest=tuple(json.loads(parts[_IMAGES])),
    )


def _check_fields(place: str, document: dict[str, Any]) -> None:
    classes, thresholds, eps = document["classes"], document["thresholds"], document["batch_norm_eps"]
    needed = len(classes) if document["multi_label"] is True and isinstance(classes, list) else 0
    rules = {
        "name: letters, digits, '.', '_', '-', at most 64": isinstance(document["name"], str)
        and _NAME.fullmatch(document["name"]),
        "classes: a list of different names": isinstance(classes, list)
        and all(isinstance(item, str) and item for item in classes)
        and len(set(classes)) == len(classes),
        "multi_label: true or false": isinstance(document["multi_label"], bool),
        f"thresholds: {needed} probabilities (one a class where multi_label, else none)": isinstance(thresholds, list)
        and len(thresholds) == needed
        and all(_is_probability(value) for value in thresholds),
        "mask_threshold: a probability": _is_probability(document["mask_threshold"]),
        "batch_norm_eps: null or a number between 0 and 1": eps is None or (_is_probability(eps) and eps > 0),
        "trained: a mapping": isinstance(document["trained"], dict),
        "calibration: a temperature (single-label), or a sigmoid or null a class (multi_label)": "calibration"
        not in document
        or _calibration(document) is not None,
        "operating_points: different names, each with a threshold or null a class": "operating_points" not in document
        or _operating_points(document) is not None,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise BundleError(f"Expected these fields of the bundle at {place}, but got others: {'; '.join(broken)}.")


def _calibration(document: Mapping[str, Any]) -> Calibration | None:
    return read_calibration(document.get("calibration"), _n_classes(document), document["multi_label"] is True)


def _operating_points(document: Mapping[str, Any]) -> tuple[OperatingPoint, ...] | None:
    return read_operating_points(document.get("operating_points"), _n_classes(document))


def _n_classes(document: Mapping[str, Any]) -> int:
    return len(document["classes"]) if isinstance(document["classes"], list) else 0


def _is_probability(value: Any) -> bool:
    return isinstance(value, float) and 0.0 <= value <= 1.0


def _section(place: str, key: str, model: type[SectionT], document: dict[str, Any]) -> SectionT:
    try:
        return build_job(model, document[key], source=f"`{key}` of the bundle at {place}")
    except ConfigError as error:
        raise BundleError(f"{error} Use the version of medvision_ray that wrote the bundle.") from None


def _document(place: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(storage.read_bytes(storage.join(place, _YAML)))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise BundleError(
            f"Expected a bundle at {place}, but it has no {_YAML}. Give the folder that a finished training wrote."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not isinstance(document, dict):
        raise BundleError(f"Expected a YAML mapping in the {_YAML} at {place}, but it is none. Copy the bundle again.")
    return document


def _read(place: str, part: str, sha256: str) -> bytes:
    try:
        data = storage.read_bytes(storage.join(place, part))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise BundleError(f"The bundle at {place} lacks {part}. Copy it again, whole.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(
            f"The {part} of the bundle at {place} is not the one it was saved with (sha256 differs). Copy the bundle again."
        )
    return data


def _content_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json(value: Any, what: str) -> bytes:
    try:
        return json.dumps(_plain(value), indent=1, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise BundleError(
            f"Expected `{what}` to hold only text, numbers, lists and mappings, but it holds more."
        ) from None


def _plain(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
