"""Layers stacked for scan act as the same layers in a Python loop (docs/specification.md §5.3)."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import flix
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adapt,
    add_feature,
    clip_by_feature_norm,
    disable,
    export_fn,
    freeze,
    load,
    load_features,
    merge,
    remove_feature,
    rename_feature,
    save,
    scale_by_feature_adam,
    scale_by_feature_rate,
    summary,
    to_adapter,
    value_and_grad,
)
from flix.backends.jax.adapt import flix_layers
from flix.backends.jax.primitives import read
from tests.helpers.jax import jax, jnp, nnx, randomize
from tests.helpers.jax_stacks import (
    DEPTH,
    TOKENS,
    WAYS,
    Looped,
    Stacked,
    over_scan,
    pair,
    settings,
    stack_of,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close

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


@functools.cache
def both() -> tuple[Any, Any]:
    return pair()


@nnx.jit(graph_updates=False)
def called(model: Any, x: Any, ids: Any, weights: Any = None) -> Any:
    return model(x, flix_features=ids, flix_weights=weights)


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


@pytest.mark.covers("stacks", "save and load", backend="jax")
def test_files_serve_the_stack_and_the_loop(tmp_path: Path) -> None:
    stacked, looped = both()
    save(stacked, tmp_path / "a")
    save(looped, tmp_path / "b")
    one, two = (flix.load_adapter(tmp_path / name) for name in "ab")
    assert one.layers.keys() == two.layers.keys()
    for name, value in one.tensors.items():
        np.testing.assert_array_equal(value, two.tensors[name])
    assert one.base == two.base  # the same kernels are looked at
    same(load(Looped(), tmp_path / "a"), stacked)
    same(load(Stacked(), tmp_path / "b"), looped)
    one, two = summary(stacked), summary(looped)
    assert dataclasses.replace(one, layers=()) == dataclasses.replace(two, layers=())
    assert {*one.layers} == {*two.layers}


@pytest.mark.covers("stacks", "add a feature", backend="jax")
@pytest.mark.covers("stacks", "remove", backend="jax")
@pytest.mark.covers("stacks", "rename", backend="jax")
@pytest.mark.covers("stacks", "share a feature", backend="jax")
def test_features_over_a_models_life_are_those_of_the_loop(tmp_path: Path) -> None:
    models = copy.deepcopy(both())
    save(models[0], tmp_path / "old")
    for model in models:
        add_feature(model, "language", "xho", rank=2, init_from=["zul", "swa"])
        remove_feature(model, "language", "hau")
        rename_feature(model, "task", "pos", "tagging")
    same(*models)
    ids = jnp.asarray([[6, 4], [1, 5], [3, -1], [5, 6], [-1, -1]])
    assert_close(called(models[0], TOKENS, ids), called(models[1], TOKENS, ids))
    for model in models:
        load_features(model, tmp_path / "old", features={"task": ["pos"]})
    same(*models)
    assert to_adapter(models[0]).tensors.keys() == to_adapter(models[1]).tensors.keys()


def test_layers_join_as_a_whole_stack(tmp_path: Path) -> None:
    full = adapt(Looped(), settings())
    randomize(full)
    save(full, tmp_path / "full")
    models = [adapt(kind(), settings(target_modules=["q"])) for kind in (Stacked, Looped)]
    for model in models:
        load_features(model, tmp_path / "full", conflicts="replace")
    same(*models)
    assert models[0].layers.mlp.layers[0].flix_A.shape[0] == DEPTH
    assert_close(*(called(model, TOKENS, ROWS) for model in models))


@pytest.mark.covers("stacks", "merge", backend="jax")
def test_merging_is_layer_by_layer() -> None:
    stacked, looped = pair(target_modules=r"layers.*(q|o|e)")
    row = {"language": {"swa": 0.5, "zul": -1.5}, "task": "pos"}
    plain = merge(stacked, row)
    assert type(plain) is Stacked and type(plain.layers.q) is nnx.LinearGeneral
    got = nnx.jit(lambda m, x: m(x))(plain, TOKENS)
    assert_close(got, nnx.jit(lambda m, x: m(x))(merge(looped, row), TOKENS))
    routing = stacked.flix_config.registry.encode([row] * 5)
    assert_close(
        got, called(stacked, TOKENS, *map(jnp.asarray, (routing.ids, routing.weights))), times=10
    )


def test_a_stack_of_stacks_and_its_names() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            class Part(nnx.Module):
                def __init__(self, rngs: Any) -> None:
                    make = nnx.split_rngs(splits=2)(nnx.vmap(lambda r: nnx.Linear(4, 4, rngs=r)))
                    self.cells, self.out = make(rngs), nnx.Linear(4, 4, rngs=rngs)

                def __call__(self, x: Any) -> Any:
                    return self.out(over_scan(self.cells, x))

            self.stages = stack_of(Part, 3)

        def __call__(self, x: Any) -> Any:
            return over_scan(self.stages, x)

    model = adapt(Net(), config())
    assert model.stages.cells.flix_spec.lead == (3, 2)
    names = [f"stages.{i}.cells.{j}" for i in range(3) for j in range(2)]
    assert model.stages.cells.flix_spec.stack == (*names,)
    assert model.stages.out.flix_spec.stack == tuple(f"stages.{i}.out" for i in range(3))
    randomize(model)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    got = called(model, x, ROWS)
    for row in range(3):
        own: dict[str, Any] = {}
        for i in IDS[row]:
            if i >= 0:
                group, name = model.flix_config.registry.features[i]
                own.setdefault(group, {}).setdefault(name, 0)
                own[group][name] += 1
        assert_close(got[row], merge(model, own)(x[row : row + 1])[0], times=10)


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


@pytest.mark.covers("stacks", "export", backend="jax")
def test_an_exported_function_scans() -> None:
    stacked, looped = both()
    function, parameters = export_fn(stacked)
    got = jax.jit(function)(parameters, TOKENS, IDS, WEIGHTS)
    assert_close(got, called(looped, TOKENS, ROWS, jnp.asarray(WEIGHTS)))


def test_a_feature_that_is_not_finite_in_one_layer_is_named() -> None:
    stacked = copy.deepcopy(both()[0])
    table = stacked.layers.q.flix_A
    table[...] = table[...].at[1, 0, 0].set(np.nan)
    stacked.eval()
    with pytest.warns(UserWarning, match="language=hau"):
        called(stacked, TOKENS, ROWS)


class Own(nnx.Linear):
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return jnp.tanh(x @ self.kernel[...])


class Single(nnx.Module):
    def __init__(self, make: Any) -> None:
        self.layers = stack_of(make, 3)

    def __call__(self, x: Any) -> Any:
        return over_scan(self.layers, x)


def test_a_stack_of_layers_with_a_forward_of_their_own() -> None:
    model = adapt(Single(lambda rngs: Own(4, 4, rngs=rngs)), config())
    randomize(model)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    got, wanted = model(x, flix_features=IDS), jnp.asarray(x)
    graph, state = nnx.split(model.layers)
    for i in range(3):
        wanted = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state))(
            wanted, flix_features=IDS
        )
    assert_close(got, wanted)
    with pytest.raises(flix.TargetError, match=r"'layers\.0' to 'layers\.2'.*own"):
        merge(model, {"task": "ner"})


class Integers(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.in_features, self.out_features = 4, 4
        self.values = nnx.Variable(jnp.ones((4, 4), jnp.int8))

    def __call__(self, x: Any) -> Any:
        return x @ self.values[...].astype(x.dtype)


def test_what_a_stack_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(flix.ConfigError, match=r"'layers\.0\.q' and 'layers\.1\.q'.*language=hau"):
        adapt(Stacked(), settings(rank_pattern={r"layers\.1\.q": 7}))
    plain = Stacked()
    with pytest.raises(
        flix.TargetError, match=r"'layers\.0\.q' is one of a stack of 3.*'?layers\.1"
    ):
        adapt(plain, settings(target_modules=["layers.0.q"]))
    assert type(plain) is Stacked and type(plain.layers.q) is nnx.LinearGeneral
    model = adapt(plain, settings())
    with pytest.raises(flix.TargetError, match=r"'layers\.q' is a stack \[3\]"):
        model.layers.q(jnp.ones((5, 2, 4)), flix_features=IDS)
    with pytest.raises(flix.TargetError, match="stack of quantised"):
        adapt(Single(Integers), config(target_modules=["layers"]))


def test_layers_whose_file_has_other_ranks_do_not_fit_a_stack(tmp_path: Path) -> None:
    looped = adapt(Looped(), settings(rank_pattern={r"layers\.1\.q": 7}))
    save(looped, tmp_path / "a")
    with pytest.raises(flix.ConfigError, match="one stack"):
        load(Stacked(), tmp_path / "a")
    models = copy.deepcopy(both())
    before = read(models[0])
    with pytest.raises(flix.FlixError):
        load_features(models[0], tmp_path / "a", conflicts="replace")
    same(models[0], models[1])
    assert [*before] == [*read(models[0])]


def test_names_of_stacks_where_flax_does_not_say_what_was_stacked() -> None:
    from flix.backends.jax.stacks import places

    class Of(nnx.Module):
        def __init__(self, **parts: Any) -> None:
            for name, part in parts.items():
                setattr(self, name, part)

    def linear(rngs: Any) -> Any:
        return nnx.Linear(4, 4, rngs=rngs)

    def names(model: Any) -> list[str]:
        return [path for path, place in places(model).items() if place.stack]

    one = lambda: stack_of(linear, 2)  # noqa: E731
    assert names(Of(layers=one())) == ["layers.0", "layers.1"]
    assert names(Of(encoder=Of(layers=one()))) == ["encoder.layers.0", "encoder.layers.1"]
    assert names(Of(block=Of(dense=one()))) == ["block.0.dense", "block.1.dense"]
    two = Of(h=Of(up=one(), down=one()), norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    assert names(two) == ["h.0.down", "h.1.down", "h.0.up", "h.1.up"]
    listed = Of(stages=nnx.List([Of(layers=one()), Of(layers=one())]))
    assert names(listed)[:2] == ["stages.0.layers.0", "stages.0.layers.1"]
    norm = nnx.LayerNorm(2, rngs=nnx.Rngs(0))  # as long as the stack is deep
    assert (
        names(Of(encoder=Of(block=Of(up=one(), down=one()), norm=norm)))[0]
        == "encoder.block.0.down"
    )
    assert names(Of(layers=stack_of(linear, 2, 2)))[1:3] == ["layers.0.1", "layers.1.0"]
