"""The dense reference: sums worked out by hand, and gradients as differences."""

from __future__ import annotations

import math

import numpy as np

import flix
from tests.helpers.dense import by_id, dense, scale
from tests.helpers.tolerance import assert_close

A, B = np.array([[1.0, 2.0]]), np.array([[3.0], [0.0], [-1.0]])
PAIRS = {0: (A, B, 0.5), 2: (2 * A, B, 1.0)}
KERNEL = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def test_sums_by_hand() -> None:
    x = np.array([[[1.0, 1.0]], [[0.0, 1.0]]])
    ids = np.array([[0, -1, 2], [1, 0, 0]])  # 1 has no update
    weights = np.array([[2.0, 9.0, 1.0], [9.0, 1.0, 3.0]])
    # Rows: (2·0.5·3 + 1·6) (3, 0, -1) = 9 (...), and (1 + 3)·0.5·2 (3, 0, -1) = 4 (...).
    update = np.array([[[27.0, 0.0, -9.0]], [[12.0, 0.0, -4.0]]])
    assert_close(dense(x, ids, PAIRS, weights).y, update)
    full = dense(x, ids, PAIRS, weights, kernel=KERNEL, bias=np.ones(3)).y
    assert_close(full, update + x @ KERNEL.T + 1)
    by_token = dense(x, ids[:, None], PAIRS, weights[:, None]).y
    assert_close(by_token, update)
    assert_close(dense(x, ids[:, :1], PAIRS).y[0], 1.5 * B.T)


def test_gradients_are_differences() -> None:
    rng, h = np.random.default_rng(0), 1e-6
    x, ids = rng.normal(size=(2, 3, 2)), np.array([[0, 2], [2, 2]])
    weights, dy = rng.normal(size=ids.shape), rng.normal(size=(2, 3, 3))
    found = dense(x, ids, PAIRS, weights, kernel=KERNEL, dy=dy)

    def loss(x=x, weights=weights, pairs=PAIRS):
        return float((dense(x, ids, pairs, weights, kernel=KERNEL).y * dy).sum())

    def differences(value, make):
        out = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[place] = h
            out[place] = (loss(**make(value + step)) - loss(**make(value - step))) / (2 * h)
        return out

    # Differences lose half of the digits.
    assert_close(differences(x, lambda v: {"x": v}), found.x, dtype="float32")
    assert_close(differences(weights, lambda v: {"weights": v}), found.weights, dtype="float32")
    for i, (a, b, s) in PAIRS.items():
        da = differences(a, lambda v, i=i, b=b, s=s: {"pairs": {**PAIRS, i: (v, b, s)}})
        db = differences(b, lambda v, i=i, a=a, s=s: {"pairs": {**PAIRS, i: (a, v, s)}})
        assert_close(da, found.A[i], dtype="float32")
        assert_close(db, found.B[i], dtype="float32")


def test_scales() -> None:
    names = flix.FeatureRegistry({"g": ["a", "b"]})
    one = flix.FlixConfig(registry=names, ranks=4, alpha={("g", "a"): 2.0})
    assert scale(one, ("g", "a"), 4) == 0.5 and scale(one, ("g", "b"), 4) == 1.0
    root = flix.FlixConfig(registry=names, ranks=4, alpha=8.0, scaling="rslora")
    assert scale(root, ("g", "a"), 4) == 8 / math.sqrt(4)
    pairs = by_id(one, [(("g", "b"), np.ones((4, 2)), np.ones((3, 4)))])
    assert list(pairs) == [1] and pairs[1][2] == 1.0
