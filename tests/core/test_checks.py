"""Checks of single values: a bool is not a number, NumPy's numbers are."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.checks import finite, is_number, is_whole, whole
from flix.core.errors import ConfigError, RankError


def test_what_is_a_number():
    assert is_whole(3) and is_whole(np.int32(3)) and is_number(3) and is_number(np.float32(0.5))
    assert is_number(float("nan")) and not is_whole(3.0)
    for other in (True, np.True_, "3", None, 1j):
        assert not is_whole(other) and not is_number(other), other


def test_whole_numbers_come_back_as_ints():
    found = whole(np.int64(4), "width", 1)
    assert found == 4 and type(found) is int
    assert whole(-4, "seed") == -4
    with pytest.raises(ConfigError, match=r"^width must be a whole number of 1 or more, got 0$"):
        whole(0, "width", 1)
    with pytest.raises(RankError, match=r"^rank must be a whole number, got True$"):
        whole(True, "rank", error=RankError)


def test_finite_numbers_come_back_as_floats():
    assert type(finite(2, "alpha", positive=True)) is float
    assert finite(np.float32(-0.5), "weight") == -0.5
    for bad in (float("inf"), float("nan"), True, "1", None):
        with pytest.raises(ConfigError, match=r"^weight must be a finite number, got"):
            finite(bad, "weight")
    with pytest.raises(RankError, match=r"^alpha must be a positive number, got 0$"):
        finite(0, "alpha", RankError, positive=True)
