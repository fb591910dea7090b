"""The same tiny model twice in flax.nnx: its layers stacked, run in one of several ways, and in a Python loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flix.backends.jax import FlixParam, adapt, value_and_grad
from flix.backends.jax.primitives import read, write
from tests.helpers.jax import jax, jnp, nnx, randomize
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close

DEPTH, WIDTH = 3, 4
TOKENS = np.random.default_rng(5).integers(0, 11, (5, 3))


class Block(nnx.Module):
    """Every kind of target that reads vectors, a norm, and a part of its own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.q = nnx.LinearGeneral(WIDTH, (2, 3), rngs=rngs)
        self.e = nnx.Einsum("bthc,hcd->btd", (2, 3, WIDTH), rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(WIDTH, 6, rngs=rngs), jax.nn.gelu)
        self.o = nnx.Linear(6, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.e(jax.nn.gelu(self.q(self.norm(x))))
        return x + self.o(self.mlp(x))


def stack_of(make: Callable[[Any], Any], *sizes: int, **given: Any) -> Any:
    """Modules stacked along as many axes."""
    for size in reversed(sizes):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, axis_size=size, **given))
    return make(nnx.Rngs(7))


def over_scan(layers: Any, x: Any) -> Any:
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return run(x, layers)


def over_states(layers: Any, x: Any) -> Any:
    """Parameters and streams taken apart, all else handed over whole."""
    axes = nnx.StateAxes({nnx.Param: 0, nnx.RngState: 0, ...: None})
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
    return run(x, layers)


def over_remat(layers: Any, x: Any) -> Any:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: Any, layer: Any) -> Any:
        return nnx.remat(lambda layer, x: layer(x))(layer, x)

    return run(x, layers)


def over_jit(layers: Any, x: Any) -> Any:
    return nnx.jit(over_scan)(layers, x)


def over_places(layers: Any, x: Any) -> Any:
    """By number, inside of a scan over numbers."""
    graph, state = nnx.split(layers)

    def body(x: Any, i: Any) -> Any:
        return nnx.merge(graph, jax.tree.map(lambda v: v[i], state))(x), None

    return jax.lax.scan(body, x, jnp.arange(DEPTH))[0]


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "scan": over_scan,
    "states": over_states,
    "remat": over_remat,
    "jit": over_jit,
    "places": over_places,
}


class Stacked(nnx.Module):
    def __init__(self, way: str = "scan", **given: Any) -> None:
        rngs = nnx.Rngs(0)
        self.way = way
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.layers = stack_of(Block, DEPTH, **given)
        self.lm_head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.lm_head(WAYS[self.way](self.layers, self.embed(tokens)))


class Looped(nnx.Module):
    """The same values, layer by layer."""

    def __init__(self) -> None:
        whole = Stacked()
        self.embed, self.lm_head = whole.embed, whole.lm_head
        graph, state = nnx.split(whole.layers)
        parts = [jax.tree.map(lambda v, i=i: v[i], state) for i in range(DEPTH)]
        self.layers = nnx.List([nnx.merge(graph, part) for part in parts])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def settings(**changes: Any) -> Any:
    """ "mlp.layers.0" is the path of a Sequential's first layer."""
    return config(**{"target_modules": r".*(embed|q|o|e|lm_head|mlp\.layers\.0)", **changes})


def pair(way: str = "scan", **changes: Any) -> tuple[Any, Any]:
    """Both models, adapted, with the same pairs."""
    models = adapt(Stacked(way), settings(**changes)), adapt(Looped(), settings(**changes))
    randomize(models[0])
    write(models[1], read(models[0]))
    return models


ROWS = jnp.asarray(IDS)
CALL = {"flix_features": IDS, "flix_weights": WEIGHTS}


def same(one: Any, two: Any, times: float = 1.0) -> None:
    """Both models hold the same values in the same layers."""
    got, wanted = read(one), read(two)
    assert got.keys() == wanted.keys()
    for path, pairs in got.items():
        assert pairs.keys() == wanted[path].keys()
        for feature, own in pairs.items():
            for value, other in zip(own, wanted[path][feature], strict=True):
                assert_close(value, other, dtype="float32", times=times, name=f"{path} {feature}")


def loss(model: Any, ids: Any, x: Any) -> Any:
    return (model(x, flix_features=ids) ** 2).mean()


@nnx.jit
def step(model: Any, optimizer: Any, ids: Any, x: Any) -> Any:
    value, grads = value_and_grad(loss)(model, ids, x)
    optimizer.update(model, grads)
    return value


@nnx.jit
def dense_step(model: Any, optimizer: Any, ids: Any, x: Any) -> Any:
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam))(model, ids, x)
    optimizer.update(model, grads, flix_features=ids)
    return value


@functools.cache
def both() -> tuple[Any, Any]:
    return pair()


@nnx.jit(graph_updates=False)
def called(model: Any, x: Any, ids: Any, weights: Any = None) -> Any:
    return model(x, flix_features=ids, flix_weights=weights)
