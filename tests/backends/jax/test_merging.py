"""One composition folded into the kernels of a plain copy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    RoutedModel,
    adapt,
    merge,
)
from tests.helpers.jax import TOKENS, Net, adapted, randomize
from tests.helpers.registry import config, registry
from tests.helpers.tolerance import assert_close, same_bits


@nnx.jit
def forward(model: Any, tokens: Any, ids: Any, weights: Any = None) -> Any:
    return model(tokens, flix_features=ids, flix_weights=weights)


@nnx.jit
def plain(model: Any, tokens: Any) -> Any:
    return model(tokens)


@pytest.mark.covers("nnx", "merge", backend="jax")
def test_merge_equals_forward_and_leaves_nothing() -> None:
    model = adapted()
    row = {"language": {"hau": 0.5, "zul": -1.0}, "task": "pos"}
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.Param)))
    with pytest.warns(UserWarning, match=r"attend\(\)"):
        merged = merge(model, row)
    routing = registry().encode([row] * 5)
    assert_close(
        plain(merged, TOKENS), forward(model, TOKENS, routing.ids, routing.weights), times=2
    )
    assert type(merged) is Net
    assert nnx.split(merged)[0] == nnx.split(Net())[0]  # no flix state left, nor its traces
    assert not isinstance(merged, RoutedModel)
    after = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.Param)))
    assert all(map(same_bits, jax.tree.leaves(before), jax.tree.leaves(after)))
    with pytest.raises(flix.RoutingError, match="activates none"):
        merge(model, {})
    with pytest.raises(flix.TargetError, match="merge needs an adapted model"):
        merge(Net(), row)


def test_merge_unties_shared_kernels() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    model = adapt(Tied(), config(target_modules=["a"]))
    randomize(model)
    routing = registry().encode([{"task": "ner"}] * 2)
    merged = merge(model, {"task": "ner"})
    assert same_bits(merged.b.kernel, model.b.kernel)
    x = np.ones((2, 6), np.float32)
    assert_close(merged(x), forward(model, x, routing.ids), times=2)
