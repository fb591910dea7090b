"""The quickstart's data, built once for all of its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("simplemma")
pytest.importorskip("wordfreq")

from flix.quickstart.data import QuickstartData, load_data


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(cache_dir: Path) -> QuickstartData:
    return load_data(cache_dir)
