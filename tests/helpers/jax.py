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
from flix.backends.jax import adapt, init  # noqa: E402
from flix.backends.jax.model import flix_layers  # noqa: E402
from tests.helpers.dense import Pairs, by_id  # noqa: E402
from tests.helpers.registry import config  # noqa: E402


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
