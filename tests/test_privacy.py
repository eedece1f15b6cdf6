"""Pseudonyms: stable, keyed, and nothing of the key gets out."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvision_ray.config import PrivacyConfig
from medvision_ray.errors import UsageError
from medvision_ray.privacy import Pseudonymiser, load_pseudonymiser

SECRET = "0123456789abcdef0123456789ABCDEF"
KEYS = Pseudonymiser(SECRET.encode())


def reference(text: str) -> str:
    digest = hmac.digest(SECRET.encode(), text.encode(), hashlib.sha256)
    return base64.b32encode(digest[:16]).decode().lower().rstrip("=")


def test_pseudonyms_are_truncated_hmac_sha256() -> None:
    assert KEYS.patient("Abc 1", "site") == reference("pid|SITE|ABC 1")
    assert KEYS.study("1.2.3") == reference("study|1.2.3")
    assert KEYS.series("1.2.3") == reference("series|1.2.3")


def test_another_process_gives_the_same_pseudonym() -> None:
    code = (
        "from medvision_ray.privacy import load_pseudonymiser as load; from medvision_ray.config import PrivacyConfig;"
        "print(load(PrivacyConfig()).patient('Müller', 'S'))"
    )
    environment = {**os.environ, "MEDVISION_PSEUDONYM_KEY": SECRET, "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == KEYS.patient("Müller", "S")


def test_case_and_surrounding_blanks_do_not_matter() -> None:
    assert KEYS.patient(" abc ", "Site ") == KEYS.patient("ABC", " SITE")
    assert KEYS.study(" 1.2 ") == KEYS.study("1.2")


def test_blanks_inside_matter() -> None:
    assert KEYS.patient("A B") != KEYS.patient("AB")


def test_kinds_issuers_and_keys_are_kept_apart() -> None:
    made = {
        KEYS.patient("1.2"),
        KEYS.patient("1.2", "A"),
        KEYS.patient("1.2", "B"),
        KEYS.study("1.2"),
        KEYS.series("1.2"),
        Pseudonymiser(SECRET[::-1].encode()).patient("1.2"),
    }
    assert len(made) == 6


def test_a_separator_inside_an_identifier_makes_no_twin() -> None:
    assert KEYS.patient("C", "A|B") != KEYS.patient("B|C", "A")
    assert KEYS.patient("B", "A\\") != KEYS.patient("", "A\\|B")


def test_a_damaged_identifier_gets_a_pseudonym() -> None:
    assert KEYS.patient("A\udcff") != KEYS.patient("A")


@pytest.mark.parametrize("key", ["", "   ", "short", "a" * 64, "abcdefg" * 10, SECRET[:-1]])
def test_an_absent_or_weak_key_is_refused_without_quoting_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", key)
    with pytest.raises(UsageError, match="MEDVISION_PSEUDONYM_KEY") as caught:
        load_pseudonymiser(PrivacyConfig())
    assert not key.strip() or key not in str(caught.value)


def test_no_key_at_all_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVISION_PSEUDONYM_KEY", raising=False)
    with pytest.raises(UsageError, match="openssl rand -hex 32"):
        load_pseudonymiser(PrivacyConfig())


def test_a_key_put_where_its_variable_s_name_belongs_is_not_quoted() -> None:
    with pytest.raises(UsageError) as caught:
        load_pseudonymiser(PrivacyConfig(key_env=SECRET))
    assert SECRET not in str(caught.value)


def test_the_key_file_wins_and_its_line_break_is_no_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", SECRET[::-1])
    (tmp_path / "key").write_text(SECRET + "\n")
    loaded = load_pseudonymiser(PrivacyConfig(key_file=str(tmp_path / "key")))
    assert loaded.study("1") == KEYS.study("1")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary", b"weak-key"])
def test_an_unusable_key_file_is_refused_without_quoting_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="key_file") as caught:
        load_pseudonymiser(PrivacyConfig(key_file=str(path)))
    assert "weak-key" not in str(caught.value)
    assert "binary" not in str(caught.value)


def test_the_key_is_in_no_text_form() -> None:
    for text in (repr(KEYS), str(KEYS), f"{KEYS}", repr([KEYS])):
        assert SECRET not in text


def test_the_demo_key_is_used_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", SECRET)
    assert load_pseudonymiser(PrivacyConfig()).study("1") == KEYS.study("1")
    assert load_pseudonymiser(PrivacyConfig(demo_key=True)).study("1") != KEYS.study("1")
