"""Every kind of adapted layer against the dense reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flix.backends.jax import (
    adapt,
    disable,
    merge,
)
from flix.backends.jax.adapt import flix_layers
from tests.helpers.dense import dense
from tests.helpers.jax import TARGETS, TOKENS, Block, Net, adapted, pairs_of, randomize
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_close


@nnx.jit
def forward(model: Any, tokens: Any, ids: Any, weights: Any = None) -> Any:
    return model(tokens, flix_features=ids, flix_weights=weights)


@nnx.jit
def plain(model: Any, tokens: Any) -> Any:
    return model(tokens)


@pytest.mark.covers("nnx", "mixed batch", backend="jax")
@pytest.mark.covers("nnx", "per-token routing", backend="jax")
@pytest.mark.parametrize(
    "name", ["embed", "layers.0.q", "layers.0.o", "layers.0.e", "layers.0.back"]
)
@pytest.mark.parametrize("per_token", [False, True])
def test_each_layer_against_the_oracle(name: str, per_token: bool) -> None:
    model = adapted()
    layer = dict(flix_layers(model))[name]
    rng = np.random.default_rng(0)
    ids, weights = IDS, WEIGHTS
    if per_token:
        ids, weights = np.stack([IDS, IDS[::-1]]), np.stack([WEIGHTS, WEIGHTS[::-1]])
    lead = ids.shape[:-1] if per_token else (5, 4)
    if name == "embed":
        x = rng.integers(0, 11, lead)
        flat = np.eye(11)[x]
    else:
        inner = (2, 4) if name.endswith("o") else (6,)
        x = rng.normal(size=(*lead, *inner)).astype(np.float32)
        flat = x.reshape(*lead, -1)

    @nnx.jit
    def call(layer: Any, x: Any, ids: Any, weights: Any) -> Any:
        return layer(x, flix_features=ids, flix_weights=weights)

    y = call(layer, x, ids, weights)
    base = call(layer, x, np.full_like(ids, -1), weights)
    if name.endswith(".e"):  # output [B, T, h, c], kernel [h, a, c]: d_out is (h, c)
        assert y.shape == (*lead, 3, 2)
    d_out = layer.flix_spec.shape.d_out
    if not per_token:
        flat = flat.reshape(5, 4, -1)
    else:
        flat = flat[..., None, :]
    wanted = dense(flat, ids, pairs_of(layer.bank, config(target_modules=TARGETS)), weights).y
    assert wanted.shape[-1] == d_out
    assert_close(y - base, wanted.reshape(y.shape), times=2)


def test_ellipsis_einsum_and_attention() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.att = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.mix = nnx.Einsum("...a,ba->b...", (3, 8), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.mix(self.att(x))

    model = adapt(Model(), config())
    assert "att.query" in dict(flix_layers(model))
    randomize(model)
    row = {"language": "swa", "task": {"pos": 0.5}}
    routing = registry().encode([row] * 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    y = forward(model, x, routing.ids, routing.weights)
    assert y.shape == (3, 2, 3)
    assert_close(plain(merge(model, row), x), y, times=2)


def test_half_precision_base() -> None:
    model = Block(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    adapt(model, config(target_modules=["back"]))
    assert model.back.flix_A.dtype == jnp.float32
    y = model.back(jnp.ones((5, 2, 6), jnp.bfloat16), flix_features=IDS)
    assert y.dtype == jnp.bfloat16


def test_every_kind_of_layer_can_be_disabled() -> None:
    model = adapted()
    plain = nnx.jit(lambda model: model(TOKENS))
    with disable(model):
        y = plain(model)
    assert_close(y, plain(Net()))
