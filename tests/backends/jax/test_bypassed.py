"""Layers whose kernels a model uses without calling them are named by a call; those not reached are none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flix import TargetError
from flix.backends.jax import (
    FlixParam,
    adapt,
    add_feature,
    disable,
    merge,
    route,
    value_and_grad,
)
from tests.helpers.jax import randomize
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
IDS = np.array([[0, 4], [1, 5], [3, 4], [-1, -1]])


class Using(nnx.Module):
    """Calls ``a``, and uses ``b`` in a way of its own."""

    def __init__(self, use: Callable[[Any, Any], Any], b: Any = None) -> None:
        self.a = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(6, 6, rngs=nnx.Rngs(1)) if b is None else b
        self.use = use

    def __call__(self, x: Any) -> Any:
        return self.a(x) + self.use(self, x)


def adapted(use: Callable[[Any, Any], Any], b: Any = None) -> Any:
    model = adapt(Using(use, b), config(target_modules=["a", "b"]))
    randomize(model)
    return model


BYPASSES: dict[str, Callable[[Any, Any], Any]] = {
    "value": lambda m, x: x @ m.b.kernel[...],
    "variable": lambda m, x: x @ m.b.kernel,
    "raw value": lambda m, x: jnp.dot(x, m.b.kernel.get_value()),
    "cast": lambda m, x: x @ m.b.kernel.astype(jnp.bfloat16).astype(jnp.float32),
    "slices": lambda m, x: x @ m.b.kernel[:6],
    "compiled": lambda m, x: jax.jit(jnp.matmul)(x, m.b.kernel[...]),
    "remat": lambda m, x: nnx.remat(lambda m, x: x @ m.b.kernel[...])(m, x),
    "closure": lambda m, x: jax.checkpoint(lambda x: x @ m.b.kernel[...])(x),
    "looked at": lambda m, x: x if m.b.kernel[0, 0] > 1e9 else 2 * x,
}


@pytest.mark.parametrize("use", BYPASSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_that_is_used_without_its_layer_is_an_error_that_names_it(
    use: str, compiled: bool
) -> None:
    model = adapted(BYPASSES[use])
    run = (lambda m, x, ids: m(x, flix_features=ids)) if not compiled else None
    run = nnx.jit(lambda m, x, ids: m(x, flix_features=ids)) if run is None else run
    if use == "looked at" and compiled:
        pytest.skip("no such look in a compiled function")
    for _ in range(2):  # until it is mended
        with pytest.raises(TargetError, match=r"^b: adapted, but .*exclude_modules=\['b'\]"):
            run(model, X, IDS)
    with route(model.flix_config.registry, IDS), pytest.raises(TargetError, match=r"^b: adapted"):
        model(X)
    with disable(model):
        model(X)


def test_other_kinds_of_layers_and_training() -> None:
    general = nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(1))
    model = adapted(lambda m, x: x @ m.b.kernel[...].reshape(6, 6), general)
    with pytest.raises(TargetError, match=r"^b: adapted"):
        model(X, flix_features=IDS)
    einsum = nnx.Einsum("bi,io->bo", (6, 6), (6,), rngs=nnx.Rngs(1))
    model = adapted(lambda m, x: x @ m.b.kernel[...], einsum)
    with pytest.raises(TargetError, match=r"^b: adapted"):
        model(X, flix_features=IDS)

    def loss(model: Any, ids: Any) -> Any:
        return model(X, flix_features=ids).sum()

    for take in (
        value_and_grad(loss),
        nnx.jit(value_and_grad(loss)),
        nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam)),
    ):
        with pytest.raises(TargetError, match=r"^b: adapted"):
            take(model, IDS)


def test_a_layer_that_is_bypassed_in_evaluation_alone() -> None:
    model = adapted(lambda m, x: x @ m.b.kernel[...] if m.b.deterministic else m.b(x))
    model(X, flix_features=IDS)
    model.eval()
    with pytest.raises(TargetError, match=r"^b: adapted"):
        model(X, flix_features=IDS)


HARMLESS: dict[str, Callable[[Any, Any], Any]] = {
    "not reached": lambda m, x: x,
    "dtype": lambda m, x: x.astype(m.b.kernel.dtype),
    "shape": lambda m, x: x * m.b.kernel.shape[0],
    "zeros": lambda m, x: x + jnp.zeros_like(m.b.kernel[...]).sum(),
    "called, and read": lambda m, x: m.b(x) + (m.b.kernel[...] ** 2).sum(),
    "called where it is compiled": lambda m, x: (
        nnx.remat(lambda m, x: m.b(x))(m, x) + m.b.kernel[...].sum()
    ),
}


@pytest.mark.parametrize("use", HARMLESS)
def test_a_look_is_none_and_neither_is_a_layer_that_is_not_reached(use: str) -> None:
    model = adapted(HARMLESS[use])
    plain = Using(HARMLESS[use])
    for _ in range(2):
        model(X, flix_features=IDS)
        nnx.jit(lambda m, ids: m(X, flix_features=ids))(model, IDS)
    if use != "called, and read" and use != "called where it is compiled":
        row = {"language": "swa", "task": "pos"}
        ids = np.tile([1, 5], (4, 1))
        assert_close(model(X, flix_features=ids), merge(model, row)(X), times=10)
    with disable(model):
        assert_close(model(X), plain(X))


def test_a_second_look_leaves_no_trace_in_the_model() -> None:
    """The copy that is traced has streams and statistics of its own."""

    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
            self.count = nnx.Variable(jnp.zeros(()))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

        def __call__(self, x: Any) -> Any:
            self.count[...] += 1
            return self.drop(self.a(x)).astype(self.b.kernel.dtype)

    model = adapt(Counting(), config(target_modules=["a", "b"]))
    once = Counting()
    for _ in range(2):
        model(X, flix_features=IDS)
        once(X)
    assert model.count[...] == 2
    assert model.drop.rngs.count[...] == once.drop.rngs.count[...]


def test_adapted_layers_are_copied_pickled_and_grow_as_before() -> None:
    model = adapted(lambda m, x: m.b(x))
    wanted = model(X, flix_features=IDS)
    assert_close(copy.deepcopy(model)(X, flix_features=IDS), wanted)
    assert_close(nnx.clone(model)(X, flix_features=IDS), wanted)
    graph, state = nnx.split(model.a)
    assert_close(nnx.merge(graph, state).kernel[...], model.a.kernel[...])
    model.a.kernel = nnx.Param(2 * model.a.kernel[...])
    assert "kernel" in nnx.state(model.a)
    add_feature(model, "language", "fra", rank=2)
    model(X, flix_features=[[6]] * 4)
    with pytest.raises(AttributeError, match="kernel"):
        del model.b.kernel
        _ = model.b.kernel
    assert pickle.loads(pickle.dumps(model.a)).kernel.shape == (6, 6)
