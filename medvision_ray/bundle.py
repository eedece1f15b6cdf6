"""A trained model as a folder: weights, preprocessing, classes, thresholds, metrics, model card.

`bundle.yaml` is written last and names the sha256 of every file, so a half-written or altered folder is no bundle.
Importing this module imports neither torch nor the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from medvision_ray import storage
from medvision_ray.bundle_fields import Vote, calibration_of, check_fields, member_files, operating_points_of
from medvision_ray.bundle_files import BUNDLE_YAML, identity_hash, json_bytes, read_document, read_part
from medvision_ray.calibration import Calibration
from medvision_ray.config import ModelConfig, PreprocessConfig, Section, build_job
from medvision_ray.errors import BundleError, ConfigError
from medvision_ray.fingerprint import Fingerprint
from medvision_ray.model_card import model_card
from medvision_ray.operating_points import OperatingPoint
from medvision_ray.privacy import Pseudonymiser

if TYPE_CHECKING:
    from medvision_ray.learning.model import HybridCNN

SCHEMA_VERSION = 1
_WEIGHTS, _METRICS, _IMAGES, _CARD = (
    "weights.safetensors",
    "metrics.json",
    "train_images.json",
    "MODEL_CARD.md",
)
_FINGERPRINT = "fingerprint.json"  # bundles of earlier versions have none
_FITTED = "fitted_images.json"  # of bundles that `medvision calibrate` wrote
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
OPTIONAL = ("calibration", "operating_points", "class_offsets")
"""Part of the identity where they are there; bundles of earlier versions lack them and keep their model_id."""
_ENSEMBLE = ("vote", "members")  # of an ensemble's identity; other bundles have neither
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
        class_offsets: single-label: added to each class's ln p before the largest is named; empty names the likeliest.
        trained: facts of the training (label summary, versions, epochs, best score).
        metrics: validation metrics.
        train_digest: `image_digest` of each image that was trained on.
        vote: how an ensemble's members are combined (`ensemble.py`); None for a single model.
        members: the bundles of an ensemble, which lie inside it; empty for a single model.
        fingerprint: distributions that scored images are held against; None in bundles of earlier versions.
        fitted_digest: `image_digest` of each image that chose the epoch or that something was fitted to; none in bundles of
            earlier versions but what `medvision calibrate` added.
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
    class_offsets: tuple[float, ...] = ()
    trained: dict[str, Any] = field(default_factory=dict, repr=False)
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    train_digest: tuple[str, ...] = field(default=(), repr=False)
    vote: Vote | None = None
    members: tuple[Bundle, ...] = field(default=(), repr=False)
    fingerprint: Fingerprint | None = field(default=None, repr=False)
    fitted_digest: tuple[str, ...] = field(default=(), repr=False)

    @property
    def model_id(self) -> str:
        """Name and content hash: another weight, threshold or preprocessing is another model."""
        return f"{self.name}-{self.content_hash[:12]}"

    def build_model(self) -> HybridCNN:
        """The network with its trained weights, on the CPU, in evaluation mode. Nothing else is read or fetched.

        Raises:
            BundleError: the weights are not the ones that the bundle names, or not of this architecture; or this is an
                ensemble, whose `members` are networks (`scoring.voting` makes them one).
        """
        import safetensors.torch

        from medvision_ray.learning.model import build_model, set_batch_norm_eps

        if self.members:
            raise BundleError(
                f"Expected a bundle of one network, but {self.model_id} is an ensemble of {len(self.members)}. Take one of "
                f"them, such as {self.members[0].uri}."
            )
        data = read_part(self.uri, _WEIGHTS, self.weights_sha256)
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
    class_offsets: Sequence[float] = (),
    fingerprint: Fingerprint | None = None,
    fitted_digest: Iterable[str] = (),
) -> Bundle:
    """Write a bundle. A bundle that is there already stops being one first, so nobody reads a mixture.

    Args:
        uri: folder or prefix, local or S3.
        thresholds: one a class where `multi_label`, else none.
        train_digest: `image_digest` of each training image.
        model: the bare trained network (the moving average where there is one).
        calibration: fitted to validation; None where there is none.
        operating_points: chosen on validation.
        class_offsets: chosen on validation, one a class where single-label; none names the likeliest class.
        fingerprint: of the training images and validation scores; no part of the identity.
        fitted_digest: `image_digest` of each validation image.

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
    if class_offsets:
        identity["class_offsets"] = [float(value) for value in class_offsets]
    return write_bundle(
        uri,
        name,
        identity,
        trained=trained,
        metrics=metrics,
        train_digest=train_digest,
        files=[(_WEIGHTS, weights)],
        fingerprint=fingerprint,
        fitted_digest=fitted_digest,
    )


def write_bundle(
    uri: str,
    name: str,
    identity: Mapping[str, Any],
    *,
    trained: Mapping[str, Any],
    metrics: Mapping[str, Any],
    train_digest: Iterable[str],
    files: Iterable[tuple[str, bytes]],
    members: Sequence[Bundle] = (),
    hashes: Mapping[str, str] | None = None,
    fingerprint: Fingerprint | None = None,
    fitted_digest: Iterable[str] = (),
    owners: Mapping[str, str] | None = None,
) -> Bundle:
    """Write a bundle of a known identity: of `save_bundle`, `ensemble.save_ensemble` and `bundle_decisions`.

    Args:
        identity: what changes predictions, as in bundle.yaml.
        files: path in the bundle and content of what belongs to it besides.
        members: of an ensemble, where they are now.
        hashes: sha256 of files that bundle.yaml names besides, by path.
        fingerprint: of the training images and validation scores.
        fitted_digest: `image_digest` of each image that chose the epoch or that something was fitted to.
        owners: what the owner has written into the model card.

    Raises:
        BundleError: fields do not fit each other, or facts are not plain text, numbers, lists and mappings.
        StorageError: the place cannot be written.
    """
    parts = {_METRICS: json_bytes(metrics, "metrics"), _IMAGES: json_bytes(sorted(train_digest), "train_digest")}
    if fingerprint is not None:
        parts[_FINGERPRINT] = json_bytes(fingerprint.as_json(), "fingerprint")
    if fitted := sorted(fitted_digest):
        parts[_FITTED] = json_bytes(fitted, "fitted_digest")
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "model_id": f"{name}-{identity_hash(identity)[:12]}",
        **identity,
        "files": {part: hashlib.sha256(data).hexdigest() for part, data in parts.items()} | dict(hashes or {}),
        "trained": json.loads(json_bytes(trained, "trained")),
    }
    bundle = _bundle(storage.absolute(uri), document, parts, tuple(members))
    storage.delete_object(storage.join(uri, BUNDLE_YAML))
    card = model_card(
        document,
        bundle.metrics,
        len(bundle.train_digest),
        fingerprint=fingerprint,
        owners=owners,
        members=bundle.members,
    )
    for part, data in chain(files, parts.items(), [(_CARD, card.encode())]):
        storage.write_bytes(storage.join(uri, part), data)
    storage.write_bytes(storage.join(uri, BUNDLE_YAML), yaml.safe_dump(document, sort_keys=False, width=120).encode())
    return bundle


def load_bundle(uri: str) -> Bundle:
    """Read and verify a bundle: version, keys, and the sha256 of every file that matters.

    Raises:
        BundleError: there is no bundle, it is incomplete, altered, or of an unknown version.
        StorageError: the store cannot be reached.
    """
    place = storage.absolute(uri)
    document = read_document(place)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"Expected a bundle of schema version {SCHEMA_VERSION} at {place}, but it is "
            f"{document.get('schema_version')!r}. Update medvision_ray, or use the version that wrote it."
        )
    ensemble = set(_ENSEMBLE) & document.keys()
    expected = _KEYS | (set(_ENSEMBLE) if ensemble else set())
    for kind, keys in (
        ("lacks", expected - document.keys()),
        ("has unknown", document.keys() - expected - {*OPTIONAL}),
    ):
        if keys:
            raise BundleError(
                f"The {BUNDLE_YAML} at {place} {kind} {', '.join(sorted(str(key) for key in keys))}. Take the bundle as it was "
                "written; options are changed by training again, not by hand."
            )
    files, inner = document["files"], member_files(document)
    if not isinstance(files, dict) or set(files) - {_FINGERPRINT, _FITTED} != {_METRICS, _IMAGES, *inner}:
        raise BundleError(
            f"Expected `files` of the {BUNDLE_YAML} at {place} to name {', '.join([_METRICS, _IMAGES, *inner])}."
        )
    parts = {part: read_part(place, part, str(sha256)) for part, sha256 in files.items()}
    if not inner:
        read_part(place, _WEIGHTS, str(document["weights_sha256"]))
    members = tuple(load_bundle(storage.join(place, part.removesuffix(f"/{BUNDLE_YAML}"))) for part in inner)
    bundle = _bundle(place, document, parts, members)
    if document["model_id"] != bundle.model_id:
        raise BundleError(
            f"The {BUNDLE_YAML} at {place} was altered: its content hashes to {bundle.model_id}, but it names another model. "
            "Take the bundle as it was written."
        )
    return bundle


def _bundle(place: str, document: dict[str, Any], parts: Mapping[str, bytes], members: tuple[Bundle, ...]) -> Bundle:
    check_fields(place, document)
    if "members" in document and [member.content_hash for member in members] != document["members"]:
        raise BundleError(f"Expected the members that the {BUNDLE_YAML} at {place} names, but it holds others.")
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
        content_hash=identity_hash(
            {key: document[key] for key in (*_IDENTITY, *OPTIONAL, *_ENSEMBLE) if key in document}
        ),
        calibration=calibration_of(document),
        operating_points=operating_points_of(document) or (),
        class_offsets=tuple(document.get("class_offsets", ())),
        trained=document["trained"],
        metrics=json.loads(parts[_METRICS]),
        train_digest=tuple(json.loads(parts[_IMAGES])),
        vote=document.get("vote"),
        members=members,
        fingerprint=_fingerprint(place, parts.get(_FINGERPRINT)),
        fitted_digest=tuple(json.loads(parts[_FITTED])) if _FITTED in parts else (),
    )


def _fingerprint(place: str, data: bytes | None) -> Fingerprint | None:
    try:
        return None if data is None else Fingerprint.from_json(json.loads(data))
    except ValueError:
        raise BundleError(
            f"Expected the {_FINGERPRINT} at {place} to be of this version of medvision_ray, but it is not. Use the "
            "version that wrote the bundle."
        ) from None


def _section(place: str, key: str, model: type[SectionT], document: dict[str, Any]) -> SectionT:
    try:
        return build_job(model, document[key], source=f"`{key}` of the bundle at {place}")
    except ConfigError as error:
        raise BundleError(f"{error} Use the version of medvision_ray that wrote the bundle.") from None
