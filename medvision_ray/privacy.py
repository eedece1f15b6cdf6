"""Keyed pseudonyms: HMAC-SHA256 of an identifier under the site's secret, the same on every worker."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from medvision_ray.config import PrivacyConfig
from medvision_ray.errors import UsageError

_MIN_KEY_CHARS = 32
_DEMO_KEY = b"medvision_ray demo key: phantoms only, published, worth nothing"


@dataclass(frozen=True)
class Pseudonymiser:
    """Turns identifiers into keyed pseudonyms.

    The prefix keeps kinds apart, so that a patient and a study of the same text differ. 128 bits
    of the digest are kept, in lower-case base32 (26 characters).
    """

    key: bytes

    def patient(self, patient_id: str, issuer: str = "") -> str:
        """Pseudonym of a patient identifier; surrounding blanks and letter case do not matter."""
        return self._digest("pid", issuer.strip().upper(), patient_id.strip().upper())

    def study(self, uid: str) -> str:
        """Pseudonym of a Study Instance UID."""
        return self._digest("study", uid.strip())

    def series(self, uid: str) -> str:
        """Pseudonym of a Series Instance UID."""
        return self._digest("series", uid.strip())

    def _digest(self, *parts: str) -> str:
        # Escaped, or issuer "A|B" with "C" would be issuer "A" with "B|C". Surrogates come from damaged headers.
        text = "|".join(part.replace("\\", "\\\\").replace("|", "\\|") for part in parts)
        digest = hmac.new(self.key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return base64.b32encode(digest[:16]).decode().rstrip("=").lower()

    def __repr__(self) -> str:
        return "Pseudonymiser(key=<hidden>)"


def load_pseudonymiser(config: PrivacyConfig) -> Pseudonymiser:
    """Read the site's key.

    Raises:
        UsageError: no key is given, or it is shorter than 32 characters or of fewer than 8
            different ones.
    """
    if config.demo_key:
        return Pseudonymiser(_DEMO_KEY)
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
    if len(text) < _MIN_KEY_CHARS or len(set(text)) < 8:
        raise UsageError(
            f"Expected a pseudonym key of at least {_MIN_KEY_CHARS} random characters in {where}, but it is weaker."
        )
    return Pseudonymiser(text.encode())
