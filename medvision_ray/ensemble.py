"""Several bundles as one: copied into a bundle of its own, with how their outputs are combined.

With `soft` vote `p_<class>` is the mean of the members' probabilities. With `majority` vote each member votes for the
class that it names (multi-label: for each finding that reaches its own threshold), and
`p_<class>` = (1 - `TIE_WEIGHT`) x share of votes + `TIE_WEIGHT` x mean probability: within a hundredth the share of votes, and of
classes with as many votes the one of the larger mean probability comes first. Masks are the mean of the members' mask
probabilities under either vote. A head that not every member has is averaged over those that have it. Members' raw
probabilities are what is combined; a calibration belongs to the whole and is fitted on it.

Importing this module imports neither torch nor the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle, write_bundle
from medvision_ray.bundle_fields import Vote, member_part
from medvision_ray.bundle_files import BUNDLE_YAML, read_document, read_part
from medvision_ray.errors import BundleError

TIE_WEIGHT = 0.01
MOST_MEMBERS = 32
"""With more, `TIE_WEIGHT` could outweigh a vote."""
_OWN_TO_EACH = ("mean", "std")  # of `preprocess`: each network normalises by itself, inside
_CARD, _WEIGHTS = "MODEL_CARD.md", "weights.safetensors"


def save_ensemble(
    uri: str,
    name: str,
    vote: Vote,
    members: Sequence[Bundle],
    *,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    class_offsets: Sequence[float] | None = None,
    mask_threshold: float | None = None,
) -> Bundle:
    """Write an ensemble: its members are copied in, so it is moved and kept as one folder.

    An ensemble among the members is taken apart: its own members take its place.

    Args:
        uri: folder or prefix, in none of the members and with none of them in it.
        facts: for `trained`, beside what is known of the members.
        metrics: of the ensemble as a whole, where they are known.
        class_offsets: of the whole; None is with `soft` vote the mean of the members', with `majority` vote none.
        mask_threshold: of the whole; None is the mean of the members'.

    Returns:
        The ensemble, read back from where it was written.

    Raises:
        BundleError: members disagree in classes or preprocessing, or are fewer than two, or damaged.
        StorageError: the place cannot be written.
    """
    flat = [inner for member in members for inner in (member.members or (member,))]
    _check_places(uri, flat)
    check_members(flat)
    storage.delete_object(storage.join(uri, BUNDLE_YAML))
    storage.delete_tree(storage.join(uri, "members"))  # of an ensemble that was here before
    write_bundle(
        uri,
        name,
        _identity(vote, flat, class_offsets, mask_threshold),
        trained={**(facts or {}), **_facts(flat)},
        metrics=metrics or {},
        train_digest=sorted({digest for member in flat for digest in member.train_digest}),
        fitted_digest=sorted({digest for member in flat for digest in member.fitted_digest}),
        files=member_contents(flat),
        members=flat,
        hashes=member_hashes(flat),
    )
    return load_bundle(uri)


def check_members(members: Sequence[Bundle]) -> None:
    """Whether bundles can be one.

    Raises:
        BundleError: they are too few or too many, or disagree; the message names the option and both values.
    """
    if not 2 <= len(members) <= MOST_MEMBERS:
        raise BundleError(f"Expected 2 to {MOST_MEMBERS} bundles for an ensemble, but got {len(members)}.")
    twice = {one.content_hash for one in members if sum(one.content_hash == two.content_hash for two in members) > 1}
    if twice:
        raise BundleError("Expected different bundles for an ensemble, but one is given twice.")
    first = members[0]
    for other in members[1:]:
        _same(first, other, "preprocess", _shared(first), _shared(other))
    labelled = [member for member in members if member.classes]
    for other in labelled[1:]:
        for option in ("classes", "multi_label"):
            _same(
                labelled[0],
                other,
                "",
                {option: getattr(labelled[0], option)},
                {option: getattr(other, option)},
            )


def _same(one: Bundle, other: Bundle, section: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    for option in here:
        if here[option] != there[option]:
            name = f"{section}.{option}" if section else option
            raise BundleError(
                f"Expected the members of an ensemble to agree in `{name}`, but it is {_text(here[option])} in "
                f"{one.model_id} and {_text(there[option])} in {other.model_id}. Train one of them again with the other's."
            )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shared(member: Bundle) -> dict[str, Any]:
    return member.preprocess.model_dump(mode="json", exclude=set(_OWN_TO_EACH))


def _identity(
    vote: Vote, members: Sequence[Bundle], class_offsets: Sequence[float] | None, mask_threshold: float | None
) -> dict[str, Any]:
    labelled = [member for member in members if member.classes]
    masking = [member for member in members if member.architecture.segmentation]
    own = [member.weights_sha256 for member in members]
    offsets = _offsets(vote, labelled) if class_offsets is None else [float(value) for value in class_offsets]
    if mask_threshold is None:
        mask_threshold = _mean([member.mask_threshold for member in masking or members])
    return {
        "architecture": _architecture(members),
        "preprocess": members[0].preprocess.model_dump(mode="json"),
        "classes": list(labelled[0].classes) if labelled else [],
        "multi_label": bool(labelled) and labelled[0].multi_label,
        "thresholds": _thresholds(vote, labelled),
        "mask_threshold": float(mask_threshold),
        "batch_norm_eps": None,
        "weights_sha256": hashlib.sha256("\n".join(own).encode()).hexdigest(),
        "vote": vote,
        "members": [member.content_hash for member in members],
        **({"class_offsets": offsets} if offsets else {}),
    }


def _architecture(members: Sequence[Bundle]) -> dict[str, Any]:
    """What is true of all members, the names of their encoders, and the heads that the whole has."""
    dumps = [member.architecture.model_dump(mode="json") for member in members]
    shared = {key: value for key, value in dumps[0].items() if all(dump[key] == value for dump in dumps)}
    return {
        **shared,
        "encoder": " + ".join(dump["encoder"] for dump in dumps),
        "classification": any(dump["classification"] for dump in dumps),
        "segmentation": any(dump["segmentation"] for dump in dumps),
    }


def _thresholds(vote: Vote, labelled: Sequence[Bundle]) -> list[float]:
    """Multi-label: the mean of the members' thresholds; of votes, more than half of them, or half and the mean reached."""
    means = [_mean(each) for each in zip(*(member.thresholds for member in labelled), strict=True)]
    if vote == "soft":
        return means
    return [(1 - TIE_WEIGHT) * 0.5 + TIE_WEIGHT * mean for mean in means]


def _offsets(vote: Vote, labelled: Sequence[Bundle]) -> list[float]:
    """Single-label: the mean of the members', one without any counting as zeros; none where members vote with their own."""
    if vote != "soft" or not any(member.class_offsets for member in labelled):
        return []
    zeros = (0.0,) * len(labelled[0].classes)
    return [_mean(each) for each in zip(*(member.class_offsets or zeros for member in labelled), strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _facts(members: Sequence[Bundle]) -> dict[str, Any]:
    hashed = any(member.trained.get("image_digests") == "hashed" for member in members)
    return {
        "image_digests": "hashed" if hashed else "plain",
        "members": [
            {
                "model_id": member.model_id,
                "encoder": member.architecture.encoder,
                "classification": member.architecture.classification,
                "segmentation": member.architecture.segmentation,
                "metrics": {key: value for key, value in member.metrics.items() if not isinstance(value, dict)},
            }
            for member in members
        ],
    }


def _check_places(uri: str, members: Sequence[Bundle]) -> None:
    place = f"{storage.absolute(uri)}/"
    for member in members:
        other = f"{member.uri}/"
        if place.startswith(other) or other.startswith(place):
            raise BundleError(
                f"Expected a place apart from its members for an ensemble, but {storage.absolute(uri)} and {member.uri} lie in "
                "one another. Give `--output` another folder."
            )


def member_hashes(members: Sequence[Bundle]) -> dict[str, str]:
    """sha256 of each member's bundle.yaml, by where it lies in the ensemble."""
    return {
        member_part(index, BUNDLE_YAML): hashlib.sha256(_yaml_of(member)).hexdigest()
        for index, member in enumerate(members)
    }


def _yaml_of(member: Bundle) -> bytes:
    return storage.read_bytes(storage.join(member.uri, BUNDLE_YAML))


def member_contents(members: Sequence[Bundle]) -> Iterator[tuple[str, bytes]]:
    """Path in the ensemble and content of each file of each member, verified."""
    for index, member in enumerate(members):
        document = read_document(member.uri)
        for part, sha256 in {_WEIGHTS: document["weights_sha256"], **document["files"]}.items():
            yield member_part(index, part), read_part(member.uri, part, str(sha256))
        card = storage.join(member.uri, _CARD)
        if storage.exists(card):
            yield member_part(index, _CARD), storage.read_bytes(card)
        yield member_part(index, BUNDLE_YAML), _yaml_of(member)
