"""`since`: a date, a time or an age, as a moment."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

_AGE = re.compile(r"(\d+)([hdw])")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def parse_since(text: str, now: datetime) -> datetime:
    """The moment that `2026-11-24`, `2026-11-24T03:00:00+01:00` or an age such as `36h`, `7d`, `2w` names.

    Args:
        now: with a zone; an age counts back from it.

    Raises:
        ValueError: none of these, or before year 1.
    """
    age = _AGE.fullmatch(text)
    try:
        if age:
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise ValueError(
            f"expected a date or time as 2026-11-24 or 2026-11-24T03:00:00+01:00 (UTC without a zone) "
            f"or an age as 36h, 7d or 2w, but got {text!r}"
        ) from None
