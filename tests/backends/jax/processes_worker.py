"""Run by test_processes.py in two processes of two devices each: what one device gives, they give together.

python -m tests.backends.jax.processes_worker FOLDER
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"localhost:{os.environ['MASTER_PORT']}", num_processes=2, process_id=int(os.environ["RANK"])
)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import flix  # noqa: E402
from flix.backends.jax import (  # noqa: E402
    FlixOptimizer,
    FlixParam,
    adamw,
    adapt,
    check_processes,
    freeze,
    load,
    save,
    shard,
    shard_features,
    value_and_grad,
)
from flix.backends.jax.primitives import read, write  # noqa: E402
from tests.helpers.jax import random_bank, randomize  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402

RANK, FOLDER = jax.process_index(), Path(sys.argv[1])
IDS = np.array([[0, 4, -1], [1, 4, 0], [0, 0, 4], [-1, -1, -1]], np.int32)
ACTIVE = {("language", "hau"), ("language", "swa"), ("task", "ner")}
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(4, 3, 8)), np.float32)


class Mlp(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(jax.nn.relu(self.up(x)))


def settings() -> flix.FlixConfig:
    return config(target_modules=["up", "down"])


def loss(model: Any, ids: Any, x: Any) -> Any:
    return (model(x, flix_features=ids) ** 2).mean()


@nnx.jit
def step(model: Any, optimizer: Any, ids: Any, x: Any) -> Any:
    value, grads = value_and_grad(loss)(model, ids, x)
    optimizer.update(model, grads)
    return value


def trained(model: Any, ids: Any, x: Any) -> tuple[list[float], Any]:
    optimizer = FlixOptimizer(model, adamw(1e-2, weight_decay=0.1))
    losses = [float(step(model, optimizer, ids, x)) for _ in range(3)]
    return losses, optimizer


@functools.cache
def alone() -> Any:
    """What this process gives by itself, on a device of its own."""
    with jax.default_device(jax.local_devices()[0]):
        model = adapt(Mlp(), settings())
        randomize(model)
        start = read(model)
        losses, _ = trained(model, jnp.asarray(IDS), jnp.asarray(X))
        return start, losses, read(model)


def held(arrays: Any) -> tuple[int, int]:
    """Bytes of arrays on the devices of this process, and of the arrays once."""
    arrays = [a for a in jax.tree.leaves(arrays) if isinstance(a, jax.Array) and a.ndim > 1]
    own = sum(part.data.nbytes for a in arrays for part in a.addressable_shards)
    return own, sum(a.nbytes for a in arrays)


def placed(mesh: Mesh, kernels: dict[str, P], spread: Callable[[Any], Any] | None) -> Any:
    """The model with its base and tables on a mesh."""
    model = Mlp()
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    for name, spec in kernels.items():
        layer = getattr(model, name)
        layer.kernel[...] = jax.device_put(layer.kernel[...], NamedSharding(mesh, spec))
        layer.bias[...] = jax.device_put(layer.bias[...], NamedSharding(mesh, P(spec[1])))
    model = adapt(model, settings())
    return model if spread is None else spread(model)


def check(name: str, mesh: Mesh, kernels: dict[str, P], batch: P, axis: str = "") -> None:
    start, wanted, end = alone()
    model = placed(mesh, kernels, (lambda m: shard_features(m, mesh, axis)) if axis else None)
    write(model, start)
    check_processes(model)
    ids, x = (jax.device_put(value, NamedSharding(mesh, batch)) for value in (IDS, X))
    losses, optimizer = trained(model, ids, x)
    assert_close(losses, wanted, dtype="float32", times=10)
    found = read(model)
    for path, pairs in found.items():
        for feature, own in pairs.items():
            for value, other, old in zip(
                own, end[path][feature], start[path][feature], strict=True
            ):
                assert_close(value, other, dtype="float32", times=100, name=f"{name} {path}")
                assert np.array_equal(value, old) == (feature not in ACTIVE), (name, feature)
    if axis:
        for arrays in (nnx.state(model, FlixParam), nnx.state(optimizer.opt_state)):
            own, whole = held([v for v in jax.tree.leaves(arrays) if v.shape[-1] > 1])
            assert own == whole * 2 // mesh.shape[axis] * (mesh.size // 4), (name, own, whole)
        print(f"{name}: {own} of {whole} bytes", flush=True)
    folder = FOLDER / name.replace(" ", "-")
    save(model, folder)  # all call it, the first writes
    with jax.default_device(jax.local_devices()[0]):
        again = load(Mlp(), folder)
    for path, pairs in read(again).items():
        for feature, own in pairs.items():
            for value, other in zip(own, found[path][feature], strict=True):
                assert np.array_equal(value, other), (name, path, feature)
    try:
        save(model, FOLDER / "a file")
    except (OSError, flix.FlixError) as error:
        assert RANK == 0 or "the first process" in str(error), error
    else:
        raise AssertionError("a folder that cannot be written was written")


def disagreeing() -> None:
    registry = flix.FeatureRegistry(
        {"language": ["hau", "swa", "yor", "zul" if RANK else "ibo"], "task": ["ner", "pos"]}
    )
    for model, what in (
        (adapt(Mlp(), flix.FlixConfig(registry=registry, ranks=2)), "'ibo'"),
        (adapt(Mlp(), flix.FlixConfig(registry=config().registry, ranks=2 + RANK)), "ranks"),
        (adapt(Mlp(), settings()), "frozen features"),
    ):
        if what == "frozen features" and RANK:
            freeze(model, {"task": ["ner"]})
        try:
            check_processes(model)
        except flix.ConfigError as error:
            assert "rank 1 against rank 0" in str(error) and what in str(error), error
        else:
            raise AssertionError(f"no word of {what}")


def banks(mesh: Mesh) -> None:
    bank = random_bank(settings(), {"q": (8, 16)})
    spread = shard(bank, mesh, P(None, None), features="all")
    assert held(spread)[0] * 2 == held(spread)[1]
    for path, pairs in read((settings(), spread)).items():
        for feature, own in read((settings(), bank))[path].items():
            for value, other in zip(own, pairs[feature], strict=True):
                assert np.array_equal(value, other)
    for rank, text in ((1, "6 slots"), (2, "no axis 'rows'")):
        cfg = flix.FlixConfig(registry=config().registry, ranks=rank)
        try:
            shard(
                random_bank(cfg, {"q": (8, 16)}),
                mesh,
                P(None, None),
                features="all" if rank == 1 else "rows",
            )
        except flix.ConfigError as error:
            assert text in str(error), error
        else:
            raise AssertionError(text)


if __name__ == "__main__":
    devices = np.asarray(jax.devices())
    assert len(devices) == 4 and jax.process_count() == 2
    (FOLDER / "a file").write_text("in the way") if RANK == 0 else None
    grid = devices.reshape(2, 2)  # rows are processes
    across, within = Mesh(grid, ("outer", "inner")), Mesh(grid, ("outer", "inner"))
    whole, none = P(None, None), {"up": P(None, None), "down": P(None, None)}
    tensor = {"up": P(None, "outer"), "down": P("outer", None)}
    check("data parallel", across, none, P("outer"))
    check("tensor parallel over processes", across, tensor, P("inner"))
    check("features over processes", across, none, P("inner"), "outer")
    check("features and data over all", Mesh(devices, ("all",)), none, P("all"), "all")
    banks(Mesh(devices, ("all",)))
    disagreeing()
    print("same as one process", flush=True)
