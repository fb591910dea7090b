"""The strategy "fused": Pallas kernels, interpreted here, and lowered for the devices that this machine lacks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    adapt,
    embed,
    freeze,
    gather,
    linear,
    linear_rows,
    touched,
    value_and_grad,
)
from flix.backends.jax.kernels import fused
from tests.helpers.jax import (
    D_IN,
    D_OUT,
    KERNEL,
    TOKENS,
    Net,
    check,
    normal,
    random_bank,
    randomize,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close, same_bits

KINDS = ("gpu", "tpu")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each device's kernels, interpreted."""
    monkeypatch.setenv(fused.INTERPRET, request.param)
    return request.param


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.INTERPRET, "1")


def layer_of(**changes: Any) -> tuple[Any, Any]:
    cfg = config(**changes)
    return cfg, random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]


# Everything that IDS and WEIGHTS hold: padding, a feature twice, rank 0, an empty row.
@pytest.mark.parametrize("length", [1, 3, 18])
def test_per_row(kind: str, length: int) -> None:
    """Sorted into tiles, and, from 16 positions on, row by row: forward and all gradients against the oracle."""
    cfg, layer = layer_of()
    check(layer, cfg, normal(5, length, D_IN), IDS, WEIGHTS, "fused", rows=length == 3)


def test_per_row_by_rows_without_weights(interpreted: None) -> None:
    cfg, layer = layer_of()
    check(layer, cfg, normal(5, 18, D_IN), IDS, None, "fused", rows=True)
    check(layer, cfg, normal(1, 18, D_IN), IDS[1:2], WEIGHTS[1:2], "fused", rows=False)


def test_per_token(kind: str) -> None:
    cfg, layer = layer_of()
    ids, weights = np.stack([IDS, IDS[::-1]]), np.stack([WEIGHTS, WEIGHTS[::-1]])
    check(layer, cfg, normal(2, 5, D_IN), ids, weights, "fused", rows=kind == "tpu")


def test_many_features(interpreted: None) -> None:
    """More features than the batch has ids, ranks so unequal that other strategies compact them, and one over 16."""
    cfg = config(
        registry=flix.FeatureRegistry({"g": [f"f{i}" for i in range(40)]}),
        ranks={"g": {f"f{i}": 18 if i == 3 else i % 2 for i in range(40)}},
        alpha=None,
    )
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    ids = np.array([[3, 1, 7, 3], [9, -1, 3, 2], [-1, 11, 11, 11]])
    weights = np.random.default_rng(0).normal(size=ids.shape).astype(np.float32)
    for length in (2, 17):
        check(layer, cfg, normal(3, length, D_IN), ids, weights, "fused", rows=length == 2)


def both(
    cfg: Any, sizes: tuple[int, int], shape: tuple[int, int], ids: Any, dtype: Any, *names: str
) -> list[Any]:
    """Value and gradients under the strategies of these names."""
    layer = random_bank(cfg, {"q": sizes})["q"]
    kernel = normal(*sizes).astype(dtype) / sizes[0] ** 0.5
    x, g = normal(*shape, sizes[0]).astype(dtype), normal(*shape, sizes[1]).astype(dtype)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=ids.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(strategy: str, g: Any, *args: Any) -> Any:
        y, back = jax.vjp(
            lambda x, w, layer: linear(x, kernel, layer, ids, w, strategy=strategy), *args
        )
        return y, back(g)

    return [jax.tree.map(np.asarray, run(name, g, x, weights, layer)) for name in names]


def test_several_blocks_of_everything(kind: str) -> None:
    """Sizes that no block divides, several blocks of positions and of columns."""
    ids = np.random.default_rng(0).integers(-1, 6, (3, 2))
    wanted, found = both(config(), (150, 272), (3, 70), ids, jnp.float32, "gather", "fused")
    jax.tree.map(assert_close, found, wanted)


def test_bfloat16(kind: str) -> None:
    """Sums are kept in float32: on average no further from float32 than the plain path is."""
    ids = np.random.default_rng(0).integers(-1, 6, (6, 2))
    shape = (6, 2 if kind == "tpu" else 16)
    half = both(config(), (48, 32), shape, ids, jnp.bfloat16, "gather", "fused")
    (exact,) = both(config(), (48, 32), shape, ids, jnp.float32, "gather")
    for plain, ours, wanted in zip(*map(jax.tree.leaves, (*half, exact)), strict=True):
        assert ours.dtype == plain.dtype
        errors = [np.abs(t.astype(np.float32) - wanted) for t in (ours, plain)]
        assert errors[0].mean() <= 1.25 * errors[1].mean()
        assert errors[0].max() <= 1.2e-2 * np.abs(wanted).max()


def test_wide_types(interpreted: None) -> None:
    with jax.enable_x64(True):
        layer = layer_of()[1]
        layer = jax.tree.map(lambda t: jnp.asarray(np.asarray(t), jnp.float64), layer)
        kernel, x = jnp.asarray(KERNEL, jnp.float64), jnp.asarray(normal(5, 16, D_IN), jnp.float64)
        found, wanted = (
            linear(x, kernel, layer, IDS, WEIGHTS, strategy=s) for s in ("fused", "gather")
        )
        assert found.dtype == jnp.float64
        assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_empty(interpreted: None, shape: tuple[int, int]) -> None:
    layer = layer_of()[1]
    y = linear(normal(*shape, D_IN), KERNEL, layer, IDS[: shape[0]], strategy="fused")
    assert y.shape == (*shape, D_OUT)


def test_one_cache_entry_and_the_same_bits(interpreted: None) -> None:
    layer = layer_of()[1]
    x = normal(5, 17, D_IN)

    @jax.jit
    def step(layer: Any, ids: Any, w: Any) -> Any:
        def loss(layer: Any, w: Any) -> Any:
            return (linear(x, KERNEL, layer, ids, w, strategy="fused") ** 2).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(layer, w)

    for ids in (IDS, IDS[::-1].copy(), np.full_like(IDS, 5)):
        first, second = (step(layer, jnp.asarray(ids), jnp.asarray(WEIGHTS)) for _ in range(2))
        assert all(jax.tree.leaves(jax.tree.map(same_bits, first, second)))
    assert step._cache_size() == 1


def test_traced_bad_ids_poison_their_own_row(kind: str) -> None:
    layer = layer_of()[1]
    x = normal(5, 3 if kind == "gpu" else 16, D_IN)
    wrong = IDS.copy()
    wrong[2, 0] = 6
    step = jax.jit(lambda ids: linear(x, KERNEL, layer, ids, strategy="fused"))
    assert np.isnan(step(wrong)).any((1, 2)).tolist() == [False, False, True, False, False]
    present = touched(np.array([0, 4]), 6)
    part = gather({"q": layer}, present)["q"]
    rows = jax.jit(lambda i: linear_rows(x, KERNEL, part, i, present, strategy="fused"))
    assert np.isnan(rows(IDS)).any((1, 2)).tolist() == [False, True, True, False, True]


def test_vmap_and_remat(interpreted: None) -> None:
    layer = layer_of()[1]
    x = normal(5, 16, D_IN)

    def loss(strategy: str, layer: Any, x: Any, ids: Any, w: Any) -> Any:
        return (linear(x, KERNEL, layer, ids, w, strategy=strategy) ** 2).sum()

    def mapped(strategy: str) -> Any:
        of_one = jax.checkpoint(functools.partial(loss, strategy))
        axes = (None, 0, 0, 0)
        return jax.jit(jax.vmap(jax.value_and_grad(of_one, argnums=(0, 1)), axes))(
            layer, x, IDS, WEIGHTS
        )

    jax.tree.map(assert_close, mapped("fused"), mapped("gather"))


def test_frozen_features(interpreted: None) -> None:
    layer = freeze({"q": layer_of()[1]}, [("task", "ner")])["q"]

    def loss(layer: Any) -> Any:
        return linear(normal(5, 3, D_IN), KERNEL, layer, IDS, strategy="fused").sum()

    grad = jax.jit(jax.grad(loss))(layer)
    assert not np.any(grad.pair("task", "ner")[0])
    assert np.any(grad.pair("task", "pos")[0])


def test_model(interpreted: None) -> None:
    """A model's linear layers by the kernels, its embeddings by gather, trained by rows."""
    found = []
    for strategy in ("gather", "fused"):
        model = adapt(Net(), config(target_modules=["embed", "back"]), strategy=strategy)
        randomize(model)

        @nnx.jit
        def run(model: Any, ids: Any, tokens: Any) -> Any:
            def loss(model: Any, ids: Any) -> Any:
                return (model(tokens, flix_features=ids) ** 2).mean()

            return value_and_grad(loss)(model, ids)

        value, grads = run(model, jnp.asarray(IDS), jnp.asarray(TOKENS))
        found.append((value, grads.rows))
    jax.tree.map(assert_close, found[1], found[0])


def test_second_derivatives_are_refused_by_fused_alone(interpreted: None) -> None:
    layer = layer_of()[1]
    x = normal(2, 16, D_IN)

    def slope(strategy: str, x: Any) -> Any:
        loss = lambda x: (linear(x, KERNEL, layer, IDS[:2], strategy=strategy) ** 2).sum()  # noqa: E731
        return (jax.grad(loss)(x) ** 2).sum()

    plain = functools.partial(slope, "gather")
    twice, forward = jax.jit(lambda x: (jax.grad(plain)(x), jax.jvp(plain, (x,), (x,))[1]))(x)
    assert np.any(twice)
    assert_close((twice * x).sum(), forward)
    with pytest.raises(flix.ConfigError, match="differentiated once"):
        jax.grad(functools.partial(slope, "fused"))(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: linear(x, KERNEL, layer, IDS[:2], strategy="fused"), (x,), (x,))


def test_a_plain_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fused.INTERPRET, raising=False)
    layer, x = layer_of()[1], normal(5, 3, D_IN)
    with pytest.raises(flix.ConfigError, match=r"runs on 'cpu'.*FLIX_PALLAS_INTERPRET=1"):
        linear(x, KERNEL, layer, IDS, strategy="fused")
    with pytest.raises(flix.ConfigError, match="runs on 'cpu'"):
        jax.jit(lambda x: linear(x, KERNEL, layer, IDS, strategy="fused"))(x)
    monkeypatch.setenv(fused.INTERPRET, "yes")
    with pytest.raises(flix.ConfigError, match="must be 1 or gpu, tpu"):
        linear(x, KERNEL, layer, IDS, strategy="fused")
    monkeypatch.delenv(fused.INTERPRET)
    table, tokens = normal(11, D_OUT), np.zeros((5, 4), np.int32)
    bank = random_bank(config(), {"e": (11, D_OUT, "embedding")})["e"]
    looked_up = [embed(tokens, table, bank, IDS, strategy=s) for s in ("fused", "gather")]
    assert_close(*looked_up)


def step(target: fused.Target, *args: Any) -> Any:
    *inputs, place, g = args
    y, back = jax.vjp(lambda *inputs: fused.fused_sum(target, *inputs, place), *inputs)
    return y, back(g)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize(
    "sizes", [(16, 64, 16, 768, 2048), (5, 3, 64, 5, 7), (4, 100, 256, 1000, 96)]
)
def test_lowers_for_devices_that_are_not_here(platform: str, sizes: tuple[int, ...]) -> None:
    """What Triton and Mosaic refuse by shapes or operations shows in lowering, for which no device is needed."""
    count, length, rank, d_in, d_out = sizes
    target = fused.Target(fused.PLATFORMS[platform], False)
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes: Any = [
            ((count, length, d_out), dtype),
            ((count, length, d_in), dtype),
            ((7, rank, d_in), jnp.float32),
            ((7, rank, d_out), jnp.float32),
            ((count, 2), jnp.float32),
            ((count, 2), jnp.int32),
            ((count, length, d_out), dtype),
        ]
        traced = jax.jit(functools.partial(step, target)).trace(
            *(jax.ShapeDtypeStruct(*s) for s in shapes)
        )
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        for name in ("shrink", "expand", "outer"):
            assert f"flix_{name}" in text or f"_{name}" in text


@pytest.mark.parametrize("strategy", ["gather", "masked", "fused"])
def test_what_backward_keeps(interpreted: None, strategy: str) -> None:
    """Between forward and backward: x, rank-space values, the batch's rows; nothing as tall as the tables."""
    cfg = config(
        registry=flix.FeatureRegistry({"g": [f"f{i}" for i in range(300)]}), ranks=3, alpha=None
    )
    layer = random_bank(cfg, {"q": (D_IN, D_OUT)})["q"]
    present = touched(IDS, 300)
    part = gather({"q": layer}, present)["q"]
    x = normal(5, 19, D_IN)
    _, back = jax.vjp(
        lambda x, rows: linear_rows(x, KERNEL, rows, IDS, present, strategy=strategy), x, part
    )
    sizes = {leaf.shape for leaf in jax.tree.leaves(back) if leaf.ndim > 1}
    assert not any(300 * 3 in s for s in sizes)
    wide = {s for s in sizes if s[-1] in (D_IN, D_OUT)} - {x.shape, KERNEL.shape}
    if strategy == "fused":  # no example's own copies: each feature's block once, and one of zeros
        wide -= {(IDS.size + 1, 16, D_IN), (IDS.size + 1, 16, D_OUT)}
        assert not wide
    rows = {int(np.prod(s[:-1])) for s in wide}
    assert max(rows, default=0) <= IDS.size * 3
