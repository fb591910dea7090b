"""A layer's own compiled functions serve every request its own features (docs/specification.md §5.1.4)."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, add_feature, disable, merge, route
from flix.backends.tensorflow.patches.functions import Apart, take_off
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import randomize
from tests.helpers.tolerance import assert_close

X = np.random.default_rng(3).normal(size=(3, 5, 4)).astype("f")
REQUESTS = ([[0], [1], [0]], [[1], [1], [3]], [[-1], [0], [1]], [[0, 4], [1, 5], [3, -1]])


@keras.saving.register_keras_serializable(package="tests")
class Compiled(keras.layers.Layer):
    """A method and an attribute that are functions, with a loop and a branch inside."""

    def __init__(self, jit=False, **kwargs):
        super().__init__(**kwargs)
        self.jit = jit
        self.q, self.r = keras.layers.Dense(4), keras.layers.Dense(4)
        self.again = tf.function(self.branch, jit_compile=jit)

    def build(self, shape):
        self.q.build(shape)
        self.r.build(shape)

    def branch(self, x):
        return tf.cond(tf.size(x) > 0, lambda: self.r(x), lambda: x)

    @tf.function
    def call(self, x):
        y = self.again(self.q(x))
        return tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, self.r(y)), [0, y])[1]

    def get_config(self):
        return {**super().get_config(), "jit": self.jit}


def made(jit=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 4), name="inputs")
    base = keras.Model(inputs, Compiled(jit, name="block")(inputs))
    base(X)  # what is traced before a model is adapted must not answer after
    base(X[:1])
    model = adapt(base, config(target_modules=["q", "r"]))
    randomize(layer for _, layer in flix_layers(model.base))
    return model


def rows_alone(model, ids):
    """The answer, row by row, of models that have the row's features merged in."""
    found = []
    for row, own in enumerate(ids):
        features = [registry().features[i] for i in own if i >= 0]
        merged = merge(model, dict(features)) if features else None
        with disable(model):
            found.append((merged or model)(X[row : row + 1])[0])
    return np.stack(found)


@pytest.mark.parametrize("jit", [False, True])
def test_each_request_gets_its_own_features_whatever_was_traced_before(jit):
    model = made(jit)
    function, of_base = tf.function(model), tf.function(model.base)
    for ids in REQUESTS:
        wanted, ids = rows_alone(model, ids), np.array(ids, np.int32)
        given = {"inputs": tf.constant(X), "flix_features": tf.constant(ids)}
        assert_close(model(given), wanted)
        assert_close(function(given), wanted)
        assert_close(model.predict(given, verbose=0), wanted)
        tokens = {**given, "flix_features": np.repeat(ids[:, None], 5, 1)}
        assert_close(model(tokens), wanted)
        with route(registry(), ids):
            assert_close(model(X), wanted)
            assert_close(of_base(given["inputs"]), wanted)
        with disable(model):
            assert_close(model(given), rows_alone(model, [[]] * 3))


def test_gradients_go_through_to_tables_and_weights():
    model = made()
    ids, weights = np.array([[0, 4], [1, 5], [3, -1]], np.int32), np.full((3, 2), 0.7, "f")
    for _ in range(2):  # the second time from what was traced
        given = {"inputs": X, "flix_features": ids, "flix_weights": tf.constant(weights)}
        with tf.GradientTape() as tape:
            tape.watch(given["flix_weights"])
            loss = tf.reduce_sum(model(given) ** 2)
        found, *tables = tape.gradient(loss, [given["flix_weights"], *model.trainable_variables])
        assert all(np.abs(tf.convert_to_tensor(grad)).max() > 0 for grad in tables)
        moved = {**given, "flix_weights": weights + np.array([[1e-3, 0], [0, 0], [0, 0]], "f")}
        slope = (tf.reduce_sum(model(moved) ** 2) - loss) / 1e-3
        np.testing.assert_allclose(found[0, 0], slope, rtol=0.05)


def test_features_that_join_act_and_copies_run_their_own_code():
    model = made()
    given = {"inputs": X, "flix_features": np.array([[0], [1], [3]], np.int32)}
    before = model(given).numpy()
    twin = copy.deepcopy(model)
    assert_close(twin(given), before)
    add_feature(model, "language", "ibo", rank=2)
    assert_close(model(given), before)
    randomize((layer for _, layer in flix_layers(model.base)), seed=5)
    given["flix_features"] = np.full((3, 1), model.flix_config.registry.id("language", "ibo"))
    assert_close(model(given), merge(model, {"language": "ibo"})(X))
    given["flix_features"] = np.array([[0], [1], [3]], np.int32)
    assert np.abs(model(given) - before).max() > 1e-3
    assert_close(twin(given), before)


def test_a_layer_gets_its_own_functions_back():
    block = made().base.get_layer("block")
    assert isinstance(block.call, Apart) and isinstance(block.again, Apart)
    take_off(block)
    assert isinstance(block.again, tf.types.experimental.PolymorphicFunction)
    assert "call" not in vars(block)
