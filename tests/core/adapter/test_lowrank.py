"""Low-rank pairs resized."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.adapter.lowrank import resized_mean


def test_resized_mean_is_the_nearest_of_its_rank():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(r, 9)), rng.normal(size=(7, r))) for r in (2, 3)]
    mean = (2.0 * pairs[0][1] @ pairs[0][0] + 0.5 * pairs[1][1] @ pairs[1][0]) / 2
    for rank in (1, 3, 5, 6):
        a, b = resized_mean(pairs, [2.0, 0.5], rng.normal(size=(rank, 9)), 1.5, 2)
        assert a.shape == (rank, 9) and b.shape == (7, rank)
        lost = np.linalg.norm(np.linalg.svd(mean)[1][rank:])
        assert np.linalg.norm(1.5 * b @ a - mean) == pytest.approx(lost, abs=1e-9)


def test_one_pair_of_the_wanted_rank_is_copied_at_its_own_scale():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 9)), rng.normal(size=(7, 3))
    found_a, found_b = resized_mean([(a, b)], [2.0], np.zeros((3, 9)), 0.5, 1)
    np.testing.assert_array_equal(found_a, a)
    np.testing.assert_array_equal(found_b, 4 * b)
    assert found_a is not a
