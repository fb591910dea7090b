"""Pure functions over kernels with a scale (docs/jax.md)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flix
from flix.backends.jax import embed, init, linear, merge_kernels
from tests.helpers.dense import dense
from tests.helpers.jax import pairs_of, random_bank
from tests.helpers.jax_around import OUT, ROW, SIZE, inputs, kernel
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_close

VALUES = jnp.round(kernel() * 30).astype(jnp.int8)
KERNELS: dict[str, Any] = {
    "channel": ({"kernel": VALUES, "scale": jnp.full((1, OUT), 1 / 30)}, VALUES / 30),
    "block": (
        {"qvalue": VALUES, "scale": jnp.asarray([[0.1], [0.2], [0.3]])},
        VALUES * np.repeat([[0.1], [0.2], [0.3]], 2, 0),
    ),
    "zero": (
        {"kernel": VALUES, "scale": jnp.float32(0.05), "zero_point": jnp.full((OUT,), 3, jnp.int8)},
        (VALUES - 3.0) * 0.05,
    ),
    "function": (lambda x: x @ (VALUES / 30), VALUES / 30),
}


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@pytest.mark.parametrize("form", KERNELS)
def test_pure_functions_take_kernels_with_a_scale(form: str, strategy: str) -> None:
    given, whole = KERNELS[form]
    settings = config()
    layer = random_bank(settings, {"q": (SIZE, OUT)})["q"]
    x = inputs("int8")
    dy = np.random.default_rng(4).normal(size=(*x.shape[:-1], OUT)).astype(np.float32)
    pairs = pairs_of(layer, settings)
    wanted = dense(x, IDS, pairs, WEIGHTS, kernel=np.asarray(whole, np.float64).T, dy=dy)

    @jax.jit
    def run(x: Any, layer: Any) -> Any:
        def call(x: Any, layer: Any) -> Any:
            return linear(x, given, layer, IDS, WEIGHTS, strategy=strategy)

        y, back = jax.vjp(call, x, layer)
        return y, back(jnp.asarray(dy))

    y, (dx, tables) = run(x, layer)
    assert_close(y, wanted.y)
    assert_close(dx, wanted.x)
    for i, feature in enumerate(settings.registry.features):
        a, b = tables.pair(*feature)
        assert_close(a, wanted.A[i])
        assert_close(b, wanted.B[i])


@pytest.mark.parametrize("form", ["channel", "block", "zero", "function"])
def test_pure_embeddings_take_tables_with_a_scale(form: str) -> None:
    given, whole = KERNELS[form]
    given = (lambda tokens: VALUES[tokens] / 30) if form == "function" else given
    settings = config()
    layer = random_bank(settings, {"e": (SIZE, OUT, "embedding")})["e"]
    tokens = inputs("embed")
    wanted = dense(
        np.eye(SIZE)[np.asarray(tokens)], IDS, pairs_of(layer, settings), kernel=np.asarray(whole).T
    )
    assert_close(embed(tokens, given, layer, IDS), wanted.y)


def test_kernels_with_a_scale_are_merged_if_asked() -> None:
    settings = config()
    bank = random_bank(settings, {"q": (SIZE, OUT)})
    given, whole = KERNELS["channel"]
    row = registry().encode([ROW])
    x = inputs("int8")[:1]
    for kernels in ({"q": given}, {"q": VALUES}):
        with pytest.raises(flix.TargetError, match=r"'q' cannot be merged.*quantised \(int8\)"):
            merge_kernels(settings, bank, kernels, ROW)
    found = merge_kernels(settings, bank, {"q": given}, ROW, dequantize=True)["q"]
    assert found.dtype == jnp.float32
    assert_close(x @ found, linear(x, whole, bank["q"], row.ids, row.weights), times=2)
    with pytest.raises(flix.TargetError, match="got a function"):
        merge_kernels(settings, bank, {"q": KERNELS["function"][0]}, ROW, dequantize=True)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"kernel": VALUES}, r"mapping with 'scale'"),
        ({"scale": jnp.ones(OUT)}, r"mapping with 'scale'"),
        ({"kernel": VALUES, "scale": jnp.ones((4, 1))}, r"its scale \[4, 1\]"),
        ({"kernel": VALUES.T, "scale": jnp.ones(())}, r"the kernel is \[4, 6\]"),
        (lambda x: x, r"the kernel's function gives \[5, 3, 6\], not \[5, 3, 4\]"),
    ],
)
def test_kernels_of_other_forms_are_refused_by_name(given: Any, message: str) -> None:
    layer = init(config(), {"q": (SIZE, OUT)})["q"]
    with pytest.raises(flix.TargetError, match=f"layer 'q'.*{message}"):
        linear(inputs("int8"), given, layer, IDS)
