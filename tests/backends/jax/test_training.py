"""Models train by rows and as a whole alike; resuming continues bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
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
    add_feature,
    mask_absent,
    named_pairs,
    value_and_grad,
)
from tests.helpers.jax import TOKENS, adapted
from tests.helpers.registry import IDS
from tests.helpers.tolerance import assert_close, same_bits

FEW = ["embed", "back"]


BASE = nnx.All(nnx.Param, nnx.Not(FlixParam))


def loss_of(model: Any, ids: Any, tokens: Any) -> Any:
    return (model(tokens, flix_features=ids) ** 2).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def sparse_train(model: Any, optimizer: Any, ids: Any, tokens: Any) -> Any:
    value, grads = value_and_grad(loss_of)(model, ids, tokens)
    optimizer.update(model, grads)
    return value


@nnx.jit
def dense_train(model: Any, optimizer: Any, ids: Any, tokens: Any) -> Any:
    def loss(model: Any) -> Any:
        return loss_of(model, ids, tokens)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam))(model)
    optimizer.update(model, grads, flix_features=ids)
    return value


@pytest.mark.covers("nnx", "absent features", backend="jax")
def test_nnx_training_sparse_and_dense_agree() -> None:
    ids = np.array([[0, 4], [1, 5], [0, -1], [5, 1], [4, 0]])
    results = []
    for train, make in (
        (sparse_train, lambda m: FlixOptimizer(m, optax.adamw(1e-2, weight_decay=0.1))),
        (dense_train, lambda m: FlixOptimizer(m, optax.adamw(1e-2, weight_decay=0.1))),
        (
            dense_train,
            lambda m: nnx.Optimizer(
                m, mask_absent(optax.adamw(1e-2, weight_decay=0.1), m), wrt=FlixParam
            ),
        ),
    ):
        model = adapted(target_modules=FEW)
        frozen = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, BASE)))
        before = jax.tree.map(np.asarray, named_pairs(model))
        optimizer = make(model)
        losses = [float(train(model, optimizer, ids, TOKENS)) for _ in range(4)]
        after = jax.tree.map(np.asarray, named_pairs(model))
        for name, value in before.items():
            assert same_bits(value, after[name]) == name.endswith(".language.zul")
        unmoved = nnx.as_pure(nnx.state(model, BASE))
        assert all(map(same_bits, jax.tree.leaves(frozen), jax.tree.leaves(unmoved)))
        assert losses[-1] < losses[0]
        results.append((losses, after))
    for losses, after in results[1:]:
        assert_close(losses, results[0][0], dtype="float32")
        for name, value in after.items():
            assert_close(value, results[0][1][name], times=10)


def test_features_with_the_weight_zero_keep_their_bits() -> None:
    model = adapted(target_modules=FEW)
    rows = [{"language": {"hau": 1.0, "zul": 0.0}, "task": "ner"}] * 5
    routing = model.flix_config.registry.encode(rows)
    optimizer = FlixOptimizer(model, optax.adamw(1e-2, weight_decay=0.1))
    before = jax.tree.map(np.asarray, named_pairs(model))
    for _ in range(2):
        _, grads = value_and_grad(loss_of)(model, routing, TOKENS)
        optimizer.update(model, grads)
    _, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, FlixParam))(
        model, routing, TOKENS
    )
    optimizer.update(model, grads, flix_features=routing)
    after = jax.tree.map(np.asarray, named_pairs(model))
    moved = {
        name.rsplit(".", 1)[1]
        for name, value in before.items()
        if not same_bits(value, after[name])
    }
    assert moved == {"hau", "ner"}


def test_value_and_grad_keeps_random_streams_and_names_errors() -> None:
    model = adapted(target_modules=FEW)
    model.layers[0].drop.rate = 0.5

    @nnx.jit
    def value(model: Any, ids: Any) -> Any:
        (out, aux), grads = value_and_grad(lambda m, i: (loss_of(m, i, TOKENS), 7), has_aux=True)(
            model, ids
        )
        return out, aux, grads

    first, aux, _ = value(model, IDS)
    second, _, grads = value(model, IDS)
    assert aux == 7
    assert first != second
    assert grads.present.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(flix.RoutingError, match="id 9 in row 0"):
        value_and_grad(loss_of)(model, np.full((5, 2), 9), TOKENS)


def test_freeze_others() -> None:
    model = adapted(target_modules=FEW)
    add_feature(model, "language", "fra", rank=2)
    optimizer = FlixOptimizer(model, optax.adamw(1e-2, weight_decay=0.1))
    before = jax.tree.map(np.asarray, named_pairs(model))
    ids = np.where(IDS == 1, 6, IDS)
    sparse_train(model, optimizer, ids, TOKENS)
    middle = jax.tree.map(np.asarray, named_pairs(model))
    dense_train(model, optimizer, ids, TOKENS)
    after = jax.tree.map(np.asarray, named_pairs(model))
    for name, value in before.items():
        new = name.endswith(".language.fra")
        assert same_bits(middle[name], value) != new
        assert same_bits(after[name], middle[name]) != new


@pytest.mark.covers("nnx", "resume", backend="jax")
def test_orbax_resume_is_bit_identical(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")

    def fresh(seed: int) -> Any:
        model = adapted(seed, target_modules=FEW)
        model.layers[0].drop.rate = 0.2
        return model, FlixOptimizer(model, adamw(1e-2))

    def state_of(model: Any, optimizer: Any) -> Any:
        return {
            "model": nnx.to_pure_dict(nnx.state(model)),
            "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
        }

    model, optimizer = fresh(0)
    batches = [np.roll(IDS, k, axis=0) for k in range(4)]
    for ids in batches[:2]:
        sparse_train(model, optimizer, ids, TOKENS)
    keys = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        state_of(model, optimizer),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", keys)
    wanted = [float(sparse_train(model, optimizer, ids, TOKENS)) for ids in batches[2:]]

    other, other_optimizer = fresh(1)
    target = state_of(other, other_optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "state", jax.tree.map(lambda x: x, keys))
    found = jax.tree.map(
        lambda t, x: (
            jax.random.wrap_key_data(x) if jnp.issubdtype(t.dtype, jax.dtypes.prng_key) else x
        ),
        target,
        found,
    )
    nnx.update(other, found["model"])
    nnx.update(other_optimizer, found["optimizer"])
    resumed = [float(sparse_train(other, other_optimizer, ids, TOKENS)) for ids in batches[2:]]
    assert resumed == wanted
    left, right = state_of(model, optimizer), state_of(other, other_optimizer)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert same_bits(a, b)
