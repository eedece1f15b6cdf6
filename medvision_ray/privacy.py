"""Keyed pseudonyms: HMAC-SHA256 of an identifier under the site's secret, the same on every worker; what else may leave."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path

from medvision_ray.config import PrivacyConfig
from medvision_ray.errors import UsageError

HASHED = "hashed:"
"""How an address that became a pseudonym begins."""

_MIN_KEY_CHARS = 32
_MIN_KEY_BITS = 72.0  # as estimated here, the least of 50,000 random keys has 93 (32 hexadecimal digits), 79 (decimal)
_PIECE_CHARS = 8  # twice in 64 random hexadecimal digits: once in 3 million keys
_LONGEST_SHIFT_DAYS = 365
_DEMO_KEY = b"medvision_ray demo key: phantoms only, published, worth nothing"


@dataclass(frozen=True)
class Pseudonymiser:
    """Turns identifiers into keyed pseudonyms.

    The prefix keeps kinds apart, so that a patient and a study of the same text differ. 128 bits
    of the digest are kept, in lower-case base32 (26 characters). Nothing but the key decides, so
    every worker and every later run agrees.

    Attributes:
        policy: what the site lets into its tables; travels with the key to whoever reads headers.
    """

    key: bytes
    policy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def patient(self, patient_id: str, issuer: str = "") -> str:
        """Pseudonym of a patient identifier; surrounding blanks and letter case do not matter."""
        return self._digest("pid", issuer.strip().upper(), patient_id.strip().upper())

    def study(self, uid: str) -> str:
        """Pseudonym of a Study Instance UID."""
        return self._digest("study", uid.strip())

    def series(self, uid: str) -> str:
        """Pseudonym of a Series Instance UID."""
        return self._digest("series", uid.strip())

    def address(self, uri: str) -> str:
        """An object's address as tables and evaluations have it: itself, or a pseudonym (`privacy.uri: hash`)."""
        return HASHED + self._digest("uri", uri) if self.policy.uri == "hash" else uri

    def study_date(self, day: date, patient_id: str, issuer: str = "") -> date | None:
        """A study's date as the tables have it: none, 1 January of its year, or shifted.

        A shift is 1 to 365 days to the past, the same for all dates of a patient, so that intervals
        within a patient hold; without a patient there is none to keep and no date.
        """
        if self.policy.study_date == "omit":
            return None
        if self.policy.study_date == "year":
            return date(day.year, 1, 1)
        if not patient_id.strip():
            return None
        digest = self._hmac("shift", issuer.strip().upper(), patient_id.strip().upper())
        days = int.from_bytes(digest[:8], "big") % _LONGEST_SHIFT_DAYS + 1
        return day - timedelta(days=days) if day.toordinal() > days else None

    @property
    def fingerprint(self) -> str:
        """Changes with the key and with `privacy.uri`: a run that began with one is not finished with another."""
        return self._digest("fingerprint", self.policy.uri)

    def _digest(self, *parts: str) -> str:
        return base64.b32encode(self._hmac(*parts)[:16]).decode().rstrip("=").lower()

    def _hmac(self, *parts: str) -> bytes:
        # Escaped, or issuer "A|B" with "C" would be issuer "A" with "B|C". Surrogates come from damaged headers.
        text = "|".join(part.replace("\\", "\\\\").replace("|", "\\|") for part in parts)
        return hmac.digest(self.key, text.encode("utf-8", "surrogatepass"), hashlib.sha256)

    def __repr__(self) -> str:
        return "Pseudonymiser(key=<hidden>)"


def load_pseudonymiser(config: PrivacyConfig) -> Pseudonymiser:
    """Read the site's key.

    Raises:
        UsageError: no key is given; or it is weak: shorter than 32 characters, a repeated piece, of
            few different characters, a sequence, or the published demo key.
    """
    if config.demo_key:
        return Pseudonymiser(_DEMO_KEY, config)
    if config.key_file:
        try:
            text = Path(config.key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError("Expected a readable text file at `privacy.key_file`, but it cannot be read.") from None
        where = "`privacy.key_file`"
    else:
        text = os.environ.get(config.key_env, "").strip()
        # Quoted only when it looks like a name: somebody may have put the key itself there.
        named = re.fullmatch(r"[A-Z_][A-Z0-9_]*", config.key_env) is not None
        where = f"environment variable {config.key_env}" if named else "the environment variable of `privacy.key_env`"
    if not text:
        raise UsageError(
            f"Expected the pseudonym key in {where}, but it is empty. Make one with `openssl rand -hex 32` and keep it "
            "secret and safe: another key gives every patient another pseudonym. For images of nobody: `privacy.demo_key: true`."
        )
    weakness = _weakness(text)
    if weakness:
        raise UsageError(
            f"Expected a pseudonym key of at least {_MIN_KEY_CHARS} random characters in {where}, but it is weak: "
            f"{weakness}. Make one with `openssl rand -hex 32`."
        )
    return Pseudonymiser(text.encode(), config)


def address_pseudonymiser(config: PrivacyConfig) -> Pseudonymiser | None:
    """The pseudonymiser where addresses need one, else None: a listing that keeps addresses needs no key.

    Raises:
        UsageError: as `load_pseudonymiser`.
    """
    return load_pseudonymiser(config) if config.uri == "hash" else None


def _weakness(key: str) -> str | None:
    """Why somebody could guess a key; a random one of 32 characters passes, whatever its alphabet of 10 or more."""
    folded = key.casefold()
    if len(key) < _MIN_KEY_CHARS:
        return "it is too short"
    if key.encode() == _DEMO_KEY:
        return "it is the demo key, which is published"
    pieces = [folded[place : place + _PIECE_CHARS] for place in range(len(folded) - _PIECE_CHARS + 1)]
    if len(set(pieces)) < len(pieces):
        return "a piece of it is repeated"
    steps = [ord(two) - ord(one) for one, two in pairwise(folded)]
    if len(key) * min(_entropy_bits(folded), _entropy_bits(steps)) < _MIN_KEY_BITS:
        return "its characters are too few or in a sequence"
    return None


def _entropy_bits(symbols: Iterable[object]) -> float:
    """Shannon's entropy of the symbols' frequencies, in bits a symbol."""
    counts = Counter(symbols)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
