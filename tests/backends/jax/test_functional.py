"""The pure core against the dense formula."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flix
from flix.backends.jax import (
    embed,
    embed_rows,
    freeze,
    gather,
    init,
    linear,
    linear_rows,
    scatter,
    touched,
)
from tests.helpers.dense import dense
from tests.helpers.jax import (
    D_IN,
    D_OUT,
    KERNEL,
    check,
    normal,
    pairs_of,
    random_bank,
    value_and_pullback,
)
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_close, same_bits


@functools.partial(jax.jit, static_argnames="strategy")
def run(x: Any, layer: Any, ids: Any, weights: Any = None, strategy: str = "auto") -> Any:
    return linear(x, KERNEL, layer, ids, weights, strategy=strategy)


@pytest.mark.covers("pytree", "mixed batch", backend="jax")
@pytest.mark.covers("pytree", "gradients", backend="jax")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_per_row(strategy: str, weighted: bool, rows: bool) -> None:
    cfg = config()
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    check(layer, cfg, normal(5, 3, D_IN), IDS, WEIGHTS if weighted else None, strategy, rows)


@pytest.mark.covers("pytree", "per-token routing", backend="jax")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_per_token(strategy: str, rows: bool) -> None:
    cfg = config()
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    ids = np.stack([IDS, IDS[::-1]])
    weights = np.stack([WEIGHTS, WEIGHTS[::-1]])
    check(layer, cfg, normal(2, 5, D_IN), ids, weights, strategy, rows)


def test_many_features_and_gaps() -> None:
    """Unions smaller than the bank (masked gathers first), and ranks so unequal that slots are compacted."""
    cfg = config(
        registry=flix.FeatureRegistry({"g": [f"f{i}" for i in range(40)]}),
        ranks={"g": {f"f{i}": 6 if i == 3 else i % 2 for i in range(40)}},
        alpha=None,
    )
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    ids = np.array([[3, 1, 7, 3], [9, -1, 3, 2], [-1, 11, 11, 11]])
    weights = np.random.default_rng(0).normal(size=ids.shape).astype(np.float32)
    for strategy in ("gather", "masked"):
        for rows in (False, True):
            check(layer, cfg, normal(3, 2, D_IN), ids, weights, strategy, rows)


def test_single_and_vmap() -> None:
    cfg = config()
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    alike = np.tile(IDS[1], (3, 1))
    check(layer, cfg, normal(3, 2, D_IN), alike, np.tile(WEIGHTS[1], (3, 1)), "single", False)
    check(layer, cfg, normal(1, 2, D_IN), IDS[1:2], WEIGHTS[1:2], "auto", True)
    x = normal(5, 3, D_IN)
    mapped = jax.jit(jax.vmap(lambda x, i, w: linear(x, KERNEL, layer, i, w)))(x, IDS, WEIGHTS)
    assert_close(mapped, run(x, layer, IDS, WEIGHTS))
    with pytest.raises(flix.ConfigError, match="row 1 differs"):
        linear(x, KERNEL, layer, IDS, strategy="single")


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1, 1)])
def test_empty_and_one(shape: tuple[int, int]) -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    for strategy in ("auto", "gather", "masked"):
        y = run(normal(*shape, D_IN), layer, IDS[: shape[0]], strategy=strategy)
        assert y.shape == (*shape, D_OUT)


def test_nothing_active() -> None:
    cfg = config(ranks=0)
    layer = init(cfg, {"q": (D_IN, D_OUT)})["q"]
    x = normal(5, 3, D_IN)
    assert_close(linear(x, KERNEL, layer, IDS), x @ KERNEL)
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    assert_close(run(x, layer, np.full((5, 2), -1)), x @ KERNEL)


@pytest.mark.parametrize("strategy", ["gather", "masked", "single"])
def test_embedding(strategy: str) -> None:
    cfg = config()
    layer = random_bank(cfg, {"e": (11, D_OUT, "embedding")})["e"]
    ids, weights = (IDS, WEIGHTS) if strategy != "single" else (IDS[1:2], WEIGHTS[1:2])
    tokens = np.random.default_rng(0).integers(0, 11, (len(ids), 4))
    table, g = normal(11, D_OUT), normal(len(ids), 4, D_OUT)
    present = touched(ids, 6)
    one_hot = np.eye(11)[tokens]
    wanted = dense(one_hot, ids, pairs_of(layer, cfg), weights, dy=g)
    for rows in (False, True):

        def call(layer: Any, w: Any, rows: bool = rows) -> Any:
            if rows:
                part = gather({"e": layer}, present)["e"]
                return embed_rows(tokens, table, part, ids, present, w, strategy=strategy)
            return embed(tokens, table, layer, ids, w, strategy=strategy)

        y, (dlayer, dw) = value_and_pullback(call, g, layer, jnp.asarray(weights))
        assert_close(y, np.asarray(table, np.float64)[tokens] + wanted.y)
        assert_close(dw, wanted.weights)
        for i, feature in enumerate(cfg.registry.features):
            assert_close(dlayer.pair(*feature)[0], wanted.A[i])
            assert_close(dlayer.pair(*feature)[1], wanted.B[i])


def test_one_cache_entry_and_traced_equal() -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    x = normal(5, 9, D_IN)
    step = jax.jit(lambda layer, ids, w: linear(x, KERNEL, layer, ids, w))
    for ids in (IDS, IDS[::-1].copy(), np.full_like(IDS, 5)):
        y = step(layer, jnp.asarray(ids), jnp.asarray(WEIGHTS))
        assert_close(y, dense(x, ids, pairs_of(layer, config()), WEIGHTS, kernel=KERNEL.T).y)
    fresh = random_bank(config(), {"q": (D_IN, D_OUT)}, seed=3)["q"]
    step(fresh, jnp.asarray(IDS), jnp.asarray(WEIGHTS))
    assert step._cache_size() == 1


def test_dtypes() -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    x = normal(5, 9, D_IN)
    exact = run(x, layer, IDS, WEIGHTS)
    half = jax.jit(linear)(x.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), layer, IDS, WEIGHTS)
    assert half.dtype == jnp.bfloat16
    assert_close(half, exact)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda t: jnp.asarray(np.asarray(t), jnp.float64), layer)
        x64, k64 = np.asarray(x, np.float64), np.asarray(KERNEL, np.float64)
        y = jax.jit(linear)(
            jnp.asarray(x64), jnp.asarray(k64), wide, IDS, jnp.asarray(WEIGHTS, jnp.float64)
        )
        assert y.dtype == jnp.float64
        assert_close(y, dense(x64, IDS, pairs_of(layer, config()), WEIGHTS, kernel=k64.T).y)


def test_absent_features_get_no_gradient_and_scatter_keeps_bits() -> None:
    bank = random_bank(config(), {"q": (D_IN, D_OUT)})
    x, ids = normal(2, 9, D_IN), np.array([[0, 4], [1, -1]])
    grads = jax.jit(jax.grad(lambda bank: (run(x, bank["q"], ids) ** 2).sum()))(bank)
    grads, bank = jax.tree.map(np.asarray, (grads, bank))
    for feature, a, b in grads["q"].pairs():
        present = registry().id(*feature) in (0, 1, 4)
        assert bool(np.any(a)) == bool(np.any(b)) == present
    present = touched(ids, 6)
    assert present.tolist() == [0, 1, 4, 6]
    moved = jax.jit(
        lambda b: scatter(b, jax.tree.map(lambda t: t + 1, gather(b, present)), present)
    )
    moved = jax.tree.map(np.asarray, moved(bank))
    for feature, a, b in moved["q"].pairs():
        old_a, old_b = bank["q"].pair(*feature)
        if registry().id(*feature) in (0, 1, 4):
            assert same_bits(a, old_a + 1)
            assert same_bits(b, old_b + 1)
        else:
            assert same_bits(a, old_a)
            assert same_bits(b, old_b)


def test_nothing_grows_with_registered_features() -> None:
    """By rows, nothing as tall as the tables is computed, forward or backward."""
    cfg = config(
        registry=flix.FeatureRegistry({"g": [f"f{i}" for i in range(300)]}), ranks=3, alpha=None
    )
    bank = init(cfg, {"q": (D_IN, D_OUT)})

    def step(bank: Any, x: Any, ids: Any) -> Any:
        present = touched(ids, 300)

        def loss(rows: Any) -> Any:
            return linear_rows(x, KERNEL, rows["q"], ids, present).sum()

        return jax.value_and_grad(loss)(gather(bank, present))

    def heights(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            yield from (v.aval.shape[0] for v in equation.outvars if v.aval.ndim > 1)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from heights(inner)

    jaxpr = jax.make_jaxpr(step)(bank, normal(5, 9, D_IN), jnp.asarray(IDS)).jaxpr
    assert max(heights(jaxpr)) <= 3 * IDS.size


def test_frozen_features() -> None:
    bank = freeze(random_bank(config(), {"q": (D_IN, D_OUT)}), [("task", "ner")])
    x = normal(5, 9, D_IN)
    for strategy in ("gather", "masked"):
        grad = jax.grad(lambda layer, s=strategy: run(x, layer, IDS, strategy=s).sum())(bank["q"])
        assert not np.any(grad.pair("task", "ner")[0])
        assert np.any(grad.pair("task", "pos")[0])


def test_touched() -> None:
    assert touched(np.array([[3, -1], [3, 1]]), 6).tolist() == [1, 3, 6, 6]
    assert touched(np.array([[0, 1], [2, 3]]), 4).tolist() == [0, 1, 2, 3]
    assert touched(np.zeros((0, 2), np.int32), 4).tolist() == []
    assert touched(np.array([[3, -1]]), 6, size=1).tolist() == [3]
    with pytest.raises(flix.RoutingError, match="size is 1"):
        touched(np.array([[3, 2]]), 6, size=1)
    with pytest.raises(flix.RoutingError, match="outside the compiled function"):
        jax.jit(lambda ids: touched(ids, 6, size=1))(np.array([[3, 2]]))


def test_bad_sizes_and_names() -> None:
    layer = random_bank(config(), {"q": (D_IN, D_OUT)})["q"]
    with pytest.raises(flix.TargetError, match="5 -> 7"):
        linear(normal(5, 3, D_IN), KERNEL.T, layer, IDS)
    with pytest.raises(flix.TargetError, match="LayerBank"):
        linear(normal(5, 3, D_IN), KERNEL, {"q": layer}, IDS)  # type: ignore[arg-type]
    with pytest.raises(flix.ConfigError, match="strategy must be one of"):
        linear(normal(5, 3, D_IN), KERNEL, layer, IDS, strategy="fast")
    with pytest.raises(flix.TargetError, match="sizes are"):
        init(config(), {"q": (3,)})
    other = flix.FeatureRegistry({"language": ["hau"]}).encode([{"language": "hau"}] * 5)
    with pytest.raises(flix.RoutingError, match="another registry"):
        linear(normal(5, 3, D_IN), KERNEL, layer, other)
