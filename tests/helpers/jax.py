"""Tiny models in flax.nnx and random banks, for the JAX backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import flix  # noqa: E402
from flix.backends.jax import adapt, gather, init, linear, linear_rows, touched  # noqa: E402
from flix.backends.jax.adapt import flix_layers  # noqa: E402
from tests.helpers.dense import Pairs, by_id, dense  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402


def random_bank(
    cfg: flix.FlixConfig, layers: dict[str, Any], seed: int = 0, std: float = 0.3
) -> Any:
    rng = np.random.default_rng(seed)
    bank = init(cfg, layers)
    return jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) * std, t.dtype), bank)


def pairs_of(layer: Any, settings: flix.FlixConfig) -> Pairs:
    """A bank's layer for the dense reference."""
    return by_id(settings, ((f, *layer.pair(*f)) for f in settings.registry.features))


class Block(nnx.Module):
    """An attention-like block with every kind of target."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.o = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)
        self.e = nnx.Einsum("bta,hac->bthc", (3, 6, 2), (3, 2), rngs=rngs)
        self.back = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.drop(self.o(jax.nn.gelu(self.q(x))))
        mixed = self.e(x).reshape(*x.shape[:2], 6)
        return x + self.back(jax.nn.gelu(mixed))


class Net(nnx.Module):
    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.layers = nnx.List([Block(rngs)])
        self.lm_head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TARGETS = ["embed", "q", "o", "e", "back"]
TOKENS = np.random.default_rng(5).integers(0, 11, (5, 4))


def randomize(model: Any, seed: int = 0, std: float = 0.3) -> None:
    rng = np.random.default_rng(seed)
    for _, layer in flix_layers(model):
        for table in (layer.flix_A, layer.flix_B):
            table[...] = jnp.asarray(rng.normal(size=table.shape) * std, table.dtype)


def adapted(seed: int = 0, **changes: Any) -> Any:
    model = adapt(Net(seed), config(**{"target_modules": TARGETS, **changes}))
    randomize(model)
    return model


D_IN, D_OUT = 5, 7

RNG = np.random.default_rng(1)

KERNEL = jnp.asarray(RNG.normal(size=(D_IN, D_OUT)), jnp.float32)

BIAS = jnp.asarray(RNG.normal(size=D_OUT), jnp.float32)


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def value_and_pullback(call: Any, g: Any, *args: Any) -> Any:
    """The value and the gradients under the cotangent g, compiled in one piece."""

    def run(g: Any, *args: Any) -> Any:
        y, back = jax.vjp(call, *args)
        return y, back(g)

    return jax.tree.map(np.asarray, jax.jit(run)(g, *args))


def check(layer: Any, cfg: Any, x: Any, ids: Any, weights: Any, strategy: str, rows: bool) -> None:
    """Forward and all gradients of one call against the oracle."""
    x, ids = jnp.asarray(x), np.asarray(ids)
    lead = ids.shape[:-1]
    g = normal(*x.shape[:-1], D_OUT)
    flat = (*lead, -1)
    wanted = dense(
        x.reshape(*flat, D_IN), ids, pairs_of(layer, cfg), weights, dy=g.reshape(*flat, D_OUT)
    )
    present = touched(ids, len(cfg.registry))

    def call(x: Any, w: Any, layer: Any) -> Any:
        if rows:
            part = gather({"q": layer}, present)["q"]
            return linear_rows(x, KERNEL, part, ids, present, w, bias=BIAS, strategy=strategy)
        return linear(x, KERNEL, layer, ids, w, bias=BIAS, strategy=strategy)

    w = None if weights is None else jnp.asarray(weights)
    y, (dx, dw, dlayer) = value_and_pullback(call, g, x, w, layer)
    base = np.asarray(x, np.float64) @ np.asarray(KERNEL, np.float64) + np.asarray(BIAS, np.float64)
    assert_close(y, base + wanted.y.reshape(y.shape))
    assert_close(
        dx,
        np.asarray(g, np.float64) @ np.asarray(KERNEL, np.float64).T + wanted.x.reshape(x.shape),
    )
    if weights is not None:
        assert_close(dw, wanted.weights)
    for i, feature in enumerate(cfg.registry.features):
        a, b = dlayer.pair(*feature)
        assert_close(a, wanted.A[i])
        assert_close(b, wanted.B[i])
