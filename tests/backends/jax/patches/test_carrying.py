"""Transformations of flax inside a model's forward: every request gets its own features, never those in a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import FlixOptimizer, adamw, adapt, disable, merge, value_and_grad
from flix.backends.jax.adapt import flix_layers
from flix.backends.jax.routing import CARRIED
from flix.backends.jax.scopes import MARK
from tests.helpers.jax import randomize
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close, assert_far

X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("f")
REQUESTS = [np.array(ids) for ids in ([[0, 4], [1, -1]], [[5, 1], [4, 0]], [[-1, -1], [2, 4]])]


def plain(layer: Any, x: Any) -> Any:
    return layer(x)


def kept(call: Any) -> Any:
    """A module-level function, wrapped once: what its cache keeps, later requests would get."""
    return lambda m, x: call(m.q, x)


SCANNED = nnx.scan(
    lambda c, layer, x: (c, layer(x)), in_axes=(nnx.Carry, None, 1), out_axes=(nnx.Carry, 1)
)


def merged(graph: Any, state: Any, x: Any) -> Any:
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


WRAPS: dict[str, Any] = {
    "remat": kept(nnx.remat(plain)),
    "jit": kept(nnx.jit(plain)),
    "remat in jit": kept(nnx.jit(nnx.remat(plain))),
    "vmap": kept(nnx.vmap(plain, in_axes=(None, 1), out_axes=1)),
    "scan": lambda m, x: SCANNED(0, m.q, x)[1],
    "cond": kept(nnx.jit(lambda m, x: nnx.cond(x.sum() < 1e9, plain, lambda m, x: x, m, x))),
    "checkpoint of the module": kept(jax.checkpoint(plain)),
    "jax.jit of the module": kept(jax.jit(plain)),
    "merged": lambda m, x: merged(*nnx.split(m.q), x),
}


class Net(nnx.Module):
    def __init__(self, wrap: Any = None) -> None:
        self.q, self.o = (nnx.Linear(6, 6, rngs=nnx.Rngs(k)) for k in (0, 1))
        self.wrap = wrap

    def __call__(self, x: Any) -> Any:
        x = self.wrap(self, x) if self.wrap else self.q(x)
        return self.o(jnp.tanh(x))


def model_of(wrap: Any = None) -> Any:
    model = adapt(Net(wrap), config(target_modules=["q", "o"]))
    randomize(model)
    return model


@nnx.jit
def compiled(model: Any, x: Any, ids: Any) -> Any:
    return model(x, flix_features=ids)


def eager(model: Any, x: Any, ids: Any) -> Any:
    return model(x, flix_features=ids)


def clean(model: Any) -> None:
    """Nothing of a forward is left on the model."""
    for module in (model, *(layer for _, layer in flix_layers(model))):
        assert not {CARRIED, MARK} & {*vars(module)}


@pytest.mark.parametrize("name", WRAPS)
def test_caches_inside_keep_no_routing(name: str) -> None:
    model, reference = model_of(WRAPS[name]), model_of()
    for call in (eager, compiled):
        for ids in (*REQUESTS[:2], REQUESTS[0]):
            assert_close(call(model, X, ids), reference(X, flix_features=ids))
        with disable(model):
            assert_close(call(model, X, REQUESTS[0]), Net()(X))
        with disable(reference):
            y = call(model, X, REQUESTS[1])
        assert_close(y, reference(X, flix_features=REQUESTS[1]))
    clean(model)
    with pytest.raises(flix.RoutingError, match="without routing"):
        model(X)


@pytest.mark.parametrize(("name", "whole"), [("remat", 0), ("remat", 1), ("jit", 0), ("scan", 1)])
def test_training_at_the_batch_cost_inside_of_caches(name: str, whole: int) -> None:
    """The tables then hold the rows of the batch's features alone, and which these are changes with it."""

    def loss(model: Any, ids: Any, x: Any) -> Any:
        return (model(x, flix_features=ids) ** 2).mean()

    def step(model: Any, optimizer: Any, ids: Any, x: Any) -> Any:
        value, grads = value_and_grad(loss)(model, ids, x)
        optimizer.update(model, grads)
        return value

    if whole:
        step = nnx.jit(step)
    found = []
    for model in (model_of(WRAPS[name]), model_of()):
        optimizer = FlixOptimizer(model, adamw(1e-2))
        found.append([step(model, optimizer, ids, X) for ids in REQUESTS])
        found[-1] += [layer.flix_A[...] for _, layer in flix_layers(model)]
        clean(model)
    for a, b in zip(*found, strict=True):
        assert_close(a, b, times=10)


def test_a_model_inside_of_a_loss_that_is_compiled_by_itself() -> None:
    inner = nnx.jit(lambda m, x, ids: m(x, flix_features=ids))
    loss = lambda m, ids, x: (inner(m, x, ids) ** 2).mean()  # noqa: E731
    wanted = lambda m, ids, x: (m(x, flix_features=ids) ** 2).mean()  # noqa: E731
    model = model_of()
    for ids in REQUESTS:
        a, b = (value_and_grad(of)(model, ids, X) for of in (loss, wanted))
        assert_close(a[0], b[0])
        jax.tree.map(assert_close, a[1].rows, b[1].rows)


def test_one_entry_of_a_cache_serves_all_requests() -> None:
    traces = []

    def block(layer: Any, x: Any) -> Any:
        traces.append(1)
        return layer(x)

    model = model_of(kept(nnx.jit(block)))
    for ids in REQUESTS:
        model(X, flix_features=ids)
    assert len(traces) == 1


def test_copies_made_in_a_forward_do_not_keep_its_routing() -> None:
    copies = []
    model = model_of(lambda m, x: copies.append(nnx.clone(m.q)) or m.q(x))
    model(X, flix_features=REQUESTS[0])
    with pytest.raises(flix.RoutingError, match="no routing is in force"):
        copies[0](X)
    assert merge(model, {"language": "hau"}) is not None


def test_disabled_copies_are_so_while_the_block_is_open() -> None:
    model = model_of()
    before = nnx.clone(model)
    with disable(model):
        inside = nnx.clone(model)
        assert_close(inside(X), Net()(X))
        assert_close(compiled(inside, X, REQUESTS[0]), Net()(X))
        acts = before(X, flix_features=REQUESTS[0])
        assert_far(acts, Net()(X))
        assert_close(compiled(before, X, REQUESTS[0]), acts)
    assert_close(inside(X, flix_features=REQUESTS[0]), acts)
    assert_close(compiled(inside, X, REQUESTS[0]), acts)
