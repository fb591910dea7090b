"""Dropout on the low-rank path (docs/specification.md §1.8), in pure functions and in nnx models."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from flix import ConfigError  # noqa: E402
from flix.backends.jax import FlixParam, adapt, gather, linear, linear_rows, load, save, touched  # noqa: E402
from flix.backends.jax.adapt import flix_layers  # noqa: E402
from tests.helpers.jax import Net, random_bank  # noqa: E402
from tests.helpers.registry import IDS, WEIGHTS, config  # noqa: E402

RATE = 0.4


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(len(IDS), 3, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    return x, kernel, random_bank(config(), {"q": (6, 5)})


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_the_features_alone_see_less(case, strategy):
    """One mask for all features; gradients are those of what is left of the input."""
    x, kernel, bank = case
    key = jax.random.key(3)
    kept = jax.random.bernoulli(key, 1 - RATE, x.shape)

    def given(x, layer):
        return linear(x, kernel, layer, IDS, WEIGHTS, strategy=strategy, lora_dropout=RATE, key=key)

    def wanted(x, layer):
        less = jnp.where(kept, x / (1 - RATE), 0)
        return x @ kernel + linear(
            less, jnp.zeros_like(kernel), layer, IDS, WEIGHTS, strategy=strategy
        )

    def loss(f):
        return jax.value_and_grad(lambda x, layer: jnp.sum(f(x, layer) ** 2), argnums=(0, 1))

    np.testing.assert_allclose(given(x, bank["q"]), wanted(x, bank["q"]), rtol=2e-5, atol=1e-5)
    found, other = (jax.tree.leaves(jax.jit(loss(f))(x, bank["q"])) for f in (given, wanted))
    for mine, theirs in zip(found, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    present = touched(IDS, len(config().registry))
    rows = linear_rows(
        x, kernel, gather(bank, present)["q"], IDS, present, WEIGHTS, lora_dropout=RATE, key=key
    )
    np.testing.assert_allclose(rows, given(x, bank["q"]), rtol=2e-5, atol=1e-5)


def test_a_rate_needs_a_key_and_nothing_else_changes(case):
    x, kernel, bank = case
    with pytest.raises(ConfigError, match=r"lora_dropout=0\.4 draws a mask and needs key="):
        linear(x, kernel, bank["q"], IDS, lora_dropout=RATE)
    with pytest.raises(ConfigError, match="rate lora_dropout must be a number from 0 up to"):
        linear(x, kernel, bank["q"], IDS, lora_dropout=1.0, key=jax.random.key(0))
    plain = linear(x, kernel, bank["q"], IDS)
    assert jnp.array_equal(linear(x, kernel, bank["q"], IDS, key=jax.random.key(0)), plain)


def adapted(rate=RATE, targets="all-linear"):
    model = adapt(Net(), config(lora_dropout=rate, target_modules=targets))
    for i, (_, layer) in enumerate(flix_layers(model)):
        for name in ("flix_A", "flix_B"):
            variable = getattr(layer, name)
            variable[...] = jax.random.normal(jax.random.key(i), variable[...].shape)
    return model


TOKENS = np.arange(len(IDS) * 4).reshape(len(IDS), 4) % 11


def test_models_drop_while_they_train_and_by_their_own_generators():
    model, plain = adapted(), adapted(0.0)
    first, second = (model(TOKENS, flix_features=IDS) for _ in range(2))
    assert not jnp.array_equal(first, second)
    again = adapted()
    assert jnp.array_equal(again(TOKENS, flix_features=IDS), first)  # seeded
    nnx.reseed(again, dropout=5)
    changed = again(TOKENS, flix_features=IDS)
    assert not jnp.array_equal(changed, second)
    nnx.reseed(again, dropout=5)
    assert jnp.array_equal(again(TOKENS, flix_features=IDS), changed)
    for m in (model, plain):
        m.eval()
    assert jnp.array_equal(model(TOKENS, flix_features=IDS), plain(TOKENS, flix_features=IDS))
    assert not any(hasattr(layer, "flix_dropout") for _, layer in flix_layers(plain))


def test_compiled_steps_draw_anew():
    model, eager = adapted(), adapted()

    @nnx.jit
    def step(model, ids):
        def loss(model):
            return jnp.mean(model(TOKENS, flix_features=ids) ** 2)

        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FlixParam))(model)

    values = [step(model, jnp.asarray(IDS))[0] for _ in range(2)]
    assert values[0] != values[1]
    own = [jnp.mean(eager(TOKENS, flix_features=IDS) ** 2) for _ in range(2)]
    np.testing.assert_allclose(values, own, rtol=1e-5)


def test_a_recomputation_has_the_same_mask():
    grads = []
    for again in (False, True):
        model = adapted()

        def loss(model, again=again):
            run = lambda m, t: m(t, flix_features=IDS)  # noqa: E731
            return jnp.mean((nnx.remat(run) if again else run)(model, TOKENS) ** 2)

        grads.append(nnx.grad(loss, argnums=nnx.DiffState(0, FlixParam))(model))
    for mine, theirs in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_embeddings_see_their_tokens_whole():
    """As PEFT's do."""
    model, plain = adapted(targets=["embed"]), adapted(0.0, targets=["embed"])
    assert jnp.array_equal(model(TOKENS, flix_features=IDS), plain(TOKENS, flix_features=IDS))


def test_files_keep_the_rate(tmp_path):
    save(adapted(), tmp_path / "a")
    again = load(Net(), tmp_path / "a")
    assert again.flix_config.lora_dropout == RATE
    first, second = (again(TOKENS, flix_features=IDS) for _ in range(2))
    assert not jnp.array_equal(first, second)
