"""The dense float64 reference that the JAX backend is held to, and tiny nnx models."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time here: one thread, and no expensive optimisation of code that runs once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import flix  # noqa: E402
from flix.backends.jax import init  # noqa: E402
from flix.backends.jax.model import flix_layers  # noqa: E402

# Padding first and last, a feature twice, rank 0 (id 2), negative and zero weights, an empty row.
IDS = np.array([[0, 4, -1], [1, 5, 2], [3, 3, 5], [-1, -1, -1], [-1, 4, 1]], np.int32)
WEIGHTS = np.array([[1, 0.5, 0], [-1.5, 2, 1], [0.25, 1, 0], [0, 0, 0], [0, 1, -0.5]], np.float32)


def registry() -> flix.FeatureRegistry:
    return flix.FeatureRegistry({"language": ["hau", "swa", "yor", "zul"], "task": ["ner", "pos"]})


def config(**changes: Any) -> flix.FlixConfig:
    """Unequal ranks, one of them 0, and an alpha that makes scales other than 1."""
    settings: dict[str, Any] = {
        "registry": registry(),
        "ranks": {
            "language": {"hau": 1, "swa": 3, "yor": 0, "zul": 2},
            "task": {"ner": 2, "pos": 4},
        },
        "alpha": {"task": 3.0},
    }
    return flix.FlixConfig(**{**settings, **changes})


def random_bank(
    cfg: flix.FlixConfig, layers: dict[str, Any], seed: int = 0, std: float = 0.3
) -> Any:
    rng = np.random.default_rng(seed)
    bank = init(cfg, layers)
    return jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) * std, t.dtype), bank)


def oracle(
    cfg: flix.FlixConfig, layer: Any, x: Any, ids: Any, weights: Any, cotangent: Any
) -> dict[str, Any]:
    """The update and its gradients from the formula, one position at a time, in float64.

    x is ``[*lead, S, d_in]`` for ids ``[*lead, W]``.
    """
    path, features = layer.spec.path, cfg.registry.features
    x, cotangent = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    w = np.ones(ids.shape) if weights is None else np.asarray(weights, np.float64)
    out: dict[str, Any] = {
        "y": np.zeros(cotangent.shape),
        "x": np.zeros(x.shape),
        "weights": np.zeros(ids.shape),
        "A": {},
        "B": {},
    }
    layer = jax.tree.map(lambda t: np.asarray(t, np.float64), layer)
    pairs = {f: layer.pair(*f) for f in features}
    for f, (a, b) in pairs.items():
        out["A"][f], out["B"][f] = np.zeros_like(a), np.zeros_like(b)
    for place in np.ndindex(ids.shape):
        if ids[place] < 0:
            continue
        f = features[ids[place]]
        (a, b), s, row = pairs[f], cfg.scale(path, f), place[:-1]
        for position in range(x.shape[len(row)]):
            at = (*row, position)
            h, back = a @ x[at], b.T @ cotangent[at]
            out["y"][at] += w[place] * s * (b @ h)
            out["x"][at] += w[place] * s * (a.T @ back)
            out["weights"][place] += s * (back @ h)
            out["A"][f] += w[place] * s * np.outer(back, x[at])
            out["B"][f] += w[place] * s * np.outer(cotangent[at], h)
    return out


def close(actual: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Equal up to the tolerance, relative to the size of what is wanted."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    size = max(np.abs(wanted).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * size)


def same_bits(left: Any, right: Any) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and left.tobytes() == right.tobytes()


class Block(nnx.Module):
    """An attention-like block with every kind of target."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.o = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)
        self.e = nnx.Einsum("bta,hac->bthc", (3, 6, 2), (3, 2), rngs=rngs)
        self.back = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.drop(self.o(jax.nn.gelu(self.q(x))))
        mixed = self.e(x).reshape(*x.shape[:2], 6)
        return x + self.back(jax.nn.gelu(mixed))


class Net(nnx.Module):
    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.layers = nnx.List([Block(rngs)])
        self.lm_head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TARGETS = ["embed", "q", "o", "e", "back"]
TOKENS = np.random.default_rng(5).integers(0, 11, (5, 4))


def randomize(model: Any, seed: int = 0, std: float = 0.3) -> None:
    rng = np.random.default_rng(seed)
    for _, layer in flix_layers(model):
        for table in (layer.flix_A, layer.flix_B):
            table[...] = jnp.asarray(rng.normal(size=table.shape) * std, table.dtype)


def adapted(seed: int = 0, **changes: Any) -> Any:
    from flix.backends.jax import adapt

    model = adapt(Net(seed), config(**{"target_modules": TARGETS, **changes}))
    randomize(model)
    return model
