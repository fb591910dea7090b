"""Routing that breaks a rule is refused where it is known, and NaN where it is traced."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flix
from flix.backends.jax import (
    gather,
    linear,
    linear_rows,
    touched,
)
from tests.helpers.jax import D_IN, D_OUT, KERNEL, normal, random_bank
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close


@functools.partial(jax.jit, static_argnames="strategy")
def run(x: Any, layer: Any, ids: Any, weights: Any = None, strategy: str = "auto") -> Any:
    return linear(x, KERNEL, layer, ids, weights, strategy=strategy)


@pytest.mark.parametrize(
    ("ids", "weights", "match"),
    [
        (np.full((5, 2), 9), None, "id 9 in row 0"),
        (np.full((5, 2), -2), None, "id -2 in row 0"),
        (np.zeros((5, 2)), None, "integer ids"),
        (np.zeros((1, 5, 2, 2), np.int32), None, r"\[batch, width\]"),
        (np.zeros(5, np.int32), None, r"\[batch, width\]"),
        (np.zeros((4, 2), np.int32), None, r"leading shape \[5, 3\]"),
        (IDS, WEIGHTS[:, :2], "shape of flix_features"),
        (IDS, WEIGHTS.astype(np.int32), "floating point"),
        (IDS, np.where(IDS == 5, np.nan, WEIGHTS), "row 1 for task=pos"),
        (
            IDS,
            np.where(IDS == 5, np.float64(1e39), WEIGHTS),
            "beyond float32 in row 1 for task=pos",
        ),
    ],
)
def test_bad_routing_is_named(ids: Any, weights: Any, match: str) -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    with pytest.raises(flix.RoutingError, match=match):
        linear(normal(5, 3, D_IN), KERNEL, layer, ids, weights)


def test_traced_bad_routing() -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    x = normal(5, 3, D_IN)
    step = jax.jit(lambda ids, w: linear(x, KERNEL, layer, ids, w))
    with pytest.raises(flix.RoutingError, match="integer ids"):
        step(jnp.zeros((5, 2)), None)
    with pytest.raises(flix.RoutingError, match="shape of flix_features"):
        step(jnp.asarray(IDS), jnp.zeros((5, 2)))
    with pytest.raises(flix.RoutingError, match="one composition for all"):
        step(jnp.asarray(IDS[:, 0]), None)
    # A traced id of no feature poisons its own row, and no other.
    for strategy in ("gather", "masked"):
        wrong = IDS.copy()
        wrong[2, 0] = 6
        odd = np.isnan(run(x, layer, wrong, strategy=strategy)).any((1, 2))
        assert odd.tolist() == [False, False, True, False, False]
        present = touched(np.array([0, 4]), 6)
        part = jax.jit(gather)({"q": layer}, present)["q"]
        rows = jax.jit(linear_rows, static_argnames="strategy")
        odd = np.isnan(rows(x, KERNEL, part, IDS, present, strategy=strategy)).any((1, 2))
        assert odd.tolist() == [False, True, True, False, True]


def test_known_weights_in_half_precision() -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    x, halves = normal(5, 3, D_IN), jnp.asarray(WEIGHTS, jnp.bfloat16)
    y = linear(x, KERNEL, layer, IDS, halves)
    assert_close(y, linear(x, KERNEL, layer, IDS, halves.astype(jnp.float32)))
    with pytest.raises(flix.RoutingError, match="must be finite, got inf in row 0"):
        linear(x, KERNEL, layer, IDS, halves.at[0].set(jnp.inf))
