"""Seeded damage to image files: a case's number decides its file and all that happens to it."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Random = random.Random

_LIES = (0, 1, 2, 7, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_TEXTS = (
    b"",
    b"0",
    b"-1",
    b"1e308",
    b"NaN",
    b"DOE^JANE",
    b"2147483647",
    b"1\\2\\3",
    b"\xff\xfe",
    b"65536",
    b".",
    b"1e-320",
)
# Group and element of what decoding reads: pixels, sequences, lookup tables, spacing, identity, encoding.
_TAGS = (
    *((0x0028, x) for x in (2, 4, 6, 8, 0x10, 0x11, 0x30, 0x34, 0x100, 0x101, 0x102, 0x103, 0x120, 0x121)),
    *(
        (0x0028, x)
        for x in (
            0x1050,
            0x1051,
            0x1052,
            0x1053,
            0x1056,
            0x1101,
            0x1102,
            0x1201,
            0x1202,
            0x3000,
            0x3002,
            0x3006,
            0x3010,
        )
    ),
    *((0x0008, x) for x in (5, 8, 0x16, 0x18, 0x20, 0x60, 0x1090)),
    *((0x0010, x) for x in (0x10, 0x20, 0x30, 0x40, 0x1010)),
    *((0x0018, x) for x in (0x15, 0x50, 0x60, 0x1164, 0x6011)),
    *((0x0020, x) for x in (0x0D, 0x0E, 0x32, 0x37)),
    *((0x5200, x) for x in (0x9229, 0x9230)),
    *((0x7FE0, x) for x in (8, 9, 0x10)),
    *((0x0002, x) for x in (0, 2, 0x10)),
)
_LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OL", b"OV")
_SYNTAXES = tuple(
    f"1.2.840.10008.1.2{end}".encode()
    for end in (
        "",
        ".1",
        ".2",
        ".1.99",
        ".5",
        ".4.50",
        ".4.51",
        ".4.57",
        ".4.70",
        ".4.80",
        ".4.81",
        ".4.90",
        ".4.91",
        ".4.201",
        ".4.110",
    )
)
_MARKERS = (
    b"\xff\xc0",
    b"\xff\xc1",
    b"\xff\xc3",
    b"\xff\xc4",
    b"\xff\xda",
    b"\xff\xdb",
    b"\xff\xf7",
    b"\xff\x51",
    b"\xff\x52",
    b"\xff\x5c",
    b"\xff\x90",
    b"\xfe\xff\x00\xe0",
)
_NIFTI_FIELDS = (
    (40, "<h", 8),
    (70, "<h", 2),
    (76, "<f", 8),
    (108, "<f", 1),
    (112, "<f", 2),
    (252, "<h", 2),
    (280, "<f", 12),
    (344, "<I", 1),
)


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    number: int
    stratum: str
    name: str
    kinds: tuple[str, ...]
    data: bytes


def make_case(number: int, strata: dict[str, list[tuple[str, bytes]]]) -> Case:
    """The case of a number: a file of a stratum drawn evenly, damaged once, twice or three times.

    Args:
        strata: files by format or transfer syntax; the same ones give the same case.
    """
    rng = random.Random(number)
    names = sorted(strata)
    stratum = rng.choice(names)
    name, data = rng.choice(strata[stratum])
    donor = rng.choice(strata[rng.choice(names)])[1]
    kinds = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(_kinds_for(data))
        data = _MUTATIONS[kind](data, rng, donor)
        kinds.append(kind)
    return Case(number, stratum, name, tuple(kinds), data)


def _kinds_for(data: bytes) -> Sequence[str]:
    anything = ("truncate", "flip", "flip_head", "overwrite", "insert", "delete", "repeat", "marker", "splice")
    if data[128:132] == b"DICM" or data[:1] == b"\x08":
        return (*anything, *("field", "length", "nest", "syntax", "codestream") * 2)
    if data[:2] == b"\x1f\x8b" or data[344:348] in (b"n+1\0", b"ni1\0"):
        return (*anything, *("nifti",) * 5)
    return (*anything, *("number",) * 4)


def _place(data: bytes, rng: Random, top: int | None = None) -> int:
    return rng.randrange(max(1, min(len(data), top or len(data))))


def _truncate(data: bytes, rng: Random, _: bytes) -> bytes:
    return data[: rng.choice((_place(data, rng), _place(data, rng, 600), max(0, len(data) - rng.randrange(1, 20))))]


def _flip(data: bytes, rng: Random, _: bytes, top: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 4, 16, 64)) if changed else 0):
        changed[_place(data, rng, top)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_head(data: bytes, rng: Random, donor: bytes) -> bytes:
    return _flip(data, rng, donor, 2048)


def _overwrite(data: bytes, rng: Random, _: bytes) -> bytes:
    start, size = _place(data, rng), rng.choice((1, 2, 4, 16, 256, 4096))
    filling = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size)))
    return data[:start] + filling[: max(0, len(data) - start)] + data[start + size :]


def _insert(data: bytes, rng: Random, _: bytes) -> bytes:
    start = _place(data, rng, rng.choice((None, 1024)))
    return data[:start] + rng.randbytes(rng.choice((1, 2, 3, 8, 100))) + data[start:]


def _delete(data: bytes, rng: Random, _: bytes) -> bytes:
    start = _place(data, rng, rng.choice((None, 1024)))
    return data[:start] + data[start + rng.choice((1, 2, 3, 8, 100)) :]


def _repeat(data: bytes, rng: Random, _: bytes) -> bytes:
    start = _place(data, rng)
    piece = data[start : start + rng.choice((8, 64, 1024))]
    return data[:start] + piece * rng.choice((2, 3, 50)) + data[start:]


def _splice(data: bytes, rng: Random, donor: bytes) -> bytes:
    """The head of one file and the tail of another."""
    return data[: _place(data, rng)] + donor[_place(donor, rng) :]


def _number(data: bytes, rng: Random, _: bytes) -> bytes:
    """A 16- or 32-bit number somewhere in the head, in either byte order, becomes a lie."""
    start, form = _place(data, rng, 512), rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    lie = struct.pack(form, rng.choice(_LIES) & (1 << 8 * size) - 1)
    changed = data[:start] + lie + data[start + size :]
    return _with_png_checksums(changed) if changed[:4] == b"\x89PNG" else changed


def _with_png_checksums(data: bytes) -> bytes:
    """Right checksums over wrong content, so that a PNG decoder reads on."""
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + size]
        if place + 12 + size > len(data):
            break
        parts.append(data[place : place + 4] + body + zlib.crc32(body).to_bytes(4, "big"))
        place += 12 + size
    return b"".join(parts) + data[place:]


def _marker(data: bytes, rng: Random, _: bytes) -> bytes:
    """Bytes after a marker of a codestream, or after an item's tag."""
    places = [place for marker in _MARKERS if (place := data.find(marker, _place(data, rng) // 2)) >= 0]
    if not places:
        return _flip(data, rng, b"")
    start = rng.choice(places) + 2 + rng.randrange(18)
    return data[:start] + rng.choice((b"\0", b"\xff", b"\xff\xff\xff\xff", rng.randbytes(2))) + data[start + 1 :]


def _find_tag(data: bytes, rng: Random) -> tuple[int, bool] | None:
    """Where a known element begins, and whether its value representation is written out."""
    for group, element in rng.sample(_TAGS, len(_TAGS)):
        for form in ("<HH", ">HH"):
            place = data.find(struct.pack(form, group, element), 0, 1 << 18)
            if place >= 0 and place + 12 < len(data):
                return place, data[place + 4 : place + 6].isalpha() and data[place + 4 : place + 6].isupper()
    return None


def _field(data: bytes, rng: Random, _: bytes) -> bytes:
    """Another value in a known element, with its right length or the old one."""
    found = _find_tag(data, rng)
    if found is None:
        return _flip_head(data, rng, b"")
    place, explicit = found
    short = explicit and data[place + 4 : place + 6] not in _LONG_VRS
    at, form = (place + 6, "<H") if short else (place + (8 if explicit else 4), "<I")
    start = at + struct.calcsize(form)
    (length,) = struct.unpack_from(form, data.ljust(start, b"\0"), at)
    length = min(length, 64)
    number = struct.pack("<I", rng.choice(_LIES))[: max(length, 2)]
    value = rng.choice((number, rng.choice(_TEXTS), rng.randbytes(length)))
    if rng.random() < 0.5:
        value = value.ljust(length, b" ")[:length]
        return data[:start] + value + data[start + length :]
    return data[:at] + struct.pack(form, len(value)) + value + data[start + length :]


def _length(data: bytes, rng: Random, _: bytes) -> bytes:
    """A lie in an element's length."""
    found = _find_tag(data, rng)
    if found is None:
        return _number(data, rng, b"")
    place, explicit = found
    short = explicit and data[place + 4 : place + 6] not in _LONG_VRS
    at, form = (place + 6, "<H") if short else (place + (8 if explicit else 4), "<I")
    size = struct.calcsize(form)
    return data[:at] + struct.pack(form, rng.choice(_LIES) & (1 << 8 * size) - 1) + data[at + size :]


def _nest(data: bytes, rng: Random, _: bytes) -> bytes:
    """Sequences in sequences before a known element, with defined or undefined lengths."""
    found = _find_tag(data, rng)
    place, explicit = found or (_place(data, rng), True)
    depth = rng.choice((1, 2, 10, 100, 1000, 3000))
    tag = struct.pack("<HH", *rng.choice(((0x0008, 0x1140), (0x5200, 0x9230), (0x0028, 0x3010), (0x0040, 0x0275))))
    head = tag + (b"SQ\0\0" if explicit else b"")
    if rng.random() < 0.5:
        inside = (head + b"\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff") * depth
        if rng.random() < 0.5:
            inside += (b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0") * depth
        return data[:place] + inside + data[place:]
    inside = b""
    for _ in range(min(depth, 1000)):
        inside = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inside)) + inside
        inside = head + struct.pack("<I", len(inside)) + inside
    return data[:place] + inside + data[place:]


def _syntax(data: bytes, rng: Random, _: bytes) -> bytes:
    """Another transfer syntax over the same bytes."""
    place = data.find(b"\x02\x00\x10\x00UI", 0, 4096)
    if place < 0:
        return _flip_head(data, rng, b"")
    length = int.from_bytes(data[place + 6 : place + 8], "little")
    syntax = rng.choice(_SYNTAXES)
    syntax += b"\0" * (len(syntax) % 2)
    return data[: place + 6] + struct.pack("<H", len(syntax)) + syntax + data[place + 8 + length :]


def _codestream(data: bytes, rng: Random, donor: bytes) -> bytes:
    """The pixels of another file under this one's header."""
    pixels = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
    mine, theirs = (max(source.rfind(tag) for tag in pixels) for source in (data, donor))
    if mine < 0:
        return _splice(data, rng, donor)
    tail = donor[theirs:] if theirs >= 0 else data[mine : mine + 12] + donor
    return data[:mine] + tail


def _nifti(data: bytes, rng: Random, donor: bytes) -> bytes:
    """A lie in the header, or other damage, inside the compression."""
    packed = data[:2] == b"\x1f\x8b"
    try:
        plain = gzip.decompress(data) if packed else data
    except (OSError, EOFError, zlib.error):
        return _flip(data, rng, donor)
    if rng.random() < 0.7 and len(plain) > 348:
        offset, form, count = rng.choice(_NIFTI_FIELDS)
        at = offset + struct.calcsize(form) * rng.randrange(count)
        floats = (0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-38)
        lie = rng.choice(floats) if form == "<f" else rng.choice(_LIES) & (0x7FFF if form == "<h" else 0xFFFFFFFF)
        value = struct.pack(form, lie)
        plain = plain[:at] + rng.choice((value, value[::-1])) + plain[at + len(value) :]
    else:
        plain = _MUTATIONS[rng.choice(("truncate", "flip_head", "insert", "delete"))](plain, rng, donor)
    return gzip.compress(plain, 1, mtime=0) if packed else plain


_MUTATIONS: dict[str, Callable[[bytes, Random, bytes], bytes]] = {
    "truncate": _truncate,
    "flip": _flip,
    "flip_head": _flip_head,
    "overwrite": _overwrite,
    "insert": _insert,
    "delete": _delete,
    "repeat": _repeat,
    "splice": _splice,
    "number": _number,
    "marker": _marker,
    "field": _field,
    "length": _length,
    "nest": _nest,
    "syntax": _syntax,
    "codestream": _codestream,
    "nifti": _nifti,
}
