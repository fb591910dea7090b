"""Absent features keep their bits in banks, sparse and dense."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flix
from flix.backends.jax import (
    adamw,
    gather,
    linear,
    linear_rows,
    mask_absent,
    sparse_update,
    touched,
)
from tests.helpers.jax import random_bank
from tests.helpers.registry import config, registry
from tests.helpers.tolerance import assert_close

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5)), jnp.float32)


# Id 3 never acts; id 1 acts in the first step alone: its momentum must not move it afterwards.
STEPS = [np.array([[0, 4], [1, 5]]), np.array([[0, 4], [4, -1]]), np.array([[5, 0], [0, 4]])]


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "flix adamw": lambda: adamw(1e-2, weight_decay=0.1),
    "momentum": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1),
        optax.sgd(1e-2, momentum=0.9),
    ),
    "schedule": lambda: optax.lion(optax.cosine_decay_schedule(1e-2, 10), weight_decay=0.1),
}


def per_feature(tree: Any, like: Any) -> dict[str, bytes]:
    """The bytes of everything that belongs to a feature, in the bank or in an optimizer state."""
    found: dict[str, bytes] = {}
    spec = like["q"].spec
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        if leaf.ndim and leaf.shape[0] == spec.rows:
            for feature in spec.registry.features:
                rows = np.asarray(leaf)[spec.row_range(feature)]
                found[f"{feature[1]} {number}"] = rows.tobytes()
    return found


def dense_step(tx: Any) -> Any:
    tx = mask_absent(tx)

    @jax.jit
    def step(bank: Any, state: Any, ids: Any) -> Any:
        def loss(bank: Any) -> Any:
            return (linear(X, KERNEL, bank["q"], ids) ** 2).sum()

        updates, state = tx.update(jax.grad(loss)(bank), state, bank, flix_features=ids)
        return optax.apply_updates(bank, updates), state

    return tx, step


def sparse_step(tx: Any) -> Any:
    @jax.jit
    def step(bank: Any, state: Any, ids: Any) -> Any:
        present = touched(ids, 6)

        def loss(rows: Any) -> Any:
            return (linear_rows(X, KERNEL, rows["q"], ids, present) ** 2).sum()

        grads = jax.grad(loss)(gather(bank, present))
        return sparse_update(tx, grads, state, bank, present)

    return tx, step


@pytest.mark.covers("pytree", "absent features", backend="jax")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_features_keep_their_bits(name: str) -> None:
    finals = []
    for make in (dense_step, sparse_step):
        tx, step = make(OPTIMIZERS[name]())
        bank = random_bank(config(), {"q": (5, 7)})
        state = tx.init(bank)
        for ids in STEPS:
            before = {
                **per_feature(bank, bank),
                **{f"s {k}": v for k, v in per_feature(state, bank).items()},
            }
            bank, state = step(bank, state, jnp.asarray(ids))
            after = {
                **per_feature(bank, bank),
                **{f"s {k}": v for k, v in per_feature(state, bank).items()},
            }
            for key, value in after.items():
                name_of = key.removeprefix("s ").split()[0]
                i = [n for _, n in registry().features].index(name_of)
                if i not in ids:
                    assert value == before[key], key
                elif not key.startswith("s ") and value:
                    assert value != before[key], key
        finals.append(bank)
    assert_close(finals[0]["q"].A, finals[1]["q"].A)
    assert_close(finals[0]["q"].B, finals[1]["q"].B)


def test_presence_by_gradient() -> None:
    """Without ids, features whose gradient is zero everywhere count as absent."""
    tx = mask_absent(optax.adamw(1e-2, weight_decay=0.1))
    bank = random_bank(config(), {"q": (5, 7)})

    @jax.jit
    def step(bank: Any) -> Any:
        grads = jax.grad(lambda b: (linear(X, KERNEL, b["q"], STEPS[0]) ** 2).sum())(bank)
        updates, _ = tx.update(grads, tx.init(bank), bank)
        return optax.apply_updates(bank, updates)

    old, new = per_feature(bank, bank), per_feature(step(bank), bank)
    moved = {key.split()[0] for key in old if old[key] != new[key]}
    assert moved == {"hau", "swa", "ner", "pos"}


def test_feature_adam_counts_own_steps() -> None:
    """A feature that appears late takes torch's first step, of the learning rate's size."""
    tx, step = sparse_step(adamw(1e-2, weight_decay=0.0))
    bank = random_bank(config(), {"q": (5, 7)})
    state = tx.init(bank)
    for _ in range(5):
        bank, state = step(bank, state, jnp.array([[4, -1], [4, -1]]))
    moved, _ = step(bank, state, jnp.array([[1, -1], [4, -1]]))
    rows = bank["q"].spec.row_range(("language", "swa"))
    assert_close(
        np.abs(np.asarray(moved["q"].A - bank["q"].A)[rows]),
        np.full((3, 5), 1e-2),
        dtype="float32",
        times=100,
    )


def test_refuses_state_without_rows() -> None:
    bank = random_bank(config(), {"q": (5, 7)})
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=1)
    with pytest.raises(flix.ConfigError, match="state for each row"):
        mask_absent(tx).update(bank, tx.init(bank), bank)
    with pytest.raises(flix.ConfigError, match="no low-rank tables"):
        mask_absent(optax.sgd(1.0)).update({"a": KERNEL}, (), {"a": KERNEL})
