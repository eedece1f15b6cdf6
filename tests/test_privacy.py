"""Pseudonyms: stable, keyed, and nothing of the key gets out."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest

from medvision_ray.config import PrivacyConfig
from medvision_ray.errors import UsageError
from medvision_ray.privacy import _DEMO_KEY, Pseudonymiser, address_pseudonymiser, load_pseudonymiser

SECRET = "q7Jm2xVt9LrYw4KsN8bHd3PzG6cFa5Tu"
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


WEAK = {
    "short": ["few-chars", SECRET[:-1]],
    "repeated": ["a" * 64, "abcdefg" * 10, "0123456789abcdef0123456789ABCDEF", "password" * 4 + "1", SECRET + SECRET],
    "sequence": ["abcdefghijklmnopqrstuvwxyz0123456789", "aabbccddeeffgghhiijjkkllmmnnooppqq"],
    "demo": [_DEMO_KEY.decode()],
}


@pytest.mark.parametrize(("reason", "key"), [(reason, key) for reason, keys in WEAK.items() for key in keys])
def test_a_weak_key_is_refused_with_its_weakness(reason: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", key)
    with pytest.raises(UsageError, match=reason) as caught:
        load_pseudonymiser(PrivacyConfig())
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda r: r.randbytes(16).hex(), lambda r: base64.b64encode(r.randbytes(32)).decode()]
)
def test_a_random_key_is_never_called_weak(
    make: Callable[[random.Random], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(7)
    for _ in range(2000):
        monkeypatch.setenv("MEDVISION_PSEUDONYM_KEY", make(source))
        load_pseudonymiser(PrivacyConfig())


@pytest.mark.parametrize("key", ["", "   ", "few-chars", "a" * 64, "abcdefg" * 10, SECRET[:-1]])
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


def with_policy(**policy: object) -> Pseudonymiser:
    return Pseudonymiser(SECRET.encode(), PrivacyConfig.model_validate(policy))


def test_dates_are_left_out_unless_asked_for() -> None:
    assert KEYS.study_date(date(2020, 7, 9), "P") is None
    assert with_policy(study_date="year").study_date(date(2020, 7, 9), "P") == date(2020, 1, 1)


def test_a_shift_is_one_to_365_days_back_and_keeps_intervals_within_a_patient() -> None:
    keys = with_policy(study_date="shift")
    day = date(2020, 7, 9)
    shifts = set()
    for number in range(500):
        shifted = keys.study_date(day, f"P{number}")
        assert shifted is not None
        assert timedelta(days=1) <= day - shifted <= timedelta(days=365)
        later = keys.study_date(day + timedelta(days=30), f" p{number} ")
        assert later == shifted + timedelta(days=30)
        shifts.add(day - shifted)
    assert len(shifts) > 200  # spread over the year: 500 draws of 365 leave about 270
    assert keys.study_date(day, "P1") != keys.study_date(day, "P1", "another issuer") or len(shifts) == 1


def test_a_date_without_a_patient_to_shift_by_or_before_all_time_is_left_out() -> None:
    assert with_policy(study_date="shift").study_date(date(2020, 7, 9), "  ") is None
    assert with_policy(study_date="shift").study_date(date(1, 1, 1), "P") is None


def test_addresses_are_kept_or_become_keyed_pseudonyms() -> None:
    uri = "s3://bucket/DOE JANE/1.dcm"
    assert KEYS.address(uri) == uri
    assert with_policy(uri="hash").address(uri) == "hashed:" + reference(f"uri|{uri}")


def test_only_hashed_addresses_need_a_key_for_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVISION_PSEUDONYM_KEY", raising=False)
    assert address_pseudonymiser(PrivacyConfig()) is None
    with pytest.raises(UsageError):
        address_pseudonymiser(PrivacyConfig(uri="hash"))


def test_the_fingerprint_changes_with_the_key_and_the_form_of_addresses() -> None:
    other = Pseudonymiser(SECRET[::-1].encode())
    assert len({KEYS.fingerprint, other.fingerprint, with_policy(uri="hash").fingerprint}) == 3
    assert KEYS.fingerprint == with_policy(study_date="year").fingerprint
