"""Weights of a new combination, found from a model's examples."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
import jax
import jax.numpy as jnp
from flax import nnx

from flix import ConfigError, TargetError
from flix.backends.jax import adapt, init, search_weights
from flix.backends.jax.layers import FlixParam
from tests.helpers.registry import config, registry
from tests.helpers.searching import GOAL, assert_goal_found

X = np.random.default_rng(0).normal(size=(32, 3, 8)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(jnp.tanh(self.up(x))))


def made():
    model, rng = adapt(Net(), config(target_modules=["up", "down"])), np.random.default_rng(1)
    state = nnx.state(model, FlixParam)
    nnx.update(model, jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) / 2, t.dtype), state))  # fmt: skip
    return model


def examples(model):
    model.eval()
    y = model(X, flix_features=registry().encode([GOAL] * len(X)))
    model.train()
    return {"x": X, "labels": np.asarray(y)}


def values(model):
    def plain(value):
        keys = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(value) if keys else value)

    return jax.tree.map(plain, nnx.as_pure(nnx.state(model)))


def squares(outputs, batch):
    return ((outputs - batch["labels"]) ** 2).mean()


@pytest.mark.parametrize("method", ["gradient", "evolution"])
def test_the_weights_that_made_the_examples_are_found(method):
    model = made()
    found = search_weights(
        model,
        examples(model),
        {"task": "ner"},
        groups=["language"],
        loss=squares,
        method=method,
        steps=80,
        l1=0.0,
    )
    assert_goal_found(found)


def test_batches_count_by_their_rows():
    model = made()
    batch = examples(model)
    parts = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 5), slice(5, 32))]
    whole, split = (
        search_weights(model, given, {"task": "ner"}, loss=squares, steps=5)
        for given in (batch, parts)
    )
    assert split.loss == pytest.approx(whole.loss, rel=1e-4)
    assert split.before == pytest.approx(whole.before, rel=1e-4)


def test_the_model_is_as_before():
    model = made()
    batch = examples(model)
    before = values(model)
    search_weights(model, batch, {"task": "ner"}, loss=squares, steps=3)
    with pytest.raises(ZeroDivisionError):
        search_weights(model, batch, {"task": "ner"}, loss=lambda *_: 1 / 0)
    after = values(model)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert not model.drop.deterministic


def test_losses_without_a_gradient():
    model = made()
    wrong = search_weights(
        model,
        examples(model),
        {"task": "ner"},
        method="evolution",
        steps=3,
        loss=lambda y, batch: np.mean((np.asarray(y) > 0) != (batch["labels"] > 0)),
    )
    assert 0 <= wrong.loss <= wrong.before


def test_mistakes_are_named():
    model = made()
    batch = examples(model)
    with pytest.raises(ConfigError, match="hold no loss"):
        search_weights(model, batch, {"task": "ner"})
    with pytest.raises(ConfigError, match="leave 'flix_weights' out"):
        search_weights(model, {**batch, "flix_weights": X}, {"task": "ner"}, loss=squares)
    with pytest.raises(TargetError, match="search_weights needs an adapted model"):
        search_weights(Net(), batch, {"task": "ner"}, loss=squares)
    pair = model.flix_config, init(model.flix_config, {"up": (8, 16)})
    with pytest.raises(TargetError, match="a bank is never called"):
        search_weights(pair, batch, {"task": "ner"}, loss=squares)


def test_a_model_that_scans_its_layers_is_searched():
    class Stacked(nnx.Module):
        def __init__(self):
            stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs)))
            self.layers = stack(nnx.Rngs(0))

        def __call__(self, x):
            run = nnx.scan(
                lambda x, up: jnp.tanh(up(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return run(x, self.layers)

    rng = np.random.default_rng(1)
    model = adapt(Stacked(), config(target_modules="all-linear"))
    state = nnx.state(model, FlixParam)
    nnx.update(model, jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) / 2, t.dtype), state))  # fmt: skip
    found = search_weights(
        model, examples(model), {"task": "ner"}, groups=["language"], loss=squares, l1=0.0
    )
    assert found.loss < 0.1 * found.before
