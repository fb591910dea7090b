"""Run by test_processes.py with four host devices: sharded layers give the single-device numbers."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flix.backends.jax import (
    FlixOptimizer,
    adapt,
    gather,
    linear,
    linear_rows,
    mask_absent,
    partition_specs,
    scatter,
    shard,
    sparse_update,
    touched,
    value_and_grad,
)
from flix.backends.jax.kernels.fused import INTERPRET
from flix.backends.jax.sharding import partitioned
from tests.helpers.jax import random_bank, randomize
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close

IDS = np.array([[0, 4, -1], [1, 5, 2], [3, 3, 5], [-1, -1, -1]], np.int32)
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(4, 8, 16)), np.float32)
KERNEL = np.asarray(RNG.normal(size=(16, 12)), np.float32)


def functional(mesh: Any) -> None:
    bank = random_bank(config(), {"q": (16, 12)})

    tx = optax.adamw(1e-2)

    def value(bank: Any, x: Any, kernel: Any, ids: Any, strategy: str) -> Any:
        return (linear(x, kernel, bank["q"], ids, strategy=strategy) ** 2).sum()

    def by_rows(bank: Any, x: Any, kernel: Any, ids: Any) -> Any:
        present = touched(ids, 6)

        def of_rows(rows: Any) -> Any:
            return (linear_rows(x, kernel, rows["q"], ids, present) ** 2).sum()

        out, grads = jax.value_and_grad(of_rows)(gather(bank, present))
        moved, state = sparse_update(tx, grads, tx.init(bank), bank, present)
        masked = mask_absent(tx)
        dense = scatter(jax.tree.map(jnp.zeros_like, bank), grads, present)
        updates, _ = masked.update(dense, masked.init(bank), bank, flix_features=ids)
        return out, grads, moved, state[0].mu, optax.apply_updates(bank, updates)

    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), static_argnums=4)
    rows_step = jax.jit(by_rows)
    for kernel_spec in (P("model", None), P(None, "model")):
        if mesh.axis_types[0] is AxisType.Explicit and kernel_spec[0]:
            continue  # explicit meshes refuse x @ kernel itself: the sharding of the sum is ambiguous
        specs = partition_specs(bank, kernel_spec)
        assert P(None, kernel_spec[0]) == specs["q"].A
        assert P(None, kernel_spec[1]) == specs["q"].B
        put = [
            shard(bank, mesh, kernel_spec),
            jax.device_put(X, NamedSharding(mesh, P("data", None, kernel_spec[0]))),
            jax.device_put(KERNEL, NamedSharding(mesh, kernel_spec)),
            jax.device_put(IDS, NamedSharding(mesh, P("data", None))),
        ]
        for strategy in ("gather", "masked") if kernel_spec[1] else ("gather",):
            with jax.set_mesh(mesh):
                found = step(*put, strategy)
            wanted = step(bank, X, KERNEL, IDS, strategy)
            jax.tree.map(assert_close, found, wanted)
            assert (
                found[1][0]["q"].A.sharding.spec[1:] == specs["q"].A[1:] or kernel_spec[0] is None
            )
        with jax.set_mesh(mesh):
            found = rows_step(*put)
        jax.tree.map(assert_close, found, rows_step(bank, X, KERNEL, IDS))


def fused(mesh: Any) -> None:
    """Each device runs the kernels on its rows of the batch; left to the compiler, "auto" keeps away from them."""
    bank = random_bank(config(), {"q": (16, 12)})

    def of_rows(strategy: str, bank: Any, x: Any, kernel: Any, ids: Any) -> Any:
        split.append(partitioned(x))
        return linear(x, kernel, bank["q"], ids, strategy=strategy)

    def value(bank: Any, *args: Any) -> Any:
        run = jax.shard_map(
            functools.partial(of_rows, "fused"),
            mesh=mesh,
            in_specs=(P(), P("data"), P(), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
        return (run(bank, *args) ** 2).sum()

    def plain(bank: Any, *args: Any) -> Any:
        return (of_rows("gather", bank, *args) ** 2).sum()

    split: list[bool] = []
    rows = NamedSharding(mesh, P("data"))
    put = jax.device_put(X, rows), KERNEL, jax.device_put(IDS, rows)
    found = jax.jit(jax.value_and_grad(value))(bank, *put)
    assert not any(split)
    wanted = jax.jit(jax.value_and_grad(plain))(bank, X, KERNEL, IDS)
    assert not any(split)
    jax.tree.map(assert_close, found, wanted)
    jax.jit(plain)(bank, *put)
    assert split[-1]


class Mlp(nnx.Module):
    def __init__(self, mesh: Any) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(16, 12, rngs=rngs)
        self.down = nnx.LinearGeneral(12, (2, 8), rngs=rngs)
        if mesh is not None:
            for layer, spec in ((self.up, P(None, "model")), (self.down, P("model", None, None))):
                layer.kernel[...] = jax.device_put(layer.kernel[...], NamedSharding(mesh, spec))

    def __call__(self, x: Any) -> Any:
        return self.down(jax.nn.relu(self.up(x)))


def loss(model: Any, ids: Any, x: Any) -> Any:
    return (model(x, flix_features=ids) ** 2).mean()


@nnx.jit
def train(model: Any, optimizer: Any, ids: Any, x: Any) -> Any:
    value, grads = value_and_grad(loss)(model, ids, x)
    optimizer.update(model, grads)
    return value


def model_training(mesh: Any) -> None:
    losses = []
    for where in (None, mesh):
        model = adapt(Mlp(where), config())
        if where is not None:
            assert model.up.flix_A[...].sharding.spec == P(None, None)
            assert model.up.flix_B[...].sharding.spec == P(None, "model")
            assert model.down.flix_A[...].sharding.spec == P(None, "model")
        specs = [t[...].sharding for t in (model.up.flix_A, model.up.flix_B)]
        randomize(model)
        for table, sharding in zip((model.up.flix_A, model.up.flix_B), specs, strict=True):
            table[...] = jax.device_put(table[...], sharding)
        optimizer = FlixOptimizer(model, optax.adamw(1e-2))
        x = X if where is None else jax.device_put(X, NamedSharding(mesh, P("data")))
        losses.append([float(train(model, optimizer, jnp.asarray(IDS), x)) for _ in range(3)])
    assert_close(losses[1], losses[0], dtype="float32")


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    kind = getattr(AxisType, sys.argv[1])
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    functional(mesh)
    if kind is AxisType.Auto:
        os.environ[INTERPRET] = "1"
        fused(mesh)
        del os.environ[INTERPRET]
        model_training(mesh)
    print("sharded: fine")
