"""The counter-based generator."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core import rng


def test_bits_are_uniform_and_keyed():
    words = rng.key("x", 1)
    u = rng.uniform(words, np.arange(200_000))
    assert u.min() >= 0 and u.max() < 1
    assert np.histogram(u, 10, (0, 1))[0] == pytest.approx(20_000, rel=0.03)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert rng.key("ab", "c") != rng.key("a", "bc")
    assert rng.key(1) != rng.key("1")
    other = rng.uniform(rng.key("x", 2), np.arange(200_000))
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.01
