"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable} names no folder and {default} is absent")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images with labels; see MEDVISION_DATA."""
    return _folder("MEDVISION_DATA", "../shared/data")


@pytest.fixture(scope="session")
def corpora_dir() -> Path:
    """Real and adversarial files; see MEDVISION_CORPORA."""
    return _folder("MEDVISION_CORPORA", "../shared/corpora")
