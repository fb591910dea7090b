"""Layers whose own forward is called: quantised ones, subclasses of Linear and Embed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adamw,
    adapt,
    disable,
    load,
    mask_absent,
    merge,
    save,
    value_and_grad,
)
from flix.backends.jax.adapt import flix_layers
from tests.helpers.claims import over
from tests.helpers.dense import by_id, dense
from tests.helpers.jax_around import LAYERS, OUT, ROW, SIZE, Int4, Net, Own, adapted, inputs
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_close, assert_far, same_bits

BASES = {"backend": "jax-bases", "argument": "kind"}
QUANTISED = ["int8", "int4", "float8"]


@nnx.jit
def forward(model: Any, x: Any, ids: Any, weights: Any) -> Any:
    return model(x, flix_features=ids, flix_weights=weights)


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@over(LAYERS, "mixed batch", "gradients", **BASES)
def test_rows_get_the_layers_own_output_and_their_updates_and_every_gradient(
    kind: str, strategy: str
) -> None:
    model, base, x = adapted(kind, strategy), Net(kind), inputs(kind)
    layer, own = model.q, base.q(x)
    assert isinstance(layer, type(base.q)) and type(layer).__name__ == type(base.q).__name__
    pairs = by_id(model.flix_config, layer.bank.pairs())
    dy = np.random.default_rng(4).normal(size=own.shape).astype(np.float32)
    hot = np.eye(SIZE)[np.asarray(x)] if kind == "embed" else x
    wanted = dense(hot, IDS, pairs, WEIGHTS, dy=dy)

    @nnx.jit
    def gradients(layer: Any, x: Any, ids: Any, weights: Any) -> Any:
        def loss(layer: Any, x: Any) -> Any:
            y = layer(x, flix_features=ids, flix_weights=weights)
            return (y * dy).sum(), y

        wrt = (nnx.DiffState(0, FlixParam), *(() if kind == "embed" else (1,)))
        return nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(layer, x)

    (_, y), (tables, *dx) = gradients(layer, x, IDS, WEIGHTS)
    assert_close(y, np.asarray(own) + wanted.y)
    for part, table in (("A", tables["flix_A"]), ("B", tables["flix_B"])):
        for i, value in getattr(wanted, part).items():
            span = table[...][layer.flix_spec.layout.span(i)]
            assert_close(span if part == "A" else span.T, value)
    if dx:
        (before,) = jax.vjp(base.q, x)[1](jnp.asarray(dy))  # through its own forward
        assert_close(dx[0], np.asarray(before) + wanted.x)
    assert_close(
        forward(model, x, IDS, WEIGHTS)[3], base(x)[3], times=2
    )  # the row without features
    assert_far(forward(model, x, IDS, WEIGHTS), base(x))
    with disable(model):
        assert same_bits(model(x), base(x))


def test_all_linear_takes_them_and_keeps_what_is_theirs() -> None:
    model = adapt(Net("int4"), config())
    assert {path for path, _ in flix_layers(model)} == {"q", "o"}
    model.train()
    model.eval()
    merged = merge(adapt(Net("int4"), config(target_modules=["o"])), ROW)
    assert type(merged.q) is Int4 and merged.q.deterministic is True
    plain = merge(model, ROW, dequantize=True)
    assert type(plain.q) is nnx.Linear and not hasattr(plain.o, "deterministic")
    kept = merge(adapted("subclass"), ROW)
    assert type(kept.q) is Own and not [n for n in vars(kept.q) if n.startswith("flix")]


@over(LAYERS, "save and load", **BASES)
def test_adapters_are_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model, x = adapted(kind), inputs(kind)
    save(model, tmp_path)
    again = load(Net(kind), tmp_path)
    y = model(x, flix_features=IDS)
    assert same_bits(again(x, flix_features=IDS), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        assert same_bits(other(x, flix_features=IDS), y)
    shape = flix.load_adapter(tmp_path).layers["q"]
    assert (shape.d_in, shape.d_out) == (SIZE, OUT)


@pytest.mark.parametrize("kind", LAYERS)
def test_features_of_the_batch_train_and_the_base_keeps_its_bits(kind: str) -> None:
    model, x = adapted(kind), inputs(kind)
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))
    optimizer = nnx.Optimizer(model, mask_absent(optax.adamw(0.05), model), wrt=FlixParam)
    ids = np.array([[0, 4]] * len(IDS), np.int32)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        def loss(model: Any) -> Any:
            return jnp.square(model(x, flix_features=ids) - 1).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))
    layout = model.q.flix_spec.layout
    for path, value in jax.tree_util.tree_leaves_with_path(after):
        old = dict(jax.tree_util.tree_leaves_with_path(before))[path]
        if "flix_" not in str(path):
            assert same_bits(value, old)
            continue
        for i in range(6):
            assert same_bits(value[layout.span(i)], old[layout.span(i)]) == (i not in (0, 4))


@pytest.mark.parametrize("kind", ["int8", "int4", "embed"])
def test_an_optimizer_of_rows_trains_them(kind: str) -> None:
    model, x = adapted(kind), inputs(kind)
    optimizer = FlixOptimizer(model, adamw(0.05))

    def loss(model: Any, ids: Any, x: Any) -> Any:
        return jnp.square(model(x, flix_features=ids) - 1).mean()

    values = []
    for _ in range(4):
        value, grads = value_and_grad(loss)(model, IDS, x)
        optimizer.update(model, grads)
        values.append(float(value))
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


@over(["subclass"], "merge", **BASES)
def test_a_subclass_whose_kernel_is_the_map_is_merged(kind: str) -> None:
    model, x = adapted(kind), inputs(kind)
    merged = merge(model, ROW)
    assert_close(merged(x), model(x, flix_features=registry().encode([ROW] * len(x))), times=3)
    assert same_bits(model.q.kernel[...], Net(kind).q.kernel[...])


@pytest.mark.parametrize(
    "kind,reason",
    [
        ("doubled", "its output does not change as its kernel does"),
        ("clipped", "its output does not change as its kernel does"),
        ("int8", r"its kernel is quantised \(int8\)"),
        ("int4", r"its kernel is quantised \(int4\)"),
        ("float8", r"its kernel is quantised \(float8_e4m3fn\)"),
        ("embed", r"its kernel is quantised \(int8\)"),
    ],
)
def test_others_are_not_merged_in_silence(kind: str, reason: str) -> None:
    with pytest.raises(
        flix.TargetError, match=rf"layer 'q' \(\w+\) cannot be merged: {reason}.*dequantize=True"
    ):
        merge(adapted(kind), ROW)


@over([k for k in LAYERS if k not in ("clipped", "subclass")], "dequantized", **BASES)
def test_quantised_layers_become_plain_ones_if_asked(kind: str) -> None:
    model, x = adapted(kind), inputs(kind)
    merged = merge(model, ROW, dequantize=True)
    assert type(merged.q) in (nnx.Linear, nnx.Embed) and type(merged) is Net
    routed = model(x, flix_features=registry().encode([ROW] * len(x)))
    assert_close(merged(x), routed, times=3)
    assert nnx.split(merged)[0] == nnx.split(copy.deepcopy(merged))[0]
    assert isinstance(model.q, type(Net(kind).q))


def test_what_is_no_linear_map_becomes_none() -> None:
    with pytest.raises(flix.TargetError, match=r"layer 'q' \(Clipped\) is not a linear map"):
        merge(adapted("clipped"), ROW, dequantize=True)


def test_an_output_of_another_shape_is_refused_by_name() -> None:
    class Flat(nnx.Linear):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x).reshape(len(x), -1)

    class Two(nnx.Module):
        def __init__(self) -> None:
            self.q = Flat(SIZE, OUT, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.q(x)

    model = adapt(Two(), config(target_modules=["q"]))
    with pytest.raises(flix.TargetError, match=r"layer 'q' \(Flat\) maps \[5, 3, 6\] to \[5, 12\]"):
        model(inputs("int8"), flix_features=IDS)


def test_subclasses_of_layers_with_several_axes_are_left_out_by_name() -> None:
    class General(nnx.LinearGeneral):
        pass

    class Two(nnx.Module):
        def __init__(self) -> None:
            self.q = General(SIZE, (2, 2), rngs=nnx.Rngs(0))

    with pytest.raises(flix.TargetError, match="its class General has a call of its own"):
        adapt(Two(), config(target_modules=["q"]))
