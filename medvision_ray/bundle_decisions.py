"""A bundle once more with another calibration and other operating points: a model of its own, the same network.

Importing this module imports neither torch nor the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from medvision_ray import storage
from medvision_ray.bundle import OPTIONAL, Bundle, load_bundle, write_bundle
from medvision_ray.bundle_files import BUNDLE_YAML, read_document, read_part
from medvision_ray.calibration import Calibration
from medvision_ray.ensemble import member_contents, member_hashes
from medvision_ray.errors import BundleError, UsageError
from medvision_ray.fingerprint import Fingerprint
from medvision_ray.model_card import owners_texts
from medvision_ray.operating_points import OperatingPoint

BEFORE = "calibrated_from"
"""Fact of a bundle's `trained`: the model_id of the bundle that it was made from."""

_WEIGHTS, _CARD = "weights.safetensors", "MODEL_CARD.md"
_NO_IDENTITY = ("schema_version", "name", "model_id", "files", "trained")


def check_place(uri: str, bundle: Bundle) -> None:
    """Before anything is computed: whether a bundle made from `bundle` may be written there.

    Raises:
        BundleError: the places lie in one another.
        UsageError: another model's bundle is there.
    """
    place, other = f"{storage.absolute(uri)}/", f"{bundle.uri}/"
    if place.startswith(other) or other.startswith(place):
        raise BundleError(
            f"Expected a place apart from {bundle.uri} for the new bundle, but {storage.absolute(uri)} and it lie in one "
            "another. Give `to` another folder."
        )
    if storage.exists(storage.join(uri, BUNDLE_YAML)) and read_before(uri) != bundle.model_id:
        raise UsageError(
            f"Expected no bundle of another model at {storage.absolute(uri)}, but there is one. Give `to` or `name` another."
        )


def read_before(uri: str) -> str | None:
    """The model_id of the bundle that the one at `uri` was made from; None where it was trained."""
    trained = read_document(storage.absolute(uri)).get("trained")
    found = trained.get(BEFORE) if isinstance(trained, dict) else None
    return None if found is None else str(found)


def save_with_decisions(
    uri: str,
    bundle: Bundle,
    *,
    name: str,
    calibration: Calibration | None,
    operating_points: Sequence[OperatingPoint],
    thresholds: Sequence[float],
    class_offsets: Sequence[float],
    trained: Mapping[str, Any],
    metrics: Mapping[str, Any],
    fitted_digest: Iterable[str],
    fingerprint: Fingerprint | None,
) -> Bundle:
    """Write a bundle's network, or its members, with what was fitted to validation images since.

    What the training found out stays, and so do the owner's parts of the model card.

    Args:
        uri: folder or prefix; see `check_place`.
        thresholds: one a class where the bundle is multi-label, else none.
        class_offsets: one a class where the bundle is single-label, or none.
        trained: facts that replace or join the bundle's.
        metrics: validation metrics that replace or join the bundle's.
        fitted_digest: `image_digest` of each image that was fitted to.
        fingerprint: distributions that scored images are held against.

    Returns:
        The new bundle, read back from where it was written.

    Raises:
        BundleError: the bundle is damaged. StorageError: the place cannot be written.
    """
    check_place(uri, bundle)
    document = read_document(bundle.uri)
    identity = {key: value for key, value in document.items() if key not in (*_NO_IDENTITY, *OPTIONAL)}
    identity["thresholds"] = [float(value) for value in thresholds]
    if calibration is not None:
        identity["calibration"] = calibration.document()
    if operating_points:
        identity["operating_points"] = [point.document() for point in operating_points]
    if class_offsets:
        identity["class_offsets"] = [float(value) for value in class_offsets]
    write_bundle(
        uri,
        name,
        identity,
        trained={**bundle.trained, **trained, BEFORE: bundle.model_id},
        metrics={**bundle.metrics, **metrics},
        train_digest=bundle.train_digest,
        files=member_contents(bundle.members) if bundle.members else _weights(bundle),
        members=bundle.members,
        hashes=member_hashes(bundle.members),
        fingerprint=fingerprint,
        fitted_digest={*bundle.fitted_digest, *fitted_digest},
        owners=owners_of(bundle.uri),
    )
    return load_bundle(uri)


def owners_of(uri: str) -> dict[str, str]:
    """What the owner has written into a bundle's model card; nothing where there is none.

    Raises:
        BundleError: the card is no text, or the marks around the owner's parts are not in pairs.
    """
    card = storage.join(uri, _CARD)
    if not storage.exists(card):
        return {}
    try:
        return owners_texts(storage.read_bytes(card).decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError is one
        why = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise BundleError(
            f"Expected the model card {card} to tell the owner's parts, so that they are kept, but {why}. Put it right, or delete "
            "the file to begin a new one. Nothing was written."
        ) from None


def _weights(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    yield _WEIGHTS, read_part(bundle.uri, _WEIGHTS, bundle.weights_sha256)
