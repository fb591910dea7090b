"""Layers stacked for scan act as the same layers in a Python loop (docs/specification.md §5.3)."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import optax
import pytest

import flix
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adapt,
    clip_by_feature_norm,
    disable,
    freeze,
    scale_by_feature_adam,
    scale_by_feature_rate,
)
from flix.backends.jax.adapt import flix_layers
from flix.backends.jax.primitives import read
from tests.helpers.jax import jax, jnp, nnx, randomize
from tests.helpers.jax_stacks import (
    CALL,
    DEPTH,
    ROWS,
    TOKENS,
    WAYS,
    Looped,
    Stacked,
    both,
    called,
    dense_step,
    pair,
    same,
    settings,
    stack_of,
    step,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close


def test_each_layer_of_a_stack_starts_as_the_same_layer_by_itself() -> None:
    stacked, looped = adapt(Stacked(), settings()), adapt(Looped(), settings())
    assert stacked.layers.q.flix_A.shape == (DEPTH, 12, 4)
    assert stacked.layers.q.flix_B.shape == (DEPTH, 12, 6)
    paths = [*read(stacked)]
    assert "layers.2.mlp.layers.0" in paths and {*paths} == {*read(looped)}
    for path, pairs in read(stacked).items():
        for feature, own in pairs.items():
            for value, other in zip(own, read(looped)[path][feature], strict=True):
                np.testing.assert_array_equal(value, other)


@nnx.jit(graph_updates=False)
def gradients(model: Any) -> Any:
    def of(model: Any, weights: Any) -> Any:
        return (model(TOKENS, flix_features=ROWS, flix_weights=weights) ** 2).sum()

    pull = nnx.value_and_grad(of, argnums=(nnx.DiffState(0, FlixParam), 1))
    value, (grads, weights) = pull(model, jnp.asarray(WEIGHTS))
    return value, nnx.as_pure(grads), weights


@functools.cache
def wanted_gradients() -> Any:
    return gradients(both()[1])


@pytest.mark.covers("stacks", "mixed batch", backend="jax")
@pytest.mark.covers("stacks", "gradients", backend="jax")
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_those_of_the_loop(way: str) -> None:
    model = copy.deepcopy(both()[0])
    model.way = way
    (value, grads, weights), (wanted, parts, by_weights) = gradients(model), wanted_gradients()
    assert_close(value, wanted, dtype="float32")
    assert_close(weights, by_weights, dtype="float32", times=10)
    for name in ("q", "e", "o"):
        for table in ("flix_A", "flix_B"):
            own = [parts["layers"][i][name][table] for i in range(DEPTH)]
            assert_close(grads["layers"][name][table], jnp.stack(own), dtype="float32", times=10)


@pytest.mark.covers("stacks", "disable", backend="jax")
def test_where_nothing_is_compiled_around_the_scan_outputs_are_the_same() -> None:
    stacked, looped = both()
    assert_close(stacked(TOKENS, **CALL), called(looped, TOKENS, ROWS, jnp.asarray(WEIGHTS)))
    base = called(looped, TOKENS, jnp.full_like(ROWS, -1))
    with disable(stacked):
        assert_close(stacked(TOKENS), base)
        assert_close(nnx.jit(lambda model, x: model(x))(stacked, TOKENS), base)


def test_another_batch_is_served_by_the_same_program() -> None:
    stacked, looped = both()
    traced = []

    @nnx.jit(graph_updates=False)
    def run(model: Any, x: Any, ids: Any) -> Any:
        traced.append(1)
        return model(x, flix_features=ids)

    for ids in (IDS, IDS[::-1].copy(), np.roll(IDS, 1, 0)):
        ids = jnp.asarray(ids)
        assert_close(run(stacked, TOKENS, ids), called(looped, TOKENS, ids))
    assert len(traced) == 1


@pytest.mark.covers("stacks", "per-token routing", backend="jax")
@pytest.mark.parametrize("strategy", ["gather", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_batch_as_large_as_the_stack_and_rows_by_token_are_not_taken_for_layers(
    strategy: str,
) -> None:
    stacked, looped = copy.deepcopy(both())
    for model in (stacked, looped):
        for _, layer in flix_layers(model):
            layer.flix_strategy = strategy
    x = TOKENS[:DEPTH]
    by_token = np.random.default_rng(2).integers(-1, 6, (DEPTH, 3, 2))
    for ids in (IDS[:DEPTH], by_token):
        ids = jnp.asarray(ids)
        assert_close(called(stacked, x, ids), called(looped, x, ids))


@pytest.mark.covers("stacks", "absent features", backend="jax")
@pytest.mark.parametrize("run", [step, pytest.param(dense_step, marks=pytest.mark.slow)])
def test_training_is_the_loops_and_absent_features_keep_their_bits(run: Any) -> None:
    models = copy.deepcopy(both())
    ids = jnp.asarray([[0, 4], [1, 4], [0, -1], [4, -1], [1, 0]], jnp.int32)
    before = copy.deepcopy(read(models[0]))
    losses = []
    for model in models:
        freeze(model, {"language": ["swa"]})
        tx = optax.chain(
            scale_by_feature_adam(),
            clip_by_feature_norm({("language", "hau"): 0.5, "task": 2.0}, model),
            optax.add_decayed_weights(0.1),
            scale_by_feature_rate(
                {"language": 1e-2, "task": optax.linear_schedule(1e-2, 0, 4)}, model
            ),
        )
        optimizer = FlixOptimizer(model, tx)
        losses.append([float(run(model, optimizer, ids, TOKENS)) for _ in range(3)])
    assert_close(losses[0], losses[1], dtype="float32", times=10)
    same(*models, times=100)
    moved = set()
    for path, pairs in read(models[0]).items():
        for feature, own in pairs.items():
            alike = [np.array_equal(a, b) for a, b in zip(own, before[path][feature], strict=True)]
            if feature in {("language", "hau"), ("task", "ner")}:
                assert not any(alike), (path, feature)
                moved.add(path)
            else:
                assert all(alike), (path, feature)
    assert len(moved) == 2 + 4 * DEPTH


@pytest.mark.slow
def test_an_optimizer_that_looks_at_whole_tables_keeps_absent_features_too() -> None:
    model = copy.deepcopy(both()[0])
    optimizer = FlixOptimizer(model, optax.lamb(1e-2))
    before = read(model)
    step(model, optimizer, jnp.asarray([[0, 4]] * 5, jnp.int32), TOKENS)
    for path, pairs in read(model).items():
        for feature, own in pairs.items():
            alike = [np.array_equal(a, b) for a, b in zip(own, before[path][feature], strict=True)]
            assert all(alike) != (feature in {("language", "hau"), ("task", "ner")})


def test_a_model_that_is_a_stack_itself_can_be_scanned_from_within() -> None:
    class Whole(nnx.Module):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0, 0))
        def __init__(self, rngs: Any) -> None:
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(4))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.linear(x)) * self.scale[...]

    model = adapt(Whole(nnx.Rngs(0)), config())
    assert model.linear.flix_spec.stack == ("linear.0", "linear.1", "linear.2")
    randomize(model)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for ids in (IDS[:3], IDS[2::-1].copy()):
        got = called(model, x, jnp.asarray(ids))
        wanted = x
        for i in range(3):
            graph, state = nnx.split(model.linear)
            layer = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state))
            wanted = wanted + np.tanh(layer(wanted, flix_features=ids))
        assert_close(got, wanted)
        assert_close(model(x, flix_features=ids), wanted)


@pytest.mark.slow
def test_masks_are_those_of_the_loop() -> None:
    stacked, looped = pair(lora_dropout=0.5)
    for model in (stacked, looped):
        model.train()
    for _ in range(2):  # the streams go on
        got = nnx.jit(lambda m, x, ids: m(x, flix_features=ids))(stacked, TOKENS, ROWS)
        wanted = nnx.jit(lambda m, x, ids: m(x, flix_features=ids))(looped, TOKENS, ROWS)
        assert_close(got, wanted)
    stacked.way = "states"
    assert stacked(TOKENS, **CALL).shape == (5, 3, 5)

    def whole(layers: Any, x: Any) -> Any:
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        return run(x, layers)

    WAYS["whole"] = whole
    try:
        stacked.way = "whole"
        with pytest.raises(flix.TargetError, match=r"RngState along axis 0"):
            stacked(TOKENS, **CALL)
    finally:
        del WAYS["whole"]


def test_a_stack_on_a_mesh_keeps_its_axes_and_their_names() -> None:
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("layers", "model"), axis_types=auto)

    class Net(nnx.Module):
        def __init__(self) -> None:
            def make(rngs: Any) -> Any:
                init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
                return nnx.Linear(4, 4, kernel_init=init, rngs=rngs)

            self.layers = stack_of(make, 3, transform_metadata={nnx.PARTITION_NAME: "layers"})

        def __call__(self, x: Any) -> Any:
            @nnx.scan(
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            def run(x: Any, layer: Any) -> Any:
                return layer(x)

            return run(x, self.layers)

    with jax.set_mesh(mesh):
        plain = Net()
        model = adapt(plain, config())
        assert model.layers.flix_A.get_metadata()["out_sharding"] == ("layers", None, None)
        assert model.layers.flix_B.get_metadata()["out_sharding"] == ("layers", None, "model")
        y = nnx.jit(lambda m, x, ids: m(x, flix_features=ids))(model, jnp.ones((5, 4)), ROWS)
        assert y.shape == (5, 4)
        assert model.layers.flix_B.get_metadata()["out_sharding"] == ("layers", None, "model")


def test_a_feature_that_is_not_finite_in_one_layer_is_named() -> None:
    stacked = copy.deepcopy(both()[0])
    table = stacked.layers.q.flix_A
    table[...] = table[...].at[1, 0, 0].set(np.nan)
    stacked.eval()
    with pytest.warns(UserWarning, match="language=hau"):
        called(stacked, TOKENS, ROWS)
