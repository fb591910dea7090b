"""Runs' folders, made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import make_large, make_run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small run."""
    return make_run(tmp_path / "run")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 languages and 12 tasks, with 48 layers."""
    return make_large(tmp_path_factory.mktemp("large") / "large")
