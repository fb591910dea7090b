"""Stacks of layers: their names, files, features over a model's life, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix
from flix.backends.jax import (
    adapt,
    add_feature,
    export_fn,
    load,
    load_features,
    merge,
    remove_feature,
    rename_feature,
    save,
    summary,
    to_adapter,
)
from flix.backends.jax.primitives import read
from tests.helpers.jax import jax, jnp, nnx, randomize
from tests.helpers.jax_stacks import (
    DEPTH,
    ROWS,
    TOKENS,
    Looped,
    Stacked,
    both,
    called,
    over_scan,
    pair,
    same,
    settings,
    stack_of,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close


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


@pytest.mark.covers("stacks", "export", backend="jax")
def test_an_exported_function_scans() -> None:
    stacked, looped = both()
    function, parameters = export_fn(stacked)
    got = jax.jit(function)(parameters, TOKENS, IDS, WEIGHTS)
    assert_close(got, called(looped, TOKENS, ROWS, jnp.asarray(WEIGHTS)))


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
