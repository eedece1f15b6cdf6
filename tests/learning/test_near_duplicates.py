"""Perceptual hashes: the bits of imagehash, robust to what a second export does, and apart for other patients."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from medvision_ray.config import DecodeConfig, PreprocessConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.grid import fit
from medvision_ray.imaging.preprocess import ModelInput, prepare
from medvision_ray.learning.near_duplicates import LARGEST_DISTANCE, hash_of_small, near_pairs, perceptual_hash

CONFIG = PreprocessConfig(size=(224, 224))


def bits(found: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(found, np.uint8))


def distance(one: bytes, other: bytes) -> int:
    return int((bits(one) != bits(other)).sum())


def hashed(image: np.ndarray) -> bytes:
    return perceptual_hash(prepare(decode(cv2.imencode(".png", image)[1].tobytes(), DecodeConfig()), CONFIG), 0)


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict[str, str]]:
    with (data_dir / "chest_xray/labels.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def xrays(rows: list[dict[str, str]], data_dir: Path) -> list[np.ndarray]:
    train = [row for row in rows if row["split"] == "train"]
    paths = list({row["patient_id"]: row["image"] for row in train}.values())[:200]
    return [cv2.imread(str(data_dir / "chest_xray" / path), cv2.IMREAD_GRAYSCALE) for path in paths]


def test_the_bits_are_imagehashs(xrays: list[np.ndarray]) -> None:
    for image in xrays[:40]:
        small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
        expected = imagehash.phash(Image.fromarray(small), hash_size=16, highfreq_factor=2).hash.reshape(-1)
        assert np.array_equal(bits(hash_of_small(small)).astype(bool), expected)


def _turned(image: np.ndarray, degrees: float, pixels: float) -> np.ndarray:
    height, width = image.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    matrix[0, 2] += pixels
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 0),
        lambda image: cv2.resize(image, (112, 112), interpolation=cv2.INTER_AREA),
        lambda image: (255 * (image / 255.0) ** 1.4).astype(np.uint8),
        lambda image: np.clip((image.astype(float) - 128) * 1.2 + 138, 0, 255).astype(np.uint8),
        lambda image: image[2:-2, 2:-2],
        lambda image: _turned(image, 1.0, 0.0),
        lambda image: _turned(image, 0.0, 2.0),
    ],
    ids=["jpeg", "half", "gamma", "contrast", "cropped", "turned", "moved"],
)
def test_a_second_export_of_an_image_is_found(
    change: Callable[[np.ndarray], np.ndarray], xrays: list[np.ndarray]
) -> None:
    found = [distance(hashed(image), hashed(change(image))) <= LARGEST_DISTANCE for image in xrays[:60]]
    assert np.mean(found) > 0.95


def test_other_patients_are_not_taken_for_copies(xrays: list[np.ndarray]) -> None:
    """200 X-rays of 200 patients make 19,900 pairs, all chests of children seen from the front."""
    found = np.stack([bits(hashed(image)) for image in xrays])
    nearest = min(int((one != other).sum()) for one, other in combinations(found, 2))
    assert nearest > LARGEST_DISTANCE


def test_every_exact_copy_of_the_data_is_found(rows: list[dict[str, str]], data_dir: Path) -> None:
    seen: dict[bytes, list[str]] = {}
    for row in rows:
        seen.setdefault((data_dir / "chest_xray" / row["image"]).read_bytes(), []).append(row["image"])
    copies = [paths for paths in seen.values() if len(paths) > 1]
    assert copies
    paths = [path for pair in copies for path in pair[:2]]
    hashes = [hashed(cv2.imread(str(data_dir / "chest_xray" / path), cv2.IMREAD_GRAYSCALE)) for path in paths]
    found = near_pairs(hashes, ["train", "test"] * len(copies))
    assert {pair.rows for pair in found if pair.distance == 0} >= {(2 * i, 2 * i + 1) for i in range(len(copies))}


def test_all_pairs_across_splits_and_none_within_one() -> None:
    generator = np.random.default_rng(0)
    hashes = [hash_of_small(generator.integers(0, 255, (32, 32)).astype(np.uint8)) for _ in range(90)]
    near = bits(hashes[3])
    near[[7, 99, 200]] ^= 1
    hashes[40], hashes[80], hashes[4] = np.packbits(near).tobytes(), hashes[3], hashes[3]
    hashes[5] = b""
    splits = ["train"] * 30 + ["val"] * 30 + ["test"] * 30
    expected = sorted(
        (distance(hashes[a], hashes[b]), (a, b))
        for a, b in combinations(range(90), 2)
        if splits[a] != splits[b] and hashes[a] and hashes[b] and distance(hashes[a], hashes[b]) <= LARGEST_DISTANCE
    )
    assert [(pair.distance, pair.rows) for pair in near_pairs(hashes, splits)] == expected
    assert (0, (3, 80)) in expected
    assert (3, (3, 40)) in expected


def test_a_negative_is_far_and_not_near_by_overflow(xrays: list[np.ndarray]) -> None:
    """All bits but the first may differ, and 256 differences would be 0 in a byte."""
    first = bits(hashed(xrays[0]))
    opposite = np.packbits(np.concatenate([first[:1], 1 - first[1:]])).tobytes()
    assert near_pairs([hashed(xrays[0]), opposite], ["train", "val"]) == []
    assert all(bits(hashed(image))[0] == 1 for image in xrays)


def test_blank_frames_and_padding_have_no_say() -> None:
    blank = ModelInput(np.full((1, 1, 224, 224), 90, np.uint8), fit((100, 100), (224, 224), True))
    assert perceptual_hash(blank, 0) == b""
    wide = np.random.default_rng(0).integers(0, 255, (16, 32)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    padded = prepare(decode(cv2.imencode(".png", wide)[1].tobytes(), DecodeConfig()), CONFIG)
    stretched = prepare(
        decode(cv2.imencode(".png", wide)[1].tobytes(), DecodeConfig()), CONFIG.model_copy(update={"resize": "stretch"})
    )
    assert padded.transform.top > 0
    assert distance(perceptual_hash(padded, 0), perceptual_hash(stretched, 0)) <= LARGEST_DISTANCE
