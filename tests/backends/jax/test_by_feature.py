"""Losses, clipping, learning rates and steps, feature by feature; and tenants that end where they would have alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flix
from flix import ConfigError, FeatureError, RoutingError
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adapt,
    clip_by_feature_norm,
    gather,
    init,
    linear,
    linear_rows,
    losses_by_feature,
    mask_absent,
    scale_by_feature_adam,
    scale_by_feature_rate,
    sparse_update,
    touched,
    value_and_grad,
)
from flix.backends.jax.primitives import read
from tests.helpers.jax_stacks import TOKENS, pair
from tests.helpers.registry import IDS, registry
from tests.helpers.tolerance import assert_close

ROWS = [{"task": "pos"}, {"task": "ner", "language": "hau"}, {"language": "swa"}, {"task": "pos"}]
NAMES = ["ann", "ben", "cyd"]
RATES = {"ann": optax.cosine_decay_schedule(3e-2, 40), "ben": 1e-2, "cyd": 2e-2}
NORMS = {"ann": 0.3, "cyd": 0.05}
LIMITS = {"cyd": 15}
LAYERS = {"up": (5, 7), "down": (7, 5)}
STEPS = 50


def config(names: list[str]) -> flix.FlixConfig:
    ranks = {"tenant": {name: 1 + NAMES.index(name) for name in names}}
    return flix.FlixConfig(registry=flix.FeatureRegistry({"tenant": names}), ranks=ranks)


def by_name(given: dict[str, Any], names: list[str]) -> dict[Any, Any]:
    return {("tenant", name): given[name] for name in names if name in given}


def optimizer(names: list[str], model: Any = None) -> Any:
    return optax.chain(
        clip_by_feature_norm(by_name(NORMS, names), model),
        scale_by_feature_adam(),
        optax.add_decayed_weights(0.1),
        scale_by_feature_rate(by_name(RATES, names), model, steps=by_name(LIMITS, names)),
    )


def bank(names: list[str]) -> Any:
    """Every tenant's values are its own, whoever else is there."""
    made = init(config(names), LAYERS, dtype=jnp.float64)
    for path, layer in made.items():
        a, b = np.array(layer.A), np.array(layer.B)
        for feature in layer.spec.registry.features:
            rows = layer.spec.row_range(feature)
            rng = np.random.default_rng([NAMES.index(feature[1]), a.shape[1]])
            a[rows], b[rows] = (rng.normal(size=t[rows].shape) * 0.3 for t in (a, b))
        made[path] = replace(layer, A=jnp.asarray(a), B=jnp.asarray(b))
    return made


def batches() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Four rows, each of some tenant; some labels count for nothing."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        owners, counts = rng.integers(0, len(NAMES), 4), rng.integers(0, 2, (4, 3))
        counts[:, 0] = 1
        found.append((owners, rng.normal(size=(4, 3, 5)), counts))
    return found


def token_losses(layers: Any, x: Any, ids: Any, present: Any = None) -> Any:
    rng = np.random.default_rng(9)
    for path, (d_in, d_out) in LAYERS.items():
        kernel = jnp.asarray(rng.normal(size=(d_in, d_out)))
        if present is None:
            x = jnp.tanh(linear(x, kernel, layers[path], ids))
        else:
            x = jnp.tanh(linear_rows(x, kernel, layers[path], ids, present))
    return (x**2).sum(-1)


def mixed(sparse: bool) -> Any:
    table = config(NAMES).registry
    values, tx = bank(NAMES), optimizer(NAMES)
    tx = tx if sparse else mask_absent(tx)
    state = tx.init(values)

    @jax.jit
    def step(values: Any, state: Any, ids: Any, x: Any, counts: Any) -> Any:
        present = touched(ids, len(NAMES))

        def loss(layers: Any) -> Any:
            losses = token_losses(layers, x, ids, present if sparse else None)
            means = losses_by_feature(losses, ids, "tenant", counts=counts, registry=table)
            return means.sum()

        if sparse:
            grads = jax.grad(loss)(gather(values, present))
            return sparse_update(tx, grads, state, values, present)
        updates, state = tx.update(jax.grad(loss)(values), state, values, flix_features=ids)
        return optax.apply_updates(values, updates), state

    for owners, x, counts in batches():
        values, state = step(values, state, jnp.asarray(owners[:, None]), x, counts)
    return values


@functools.cache
def alone(name: str) -> Any:
    """One tenant's run in plain optax: its rows, their mean loss, optax's own clipping, Adam and schedule."""
    values = bank([name])
    tx = optax.chain(
        optax.clip_by_global_norm(NORMS[name]) if name in NORMS else optax.identity(),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(RATES[name]),
    )
    state, taken = tx.init(values), 0

    # Shapes differ from step to step: rows of others count for nothing instead of being left out.
    @jax.jit
    def step(values: Any, state: Any, ids: Any, x: Any, counts: Any) -> Any:
        def loss(layers: Any) -> Any:
            return (token_losses(layers, x, ids) * counts).sum() / counts.sum()

        updates, state = tx.update(jax.grad(loss)(values), state, values)
        return optax.apply_updates(values, updates), state

    for owners, x, counts in batches():
        mine = owners == NAMES.index(name)
        if mine.any() and taken < LIMITS.get(name, STEPS):
            ids = np.where(mine, 0, -1)[:, None]
            values, state = step(values, state, ids, x, counts * mine[:, None])
            taken += 1
    assert taken >= 15
    return jax.tree.map(np.asarray, values)


@pytest.mark.parametrize("sparse", [False, True])
def test_each_ends_where_it_would_have_ended_alone(sparse: bool) -> None:
    with jax.enable_x64(True):
        found, start = (jax.tree.map(np.asarray, b) for b in (mixed(sparse), bank(NAMES)))
        for name in NAMES:
            expected = alone(name)
            for path, layer in found.items():
                rows = layer.spec.row_range(("tenant", name))
                for side in ("A", "B"):
                    mine = getattr(layer, side)[rows]
                    assert mine.dtype == np.float64
                    assert np.abs(mine - getattr(expected[path], side)).max() < 1e-9
                    assert np.abs(mine - getattr(start[path], side)[rows]).max() > 1e-2


class Two(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(jnp.tanh(self.up(x)))


def trained(names: list[str], plain: bool) -> dict[str, Any]:
    """The tables of an nnx model after some steps, each as one vector a tenant, by layer and tenant."""
    model = adapt(Two(), config(names))
    table, made = model.flix_config.registry, FlixOptimizer(model, optimizer(names, model))

    @nnx.jit
    def step(model: Any, made: Any, ids: Any, x: Any) -> None:
        def loss(model: Any, ids: Any, x: Any) -> Any:
            losses = (model(x, flix_features=ids) ** 2).sum((1, 2))
            return losses_by_feature(losses, ids, "tenant", registry=table).sum()

        if plain:
            grads = nnx.grad(loss, argnums=nnx.DiffState(0, FlixParam))(model, ids, x)
            made.update(model, grads, flix_features=ids)
        else:
            made.update(model, value_and_grad(loss)(model, ids, x)[1])

    for owners, x, _ in batches()[:6]:
        ids = [[names.index(NAMES[i])] if NAMES[i] in names else [-1] for i in owners]
        step(model, made, jnp.asarray(ids, jnp.int32), jnp.asarray(x, jnp.float32))
    return {
        f"{path} {name}": np.concatenate(
            [np.ravel(np.asarray(t[...])[layer.flix_spec.row_range(("tenant", name))]) for t in (layer.flix_A, layer.flix_B)]
        )
        for path, layer in (("up", model.up), ("down", model.down))
        for name in names
    }  # fmt: skip


def test_nnx_models_take_the_same_steps_as_each_alone() -> None:
    found, apart = trained(NAMES, False), trained(["ben"], True)
    assert list(apart) == ["up ben", "down ben"]
    for key, values in apart.items():
        assert np.abs(values - found[key]).max() < 1e-5, key


def test_losses_are_means_over_each_features_own_rows() -> None:
    routing = registry().encode(ROWS)
    losses = jnp.arange(1.0, 5.0)

    def of(losses: Any) -> Any:
        return losses_by_feature(losses, routing, "task")

    assert of(losses).tolist() == [2.0, 2.5]  # ner, pos
    grads = jax.grad(lambda v: of(v).sum())(losses)
    assert grads.tolist() == [0.5, 1.0, 0.0, 0.5]
    found = losses_by_feature(losses.at[1].set(jnp.inf), routing, "task")
    assert found.tolist() == [jnp.inf, 2.5]
    counts = np.array([[1, 0], [0, 0], [1, 1], [2, 1]])
    tokens = jnp.arange(1.0, 9.0).reshape(4, 2).at[1].set(jnp.nan)
    found = losses_by_feature(tokens, routing, "task", counts=counts)
    assert found.tolist() == [0.0, (1 + 2 * 7 + 8) / 4]
    assert losses_by_feature(losses, routing, "language").tolist() == [2.0, 3.0, 0.0, 0.0]


def test_a_row_of_two_is_an_error_or_nan() -> None:
    routing = registry().encode([{"task": ["ner", "pos"]}, {"language": "hau"}])
    losses = jnp.ones(2)
    with pytest.raises(RoutingError, match="row 0 names task=ner and task=pos"):
        losses_by_feature(losses, routing, "task")
    ids, table = jnp.asarray(routing.ids), routing.registry
    run = jax.jit(lambda ids, group: losses_by_feature(losses, ids, group, registry=table), static_argnums=1)  # fmt: skip
    assert jnp.isnan(run(ids, "task")).all()
    assert run(ids, "language").tolist() == [1.0, 0.0, 0.0, 0.0]


def test_losses_that_do_not_fit_are_refused() -> None:
    routing = registry().encode(ROWS)
    with pytest.raises(RoutingError, match=r"an entry for each row, \[4\] or \[4, length\], got \[\]"):  # fmt: skip
        losses_by_feature(1.0, routing, "task")
    with pytest.raises(RoutingError, match=r"counts must have the shape of losses, \[4\], got"):
        losses_by_feature(jnp.ones(4), routing, "task", counts=jnp.ones((4, 1)))
    with pytest.raises(RoutingError, match="ids alone do not say to which registry they belong"):
        losses_by_feature(jnp.ones(4), routing.ids, "task")
    with pytest.raises(FeatureError, match="no feature group 'tsak'"):
        losses_by_feature(jnp.ones(4), routing, "tsak")


def test_a_gradient_that_is_not_finite_changes_no_other() -> None:
    values = init(config(NAMES), LAYERS)
    grads = jax.tree.map(jnp.ones_like, values)
    rows = values["up"].spec.row_range(("tenant", "ben"))
    grads["up"] = replace(grads["up"], A=grads["up"].A.at[rows].set(jnp.nan))
    tx = clip_by_feature_norm({"tenant": 1.0, ("tenant", "cyd"): 1e9})
    found, _ = tx.update(grads, tx.init(values))
    sizes = {name: 24 * (1 + i) for i, name in enumerate(NAMES)}  # ones
    for path, layer in found.items():
        for name, wanted in (("ann", sizes["ann"] ** -0.5), ("cyd", 1.0)):
            mine = np.asarray(layer.A)[layer.spec.row_range(("tenant", name))]
            assert np.allclose(mine, wanted, rtol=1e-6), (path, name)
    rows = values["down"].spec.row_range(("tenant", "ben"))
    assert np.isnan(np.asarray(found["down"].A)[rows]).all()


def test_mistakes_are_named() -> None:
    values = init(config(NAMES), LAYERS)
    with pytest.raises(ConfigError, match="max_norm must be a positive number, got 0"):
        clip_by_feature_norm(0)
    with pytest.raises(FeatureError, match="no feature group 'tennant'"):
        clip_by_feature_norm({"tennant": 1.0}).init(values)
    with pytest.raises(ConfigError, match="rate must name every feature, but tenant=ben, tenant=cyd is missing"):  # fmt: skip
        scale_by_feature_rate({("tenant", "ann"): 1.0}).init(values)
    with pytest.raises(ConfigError, match="rate must be a finite number, got 'fast'"):
        scale_by_feature_rate("fast").init(values)
    with pytest.raises(ConfigError, match="steps of 'tenant' must be a whole number of 1 or more"):
        scale_by_feature_rate(1.0, steps={"tenant": 0}).init(values)
    with pytest.raises(
        ConfigError, match="there are other parameters too; give those an optimizer"
    ):
        scale_by_feature_rate(1.0).init({**values, "head": jnp.ones(3)})


@pytest.mark.slow
def test_layers_that_are_stacked_take_the_steps_of_layers_by_themselves() -> None:
    stacked, looped = pair()
    rates = {"language": 1e-2, "task": optax.linear_schedule(1e-2, 1e-3, 3)}
    for model in (stacked, looped):
        tx = optax.chain(
            clip_by_feature_norm({"language": 0.01, ("task", "pos"): 0.02}, model),
            scale_by_feature_rate(rates, model, steps={("language", "hau"): 1}),
        )
        made = FlixOptimizer(model, tx)

        @nnx.jit
        def step(model: Any, made: Any, ids: Any) -> None:
            made.update(model, value_and_grad(loss)(model, ids, TOKENS)[1])

        def loss(model: Any, ids: Any, x: Any) -> Any:
            return (model(x, flix_features=ids) ** 2).mean()

        for _ in range(2):
            step(model, made, jnp.asarray(IDS))
    got, wanted = read(stacked), read(looped)
    assert got.keys() == wanted.keys()
    for path, pairs in got.items():
        for feature, own in pairs.items():
            for value, other in zip(own, wanted[path][feature], strict=True):
                assert_close(value, other, dtype="float32", name=f"{path} {feature}")
