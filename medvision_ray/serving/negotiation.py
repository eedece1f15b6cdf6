"""Which form an answer takes: the Accept header (RFC 9110 12.5.1) against what there is."""

from __future__ import annotations

from collections.abc import Sequence


def choose(accept: str, offered: Sequence[str]) -> str | None:
    """The offered media type that a client likes best, the first one where it likes several alike; None for none.

    Args:
        accept: the header; empty takes anything.

    Examples:
        >>> choose("image/png, application/json;q=0.5", ("application/json", "image/png"))
        'image/png'
    """
    if not accept.strip():
        return offered[0]
    ranges = [_read(part) for part in accept.split(",") if part.strip()]
    weights = [_weight(kind, ranges) for kind in offered]
    best = max(weights)
    return offered[weights.index(best)] if best > 0 else None


def _read(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = min(max(float(value), 0.0), 1.0)
            except ValueError:
                weight = 0.0
    return kind, weight


def _weight(kind: str, ranges: Sequence[tuple[str, float]]) -> float:
    """The weight of the most specific range that holds a media type."""
    for pattern in (kind, f"{kind.split('/', maxsplit=1)[0]}/*", "*/*"):
        found = [weight for name, weight in ranges if name == pattern]
        if found:
            return max(found)
    return 0.0
