"""Values of one feature that are not finite stay with rows that use it (docs/specification.md §1.5)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flix
from flix.backends.jax import embed, gather, linear, linear_rows, touched
from tests.helpers.jax import random_bank

REGISTRY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(4)], "task": ["ner", "pos"]})
CONFIG = flix.FlixConfig(registry=REGISTRY, ranks=flix.ranks.by_group(language=2, task=3))
IDS = np.array([[0, 4], [1, 5], [2, -1], [3, 4]])  # the last row alone uses l3
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
X = np.random.default_rng(1).normal(size=(4, 3, 5)).astype("f")
TOKENS = np.random.default_rng(2).integers(0, 5, (4, 3))


def broken(layer: Any, table: str, value: float) -> Any:
    rows = layer.spec.row_range(("language", "l3"))
    tables = {"A": layer.A, "B": layer.B}
    tables[table] = tables[table].at[rows].set(value)
    return type(layer)(**tables, spec=layer.spec)


BROKEN = {
    "nan": ("A", np.nan, "float32"),
    "inf": ("B", np.inf, "float32"),
    "A overflows": ("A", 3e38, "float16"),
    "B overflows": ("B", 1e5, "float16"),
}


@pytest.mark.parametrize(
    ("strategy", "how", "rows", "token"),
    [
        *(("masked", how, False, False) for how in BROKEN),
        ("masked", "nan", True, True),
        ("masked", "inf", True, False),
        ("gather", "nan", False, True),
        ("gather", "B overflows", False, False),
        ("fused", "nan", False, False),
        ("fused", "inf", False, True),
    ],
)
def test_a_broken_feature_stays_in_its_rows(
    strategy: str, how: str, rows: bool, token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, value, dtype = BROKEN[how]
    if strategy == "fused":
        monkeypatch.setenv("FLIX_PALLAS_INTERPRET", "1")
    good = random_bank(CONFIG, {"q": (5, 7)})["q"]
    ids = np.repeat(IDS[:, None], 3, 1) if token else IDS
    present = touched(ids, 6)
    x, kernel = jnp.asarray(X, dtype), KERNEL.astype(dtype)

    def call(x: Any, layer: Any) -> Any:
        if rows:
            part = gather({"q": layer}, present)["q"]
            return linear_rows(x, kernel, part, ids, present, strategy=strategy)
        return linear(x, kernel, layer, ids, strategy=strategy)

    def loss(x: Any, layer: Any) -> Any:
        y = call(x, layer)
        return jnp.square(y.astype(jnp.float32)).sum(), y  # the broken row's gradient is NaN, too

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    results = []
    for layer in (good, broken(good, table, value)):
        (_, y), (dx, grads) = run(x, layer)
        own = {f: pair for f, *pair in type(layer)(grads.A, grads.B, layer.spec).pairs()}
        results.append((y, dx, own))
    (y, dx, own), (y_b, dx_b, own_b) = results
    assert not np.isfinite(np.asarray(y_b[3], "f")).any()
    np.testing.assert_array_equal(np.asarray(y[:3], "f"), np.asarray(y_b[:3], "f"))
    np.testing.assert_allclose(np.asarray(dx[:3], "f"), np.asarray(dx_b[:3], "f"), rtol=1e-5)
    for feature in own:
        if feature not in (("language", "l3"), ("task", "ner")):  # what row 3 does not use
            for a, b in zip(own[feature], own_b[feature], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_rows_that_are_not_finite_stay_out_of_other_features(strategy: str) -> None:
    """What a broken row brings into a later layer, and what comes back to it."""
    layer = random_bank(CONFIG, {"q": (5, 7)})["q"]
    for bad in ("x", "g"):
        x, g = jnp.asarray(X), jnp.ones((4, 3, 7))
        x, g = (x.at[3].set(np.nan), g) if bad == "x" else (x, g.at[3].set(np.nan))
        y, back = jax.vjp(lambda x, b: linear(x, KERNEL, b, IDS, strategy=strategy), x, layer)
        dx, grads = back(g)
        assert np.isnan(y[3]).all() == (bad == "x") and np.isfinite(y[:3]).all()
        assert np.isfinite(dx[:3]).all()
        for feature, a, b in type(layer)(grads.A, grads.B, layer.spec).pairs():
            if feature not in (("language", "l3"), ("task", "ner")):
                assert np.isfinite(a).all() and np.isfinite(b).all()


@pytest.mark.parametrize("strategy", ["gather", "masked"])
@pytest.mark.parametrize("table", ["A", "B"])
def test_embeddings(strategy: str, table: str) -> None:
    good = random_bank(CONFIG, {"e": (5, 7, "embedding")})["e"]
    results = []
    for layer in (good, broken(good, table, np.nan)):
        y, back = jax.vjp(lambda b: embed(TOKENS, KERNEL, b, IDS, strategy=strategy), layer)
        (grads,) = back(jnp.ones_like(y).at[3].set(0))
        results.append((y, {f: p for f, *p in type(layer)(grads.A, grads.B, layer.spec).pairs()}))
    (y, own), (y_b, own_b) = results
    np.testing.assert_array_equal(y[:3], y_b[:3])
    assert np.isnan(y_b[3]).any()
    for feature in own:
        if feature != ("language", "l3"):
            for a, b in zip(own[feature], own_b[feature], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5)


def test_forward_and_second_derivatives_of_masked() -> None:
    layer = random_bank(CONFIG, {"q": (5, 7)})["q"]

    def loss(x: Any, strategy: str) -> Any:
        return (linear(x, KERNEL, layer, IDS, strategy=strategy) ** 2).sum()

    x = jnp.asarray(X)
    for take in (
        lambda f: jax.jvp(f, (x,), (x,))[1],
        lambda f: jax.jvp(jax.grad(f), (x,), (x,))[1],
        lambda f: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    ):
        np.testing.assert_allclose(
            take(lambda x: loss(x, "masked")),
            take(lambda x: loss(x, "gather")),
            rtol=2e-4,
            atol=1e-4,
        )


# l1, which breaks, has the weight 0 in the fourth row; pos there, and in no other.
ZERO_IDS = np.array([[0, 4, 5], [1, 5, -1], [3, -1, -1], [0, 1, 5], [-1, -1, -1]])
ZERO_WEIGHTS = np.array([[1, 0.5, 2], [1.5, -1, 0], [0.5, 0, 0], [1, 0, 0], [0, 0, 0]], "f")
OTHERS = np.array([0, 2, 3, 4])
ZERO_WAYS = {  # (what A of l1 holds, B, the fourth row's input)
    "nan in A": (np.nan, None, None),
    "nan in B": (None, np.nan, None),
    "inf": (np.inf, -np.inf, None),
    "overflow": (3e38, 3e38, None),
    "nan in x": (None, None, np.nan),
}


@pytest.mark.parametrize("kind", ["linear", "rows", "embedding"])
@pytest.mark.parametrize("strategy", ["gather", "masked", "fused"])
def test_a_feature_with_the_weight_zero_is_absent(
    kind: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its values are; weights have their gradients all the same."""
    if strategy == "fused":
        if kind == "embedding":
            pytest.skip("embeddings gather")
        monkeypatch.setenv("FLIX_PALLAS_INTERPRET", "1")
    tokens = kind == "embedding"
    good = random_bank(CONFIG, {"q": (5, 7, "embedding") if tokens else (5, 7)})["q"]
    present = touched(ZERO_IDS, 6)

    def loss(x: Any, layer: Any, weights: Any, strategy: str = strategy) -> Any:
        if tokens:
            y = embed(x, KERNEL, layer, ZERO_IDS, weights, strategy=strategy)
        elif kind == "rows":
            part = gather({"q": layer}, present)["q"]
            y = linear_rows(x, KERNEL, part, ZERO_IDS, present, weights, strategy=strategy)
        else:
            y = linear(x, KERNEL, layer, ZERO_IDS, weights, strategy=strategy)
        return (y[OTHERS] * jnp.linspace(-1, 1, 7)).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (1, 2) if tokens else (0, 1, 2), has_aux=True))

    def outcome(x: Any, layer: Any) -> dict[str, Any]:
        (_, y), (*dx, tables, dw) = run(x, layer, ZERO_WEIGHTS)
        pairs = type(layer)(tables.A, tables.B, layer.spec).pairs()
        found = dict(zip("ywx", (np.array(value)[OTHERS] for value in (y, dw, *dx)), strict=False))
        found["w"][2, 1] = 0  # of the broken feature itself
        return found | {name: np.concatenate([a.ravel(), b.ravel()]) for (_, name), a, b in pairs}

    shape = (5, 3) if tokens else (5, 3, 5)
    x = np.random.default_rng(1).normal(size=shape).astype("f")
    x = np.random.default_rng(2).integers(0, 5, shape) if tokens else x
    wanted, dw = outcome(x, good), run(x, good, ZERO_WEIGHTS)[1][-1]
    at = jax.jit(lambda w: loss(x, good, w, "gather")[0])
    for n, k in np.argwhere(ZERO_IDS >= 0):
        more = ZERO_WEIGHTS.copy()
        more[n, k] += 1  # the sum is linear in its weights
        difference = at(more) - at(ZERO_WEIGHTS)
        np.testing.assert_allclose(dw[n, k], difference, rtol=1e-3, atol=1e-4)
    for way, (a, b, bad) in ZERO_WAYS.items():
        rows, given, apart = good.spec.row_range(("language", "l1")), x.copy(), ["l1"]
        layer = type(good)(
            good.A if a is None else good.A.at[rows].set(a),
            good.B if b is None else good.B.at[rows].set(b),
            good.spec,
        )
        if bad is not None:
            if tokens:
                continue
            given[3] = bad
        found = outcome(given, layer)
        if bad is not None:
            apart = ["l0"]  # which that row uses
            assert np.isnan(found["y"][2]).all()
            for name in ("y", "w", "x"):
                found[name][2] = wanted[name][2]
        for name, value in found.items():
            if name not in apart:
                np.testing.assert_allclose(
                    value, wanted[name], rtol=1e-4, atol=1e-5, err_msg=f"{way}: {name}"
                )


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_one_composition_with_a_weight_of_zero(bad: float) -> None:
    layer = random_bank(CONFIG, {"q": (5, 7)})["q"]
    rows = layer.spec.row_range(("language", "l1"))
    changed = type(layer)(layer.A.at[rows].add(bad), layer.B.at[rows].add(bad), layer.spec)
    ids, weights = np.array([[0, 1]] * 4), jnp.asarray([[1.0, 0.0]] * 4)

    def loss(x: Any, layer: Any, weights: Any, strategy: str) -> Any:
        return (linear(x, KERNEL, layer, ids, weights, strategy=strategy) ** 2).sum()

    take = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    dx, tables, dw = take(jnp.asarray(X), changed, weights, "single")
    want_x, want_tables, want_w = take(jnp.asarray(X), layer, weights, "gather")
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tables.A, want_tables.A, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tables.B, want_tables.B, rtol=1e-4, atol=1e-4)
    if not bad:
        np.testing.assert_allclose(dw, want_w, rtol=1e-4, atol=1e-4)
        assert np.abs(dw).min() > 1e-3


@pytest.mark.parametrize("strategy", ["gather", "masked", "single"])
def test_second_derivatives_by_a_weight_of_zero(strategy: str) -> None:
    """Of a gradient penalty: the sum is linear in the weight, so differences tell."""
    layer = random_bank(CONFIG, {"q": (5, 7)})["q"]
    ids = np.array([[0, 1]] * 4)

    def slope(weight: Any) -> Any:
        weights = jnp.ones((4, 2)).at[:, 1].set(weight)
        loss = lambda x: linear(x, KERNEL, layer, ids, weights, strategy=strategy).sum()  # noqa: E731
        return jax.grad(loss)(jnp.asarray(X))

    got = jax.jacobian(lambda w: slope(w).sum((1, 2)))(0.0)
    np.testing.assert_allclose(got, (slope(1.0) - slope(0.0)).sum((1, 2)), rtol=1e-3, atol=1e-4)
