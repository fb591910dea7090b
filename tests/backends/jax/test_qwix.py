"""Models that qwix quantised before adapt; skipped where it is not installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flix
from flix.backends.jax import FlixParam, adapt, disable, load, mask_absent, merge, save
from flix.backends.jax.adapt import flix_layers
from flix.backends.jax.patches.interception import free
from tests.helpers.dense import by_id, dense
from tests.helpers.jax import randomize
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close, assert_far, same_bits

SIZE, OUT = 6, 4
MODES: dict[str, Any] = {
    "int8 weights": {"weight_qtype": jnp.int8},
    "int4 weights": {"weight_qtype": jnp.int4},
    "int8 both": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
}


class Net(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(SIZE, OUT, rngs=nnx.Rngs(0))
        self.o = nnx.Linear(OUT, OUT, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.o(jnp.tanh(self.q(x)))


class One(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(SIZE, OUT, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.q(x)


X = jnp.asarray(np.random.default_rng(3).normal(size=(len(IDS), 3, SIZE)), jnp.float32)


def quantised(kind: type[Any], mode: str) -> Any:
    qwix = pytest.importorskip("qwix")
    rules = [qwix.QuantizationRule(module_path=".*", **MODES[mode])]
    return qwix.quantize_model(kind(), qwix.PtqProvider(rules), X)


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_get_the_layers_own_output_and_their_updates_and_every_gradient(
    mode: str, strategy: str
) -> None:
    own = quantised(One, mode)(X)
    model = adapt(quantised(One, mode), config(target_modules=["q"]), strategy=strategy)
    randomize(model)
    layer = model.q
    dy = np.random.default_rng(4).normal(size=own.shape).astype(np.float32)
    wanted = dense(X, IDS, by_id(model.flix_config, layer.bank.pairs()), WEIGHTS, dy=dy)

    @nnx.jit
    def gradients(model: Any, x: Any, ids: Any, weights: Any) -> Any:
        def loss(model: Any) -> Any:
            y = model(x, flix_features=ids, flix_weights=weights)
            return (y * dy).sum(), y

        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam), has_aux=True)(model)

    (_, y), tables = gradients(model, X, IDS, WEIGHTS)
    assert_close(y, np.asarray(own) + wanted.y)
    for part in "AB":
        for i, value in getattr(wanted, part).items():
            span = tables["q"]["flix_" + part][...][layer.flix_spec.layout.span(i)]
            assert_close(span if part == "A" else span.T, value)
    assert_far(y, own)
    with disable(model):
        assert same_bits(model(X), own)


@pytest.mark.parametrize("mode", ["int8 weights", "int8 both"])
def test_it_is_saved_and_loaded_and_trains_and_is_not_merged(mode: str, tmp_path: Any) -> None:
    model = adapt(quantised(Net, mode), config())
    assert {path for path, _ in flix_layers(model)} == {"q", "o"}
    randomize(model)
    save(model, tmp_path)
    again = load(quantised(Net, mode), tmp_path)
    assert same_bits(again(X, flix_features=IDS), model(X, flix_features=IDS))
    for dequantize in (False, True):
        with pytest.raises(flix.TargetError, match=r"layer '[qo]' .*cannot be merged.*WithAux"):
            merge(model, {"task": "ner"}, dequantize=dequantize)
    ids = np.array([[0, 4]] * len(IDS), np.int32)
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))
    optimizer = nnx.Optimizer(model, mask_absent(optax.adamw(0.05), model), wrt=FlixParam)

    def loss(model: Any) -> Any:
        return jnp.square(model(X, flix_features=ids) - 1).mean()

    values = []
    for _ in range(4):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam))(model)
        optimizer.update(model, grads)
        values.append(float(value))
    assert values[-1] < values[0]
    after = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))
    old = dict(jax.tree_util.tree_leaves_with_path(before))
    for path, value in jax.tree_util.tree_leaves_with_path(after):
        if "flix_" not in str(path):
            assert same_bits(value, old[path])


def test_a_model_that_is_quantised_after_adapt_keeps_its_updates() -> None:
    qwix = pytest.importorskip("qwix")
    rules = [qwix.QuantizationRule(module_path=".*", **MODES["int8 both"])]
    model = adapt(One(), config(target_modules=["q"]))
    randomize(model)
    pairs = by_id(model.flix_config, model.q.bank.pairs())
    found = qwix.quantize_model(model, qwix.PtqProvider(rules), X, flix_features=IDS)
    own = quantised(One, "int8 both")(X)
    y = found(X, flix_features=IDS, flix_weights=WEIGHTS)
    assert_close(y, np.asarray(own) + dense(X, IDS, pairs, WEIGHTS).y)
    with pytest.raises(flix.TargetError, match=r"layer 'q' .*cannot be merged.*qwix's WithAux"):
        merge(found, {"task": "ner"})


def test_an_unknown_qwix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "qwix._src.interception", SimpleNamespace())
    with pytest.raises(flix.TargetError, match="this version of qwix"):
        free(lambda: None)


def test_interceptions_come_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    manager = SimpleNamespace(
        disable_interception=lambda: events.append("off") or [7],
        enable_interception=lambda held: events.append(held),
    )
    monkeypatch.setitem(sys.modules, "qwix", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "qwix._src.interception", SimpleNamespace(interception_manager=manager)
    )
    with pytest.raises(ZeroDivisionError):
        free(lambda: 1 / 0)
    assert events == ["off", [7]]
