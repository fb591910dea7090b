"""Adapted models as serialised programs (jax.export), with routing as an input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import adapt, export_fn, linear, remove_feature
from tests.helpers.jax import TOKENS, Net, adapted, random_bank
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close

INT, FLOAT = jnp.int32, jnp.float32


def exported(function: Any, *arguments: Any) -> Any:
    """After a round trip through bytes."""
    blob = jax.export.export(jax.jit(function))(*arguments).serialize()
    return jax.export.deserialize(blob)


def struct(*shape: Any, dtype: Any = INT) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.covers("nnx", "export", backend="jax")
@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
def test_a_model_of_every_kind_of_layer_answers_the_same(strategy: str) -> None:
    model = adapt(Net(), config(target_modules=["embed", "q", "o", "e", "back"]), strategy=strategy)
    for path, value in nnx.iter_graph(model):
        if path and path[-1] in ("flix_A", "flix_B") and isinstance(value, nnx.Variable):
            size = value.shape
            value[...] = jnp.asarray(
                np.random.default_rng(len(path)).normal(size=size) * 0.3, FLOAT
            )
    model.layers[0].drop.rate = 0.5  # off in what is exported
    before = nnx.graphdef(model)
    function, params = export_fn(model)
    assert nnx.graphdef(model) == before
    assert params["layers.0.q.kernel"].shape == (6, 2, 4)
    model.eval()
    wanted = nnx.jit(lambda m: m(TOKENS, flix_features=IDS, flix_weights=WEIGHTS))(model)
    b, t = jax.export.symbolic_shape("b, t")
    program = exported(function, params, struct(b, t), struct(b, 3), struct(b, 3, dtype=FLOAT))
    tokens = TOKENS.astype(np.int32)
    assert_close(program.call(params, tokens, IDS, WEIGHTS), wanted)
    assert_close(
        program.call(params, tokens[:2, :3], IDS[:2], WEIGHTS[:2]),
        np.asarray(
            nnx.jit(lambda m: m(TOKENS[:2, :3], flix_features=IDS[:2], flix_weights=WEIGHTS[:2]))(
                model
            )
        ),
    )
    # Other values in the same program: nothing was baked in.
    zeros = {n: jnp.zeros_like(v) if "flix_" in n else v for n, v in params.items()}
    assert_close(program.call(zeros, tokens, IDS, WEIGHTS), nnx.jit(lambda m: m(TOKENS))(Net()))


def test_ids_of_no_feature_and_of_removed_ones_are_nan() -> None:
    model = adapted(target_modules=["embed", "back"])
    remove_feature(model, "language", "swa")
    function, params = export_fn(model)
    (b,) = jax.export.symbolic_shape("b")
    program = exported(function, params, struct(b, 4), struct(b, 2))
    ids = np.array([[0, 4], [6, -1], [1, 4], [-2, 0], [-1, -1]], np.int32)
    y = np.asarray(program.call(params, TOKENS.astype(np.int32), ids))
    assert [bool(np.isnan(row).all()) for row in y] == [False, True, True, True, False]
    assert np.isfinite(y[[0, 4]]).all()


def test_per_token_routing_and_several_inputs() -> None:
    class Sum(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any, shift: Any, *, gain: Any = 1.0) -> Any:
            return gain * self.a(x) + shift

    model = adapt(Sum(), config())
    function, params = export_fn(model)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f")
    ids = np.array([[[0], [4], [1]], [[5], [-1], [0]]], np.int32)
    b, t = jax.export.symbolic_shape("b, t")
    shapes = struct(b, t, 4, dtype=FLOAT), struct(b, t, 3, dtype=FLOAT)
    shift = np.ones((2, 3, 3), np.float32)
    wanted = model(x, shift, flix_features=ids)
    by_place = exported(function, params, shapes, struct(b, t, 1))
    assert_close(by_place.call(params, (x, shift), ids), wanted)
    named = {"x": shapes[0], "shift": shapes[1], "gain": struct(dtype=FLOAT)}
    by_name = exported(function, params, named, struct(b, t, 1))
    y = by_name.call(params, {"x": x, "shift": shift, "gain": np.float32(2)}, ids)
    assert_close(y - shift, 2 * (np.asarray(wanted) - shift))


@pytest.mark.covers("pytree", "export", backend="jax")
def test_the_functional_core_exports_with_its_bank_as_plain_arrays() -> None:
    bank = random_bank(config(), {"q": (5, 7)})
    kernel = jnp.ones((5, 7))
    tables = {"A": bank["q"].A, "B": bank["q"].B}

    def function(tables: Any, x: Any, ids: Any) -> Any:
        layer = jax.tree.unflatten(jax.tree.structure(bank["q"]), [tables["A"], tables["B"]])
        return linear(x, kernel, layer, ids)

    (b,) = jax.export.symbolic_shape("b")
    program = exported(function, tables, struct(b, 5, dtype=FLOAT), struct(b, 2))
    x = np.random.default_rng(0).normal(size=(5, 5)).astype("f")
    assert_close(program.call(tables, x, IDS[:, :2]), linear(x, kernel, bank["q"], IDS[:, :2]))


def test_exporting_needs_an_adapted_model() -> None:
    with pytest.raises(flix.TargetError, match="export_fn needs an adapted model"):
        export_fn(Net())
