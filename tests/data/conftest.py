"""Sources of the made-up datasets."""

from __future__ import annotations

import pytest

from tests.helpers.data import SIZES, Pair, rows_of


@pytest.fixture
def sources() -> list[Pair]:
    """Four cells."""
    return [rows_of(language, task, count) for (language, task), count in SIZES.items()]
