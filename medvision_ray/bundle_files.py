"""Files of a bundle: read and verified, hashed, written as plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from medvision_ray import storage
from medvision_ray.errors import BundleError, StorageError

BUNDLE_YAML = "bundle.yaml"


def read_document(place: str) -> dict[str, Any]:
    """The content of `bundle.yaml`, nothing of it checked.

    Raises:
        BundleError: there is none, or it is no mapping.
    """
    try:
        document = yaml.safe_load(storage.read_bytes(storage.join(place, BUNDLE_YAML)))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise BundleError(
            f"Expected a bundle at {place}, but it has no {BUNDLE_YAML}. Give the folder that a finished training wrote."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not isinstance(document, dict):
        raise BundleError(
            f"Expected a YAML mapping in the {BUNDLE_YAML} at {place}, but it is none. Copy the bundle again."
        )
    return document


def read_part(place: str, part: str, sha256: str) -> bytes:
    """A file of a bundle.

    Raises:
        BundleError: it is missing or altered.
    """
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


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 of what changes predictions, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def json_bytes(value: Any, what: str) -> bytes:
    """Facts as JSON; NaN and infinity become null.

    Raises:
        BundleError: there is more than text, numbers, lists and mappings.
    """
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
