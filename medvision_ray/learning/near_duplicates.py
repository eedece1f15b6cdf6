"""Images that are nearly the same: perceptual hashes of 256 bits, and pairs of them across splits.

64 bits are too few for medical images, which all look alike: among 17 million pairs of chest X-rays of different
patients 206 differ in at most 4 of 64 bits, and 1 (an exact copy) in at most 32 of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision_ray.imaging.preprocess import ModelInput
from medvision_ray.learning.splits import SPLITS

LARGEST_DISTANCE = 32
"""Differing bits, of 256, up to which two images count as nearly the same.

Another JPEG quality, half the resolution, gamma up to 1.4, 1 % cropped, 2 of 224 pixels moved or 1 degree turned stay
below it; 3 % cropped, 5 pixels or 3 degrees do not.
"""

_SIDE, _KEPT = (
    32,
    16,
)  # of the shrunk image and of its lowest frequencies, as imagehash.phash(hash_size=16, highfreq_factor=2)
_WORDS = 4
_SQRT_2 = np.float32(np.sqrt(2))
_LEAST_SD = 2.0  # grey levels: a blank frame has a hash of noise
_BLOCK = (16, 16384)  # pairs at a time that stay in the cache


@dataclass(frozen=True)
class NearPair:
    """Two images of different splits.

    Attributes:
        rows: of the label table, from 0.
        distance: differing bits, 0 to `LARGEST_DISTANCE`.
    """

    rows: tuple[int, int]
    distance: int


def perceptual_hash(prepared: ModelInput, frame: int) -> bytes:
    """DCT hash (pHash; Zauner, Implementation and benchmarking of perceptual image hash functions, 2010), 32 bytes.

    The frame without its padding is averaged to 32 x 32, and each of the 16 x 16 lowest cosine coefficients is a bit:
    above their median or not.

    Args:
        frame: its middle channel is taken.

    Returns:
        Empty for a frame without structure, of which no hash says anything.
    """
    where = prepared.transform
    rows, columns = slice(where.top, where.top + where.height), slice(where.left, where.left + where.width)
    grey = prepared.pixels[frame, prepared.pixels.shape[1] // 2, rows, columns]
    small = cv2.resize(np.ascontiguousarray(grey), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return b"" if float(small.std()) < _LEAST_SD else hash_of_small(small)


def hash_of_small(small: NDArray[np.uint8]) -> bytes:
    """The hash of an image of 32 x 32."""
    low = cv2.dct(small.astype(np.float32))[:_KEPT, :_KEPT]
    low[0] *= _SQRT_2  # OpenCV's transform is orthonormal, that of the hash is not
    low[:, 0] *= _SQRT_2
    bits = low > np.median(low)
    bits[0, 0] = True  # the mean, so in all but odd images; see `_distances`
    return np.packbits(bits).tobytes()


def near_pairs(
    hashes: Sequence[bytes], splits: Sequence[str] | NDArray[np.str_], largest: int = LARGEST_DISTANCE
) -> list[NearPair]:
    """Every pair of images of different splits within a distance, the nearest first.

    All pairs are compared, as 64-bit words in blocks: exact, and 4 ns a pair on one core (10 s for 100,000 images in
    the splits 70, 15, 15).

    Args:
        hashes: 32 bytes an image; an empty one matches nothing.
        splits: split of each image.
    """
    words = {name: _words(hashes, splits, name) for name in SPLITS}
    found: list[NearPair] = []
    for one, other in combinations(SPLITS, 2):
        (rows, mine), (others, theirs) = words[one], words[other]
        for start in range(0, len(others), _BLOCK[0]):
            right = theirs[:, start : start + _BLOCK[0], None]
            for begin in range(0, len(rows), _BLOCK[1]):
                distance = _distances(mine[:, None, begin : begin + _BLOCK[1]], right)
                for second, first in np.argwhere(distance <= largest):
                    pair = int(rows[begin + first]), int(others[start + second])
                    found.append(NearPair((min(pair), max(pair)), int(distance[second, first])))
    return sorted(found, key=lambda pair: (pair.distance, pair.rows))


def _words(
    hashes: Sequence[bytes], splits: Sequence[str] | NDArray[np.str_], name: str
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Rows of a split that have a hash, and the hashes as `(4, n)` words."""
    rows = [row for row, found in enumerate(hashes) if found and splits[row] == name]
    flat = np.frombuffer(b"".join(hashes[row] for row in rows), np.uint64).reshape(-1, _WORDS)
    return np.array(rows, np.int64), np.ascontiguousarray(flat.T)


def _distances(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Differing bits. At most 255, which a byte holds: every hash begins with the same bit."""
    distance = np.bitwise_count(one[0] ^ other[0])
    for word in range(1, _WORDS):
        distance += np.bitwise_count(one[word] ^ other[word])
    return np.asarray(distance)
