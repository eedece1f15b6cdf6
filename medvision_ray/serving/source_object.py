"""An object of the archive that a table names, read again: the same version or none."""

from __future__ import annotations

import pyarrow as pa

from medvision_ray import storage
from medvision_ray.archive.series import SUFFIX, grouped
from medvision_ray.errors import MedVisionError, StorageError
from medvision_ray.listing import LISTING, list_batches
from medvision_ray.privacy import HASHED

_THREADS = 8


class NotOpenableError(MedVisionError):
    """The row names an object whose content cannot be had.

    Attributes:
        code: `hashed_address`, `not_in_archive` or `series_scattered`.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def read_source(uri: str, etag: str, max_bytes: int) -> list[bytes]:
    """The content of an object, or of each slice of a series that was scored as one volume.

    Args:
        uri: as the table has it.
        etag: the version that was scored; another one is refused.
        max_bytes: largest object, and largest series.

    Raises:
        NotOpenableError: the address is a pseudonym, is no place in an archive, or names a series whose
            slices are not all in one folder.
        StorageError: it is gone, changed, too large, or the store refused.
    """
    if uri.startswith(HASHED):
        raise NotOpenableError(
            "hashed_address", "This site keeps no addresses (`privacy.uri: hash`): the image cannot be opened."
        )
    if "://" in uri and uri.split("://", 1)[0] not in ("file", "s3", "gs"):
        raise NotOpenableError(
            "not_in_archive", "This image was sent to the API and is in no archive: it cannot be opened."
        )
    if not uri.endswith(SUFFIX):
        return [storage.read_bytes(uri, max_bytes=max_bytes, etag=etag or None)]
    members = _members(uri, etag)
    if sum(size for _, _, size in members) > max_bytes:
        raise StorageError("The series is over the size limit.", code="too_large")
    return [storage.read_bytes(place, max_bytes=max_bytes, etag=version or None) for place, version, _ in members]


def _members(uri: str, etag: str) -> list[tuple[str, str, int]]:
    """The slices of a series, found again: those in the first one's folder whose versions make the series' own."""
    folder = storage.absolute(uri.removesuffix(SUFFIX)).rsplit("/", 1)[0]
    batches = [batch for batch in list_batches(folder) if batch.num_rows]
    listed = pa.Table.from_batches(batches, LISTING).sort_by("path")
    entries, members = grouped(listed, _THREADS)
    for entry, group in zip(entries, members, strict=True):
        if group and entry[:2] == (uri, etag):
            return group
    raise NotOpenableError(
        "series_scattered",
        "The slices of this series are no longer together in one folder as they were scored: it cannot be opened.",
    )
