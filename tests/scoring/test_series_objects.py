"""A series of an inventory on its way to prepared frames, in the worker and in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvision_ray import storage
from medvision_ray.archive.inventory import list_archive
from medvision_ray.config import ArchiveConfig, DecodeConfig, PreprocessConfig
from medvision_ray.imaging.errors import DecodeError, Stage
from medvision_ray.imaging.preprocess import prepare
from medvision_ray.imaging.volume import decode_series
from medvision_ray.scoring.isolated import IsolatedReader
from medvision_ray.scoring.objects import Effort, ObjectReader

SMALL = PreprocessConfig(size=(32, 32), slices=3)
Series = Callable[..., list[bytes]]


def reader(**limits: int) -> ObjectReader:
    return ObjectReader(DecodeConfig.model_validate(limits), SMALL, None)


@pytest.fixture
def parts(phantom_series: Series) -> list[bytes]:
    return phantom_series(5)


@pytest.fixture
def entry(tmp_path: Path, parts: list[bytes]) -> dict[str, Any]:
    for number, part in enumerate(parts):
        storage.write_bytes(str(tmp_path / f"{9 - number}.dcm"), part)
    [found] = list_archive(ArchiveConfig(uri=str(tmp_path), volumes=True)).objects.to_pylist()
    return dict(found)


def failure(entry: dict[str, Any], **limits: int) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        reader(**limits).read_entry(entry, Effort())
    return caught.value


def test_a_series_is_read_whole_and_prepared_as_a_volume(entry: dict[str, Any], parts: list[bytes]) -> None:
    effort = Effort()
    read = reader()
    ready = read.prepare(read.read_entry(entry, effort), effort)
    expected = prepare(decode_series(parts, DecodeConfig()), SMALL).pixels
    np.testing.assert_array_equal(ready.pixels, expected)
    assert ready.pixels.shape == (5, 3, 32, 32)
    assert effort.bytes_read == entry["size"] == sum(map(len, parts))


def test_a_process_of_its_own_prepares_the_same(entry: dict[str, Any]) -> None:
    child, read, effort = IsolatedReader(reader()), reader(), Effort()
    expected = read.prepare(read.read_entry(entry, effort), effort)
    try:
        ready = child.prepare_entry(entry, effort)
    finally:
        child.close()
    np.testing.assert_array_equal(ready.pixels, expected.pixels)
    assert ready.facts() == expected.facts()


def test_a_slice_that_is_gone_or_changed_has_its_code_and_number(entry: dict[str, Any]) -> None:
    place = Path(entry["members"][3]["uri"])
    content = place.read_bytes()
    place.write_bytes(content + b"\0")
    error = failure(entry)
    assert (error.code.value, error.stage, error.facts["slice"]) == ("changed_while_reading", Stage.READ, 3)
    place.unlink()
    assert failure(entry).code.value == "not_found"


def test_a_series_over_the_limit_is_not_read(entry: dict[str, Any]) -> None:
    assert failure(entry, max_decoded_bytes=entry["size"] - 1).code.value == "too_large"
