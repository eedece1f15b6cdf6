"""The palette of a PALETTE COLOR object as one table over all stored values.

Ours and not pydicom's `apply_color_lut`: that one reads 16-bit entries of big-endian objects in the
wrong order, takes the byte offsets of indirect segments for entry numbers, and expands segments
without a bound, so that six bytes can stand for 65,535 entries again and again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medvision_ray.imaging.codecs import FrameFormat
from medvision_ray.imaging.dicom_header import element, numbers
from medvision_ray.imaging.errors import DecodeError, ErrorCode

Words = NDArray[np.uint16]

_COLOURS = ("Red", "Green", "Blue")
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


def read_palette(dataset: Dataset, frame: FrameFormat, big_endian: bool) -> NDArray[np.uint8]:
    """The palette, shape `(2 ** bits_stored, 3)` RGB (DICOM PS3.3 C.7.6.3.1.5, .6 and C.7.9.2).

    Stored values below the first mapped one take the first entry, those past the last the last.
    Entries of 16 bits are cut to 8, unless none is over 255: some writers put 8-bit colours there.

    Raises:
        DecodeError: BAD_HEADER for a palette that is absent or not usable, UNSUPPORTED_ENCODING
            for indices of 1 or of more than 16 bits.
    """
    if frame.bits_stored > 16 or frame.bits_allocated == 1:
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, bits_stored=frame.bits_stored)
    size = 1 << frame.bits_stored
    stored = np.arange(size)
    if frame.signed:
        stored = np.where(stored >= size // 2, stored - size, stored)
    table = np.empty((size, len(_COLOURS)), dtype=np.uint16)
    for index, colour in enumerate(_COLOURS):
        first, entries = _entries(dataset, colour, frame.signed, big_endian)
        table[:, index] = entries[np.clip(stored - first, 0, entries.size - 1)]
    return np.asarray((table >> 8 if int(table.max()) > 255 else table).astype(np.uint8))


def _entries(dataset: Dataset, colour: str, signed: bool, big_endian: bool) -> tuple[int, Words]:
    """The first mapped value and the entries of one colour."""
    descriptor = numbers(dataset, f"{colour}PaletteColorLookupTableDescriptor")
    if len(descriptor) != 3 or descriptor[2] not in (8, 16):
        raise _unusable(colour)
    count, first = int(descriptor[0]) & 0xFFFF or 65536, int(descriptor[1])
    first = first - 65536 if signed and first > 32767 else first
    plain = element(dataset, f"{colour}PaletteColorLookupTableData")
    if isinstance(plain, bytes):
        byte_wide = len(plain) < 2 * count  # two to a word, whatever depth the descriptor names
        entries = _words(plain, byte_wide, big_endian)[:count]
    else:
        segments = element(dataset, f"Segmented{colour}PaletteColorLookupTableData")
        if not isinstance(segments, bytes):
            raise _unusable(colour)
        entries = expand_segments(_words(segments, descriptor[2] == 8, big_endian), count, descriptor[2] == 8)
    if entries.size < count:
        raise _unusable(colour)
    return first, entries


def _words(data: bytes, byte_wide: bool, big_endian: bool) -> Words:
    if not byte_wide:
        return np.frombuffer(data, ">u2" if big_endian else "<u2", len(data) // 2).astype(np.uint16)
    if big_endian:  # bytes lie swapped in 16-bit words
        return np.frombuffer(data, "<u2", len(data) // 2).byteswap().view(np.uint8).astype(np.uint16)
    return np.frombuffer(data, np.uint8).astype(np.uint16)


def expand_segments(data: Words, count: int, byte_wide: bool) -> Words:
    """Expand segmented palette data (DICOM PS3.3 C.7.9.2), never past `count` entries.

    Args:
        data: opcodes, lengths and values, shape `(words,)`.
        count: entries that the descriptor names.
        byte_wide: `data` was stored as bytes, which matters for the offsets of indirect segments.

    Raises:
        DecodeError: BAD_HEADER for segments that break the rules.
    """
    entries = np.empty(count, dtype=np.uint16)
    filled = position = 0
    while filled < count and position + 1 < data.size:
        opcode, length = int(data[position]), int(data[position + 1])
        if opcode != _INDIRECT:
            filled, position = _segment(data, position, entries, filled)
            continue
        width = 4 if byte_wide else 2
        if position + 2 + width > data.size:
            raise _unusable("segmented")
        source = _offset(data[position + 2 : position + 2 + width])
        for _ in range(length):
            if filled == count or source + 1 >= data.size:
                break
            filled, source = _segment(data, source, entries, filled)
        position += 2 + width
    return entries[:filled]


def _segment(data: Words, position: int, entries: Words, filled: int) -> tuple[int, int]:
    """Expand one discrete or linear segment; the new fill and the position after the segment."""
    opcode, length = int(data[position]), int(data[position + 1])
    room = min(length, entries.size - filled)
    if opcode == _DISCRETE and length:
        values = data[position + 2 : position + 2 + length]
        if values.size < length:
            raise _unusable("segmented")
        entries[filled : filled + room] = values[:room]
        return filled + room, position + 2 + length
    if opcode != _LINEAR or not length or not filled or position + 2 >= data.size:
        raise _unusable("segmented")
    start, end = float(entries[filled - 1]), float(data[position + 2])
    ramp = np.rint(start + (end - start) * np.arange(1, room + 1) / length)
    entries[filled : filled + room] = ramp.astype(np.uint16)
    return filled + room, position + 3


def _offset(words: Words) -> int:
    """An indirect segment's target as an index: its byte offset is stored low word first."""
    parts = [int(word) for word in words]
    if len(parts) == 4:  # bytes: the words lie in the file's own order, which `_words` has undone
        return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24
    return (parts[0] | parts[1] << 16) // 2


def _unusable(colour: str) -> DecodeError:
    return DecodeError(ErrorCode.BAD_HEADER, field="PaletteColorLookupTable", part=colour.lower())
