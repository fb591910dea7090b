"""Weights of a new combination, found from a model's examples."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf

from flix import ConfigError, TargetError
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, search_weights
from tests.helpers.registry import config, registry
from tests.helpers.searching import GOAL, assert_goal_found
from tests.helpers.tensorflow import randomize

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)


def plain(name):
    x = keras.Input((8,), name=name)
    y = keras.layers.Dropout(0.5)(keras.layers.Dense(16, activation="tanh", name="up")(x))
    return keras.Model({name: x}, keras.layers.Dense(4, name="down")(y))


def made(name="x"):
    keras.utils.set_random_seed(0)
    model = adapt(plain(name), config(target_modules=["up", "down"]))
    randomize(layer for _, layer in flix_layers(model.base))
    return model


def examples(model, name="x"):
    routing = registry().encode([GOAL] * len(X))
    y = model({name: X, "flix_features": routing}, training=False)
    return {name: X, "labels": np.asarray(y)}


def squares(outputs, batch):
    return tf.reduce_mean((outputs - batch["labels"]) ** 2)


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


def test_the_model_is_as_before_and_losses_need_no_gradient():
    model = made()
    batch, before = examples(model), [v.numpy() for v in model.variables]
    wrong = search_weights(
        model,
        batch,
        {"task": "ner"},
        method="evolution",
        steps=3,
        loss=lambda y, given: np.mean((np.asarray(y) > 0) != (given["labels"] > 0)),
    )
    assert 0 <= wrong.loss <= wrong.before
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(variable.numpy(), value), variable.path


def test_a_subclassed_model_gets_the_whole_batch():
    class Losing(keras.Model):
        def __init__(self):
            super().__init__()
            self.up, self.down = keras.layers.Dense(16, name="up"), keras.layers.Dense(4, name="down")  # fmt: skip

        def call(self, given):
            y = self.down(self.up(given["x"]))
            return {"y": y, "loss": tf.reduce_mean((y - given["labels"]) ** 2)}

    net = Losing()
    batch = {"x": X, "labels": X[:, :4]}
    net(batch)
    model = adapt(net, config(target_modules=["up", "down"]))
    randomize(layer for _, layer in flix_layers(model.base))
    found = search_weights(model, batch, {"task": "ner"}, steps=5)
    assert found.loss < found.before


def test_mistakes_are_named():
    model = made()
    batch = examples(model)
    with pytest.raises(ConfigError, match="hold no loss"):
        search_weights(model, batch, {"task": "ner"})
    with pytest.raises(ConfigError, match="leave 'flix_weights' out"):
        search_weights(model, {**batch, "flix_weights": X}, {"task": "ner"}, loss=squares)
    with pytest.raises(TargetError, match="search_weights needs an adapted model"):
        search_weights(plain("x"), batch, {"task": "ner"}, loss=squares)
