"""Layers whose kernels a model uses without calling them are named by a call; those not reached are none."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from flix import TargetError
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, disable, route
from tests.helpers.registry import config
from tests.helpers.tensorflow import randomize
from tests.helpers.tolerance import assert_close

X = np.random.default_rng(0).normal(size=(4, 6)).astype("f")
IDS = np.array([[0, 4], [1, 5], [3, 4], [-1, -1]], np.int32)
GIVEN = {"inputs": X, "flix_features": IDS}


@keras.saving.register_keras_serializable(package="tests")
class Using(keras.layers.Layer):
    """Calls ``a``, and uses ``b`` in a way of its own."""

    def __init__(self, use, b=None, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b, self.use = keras.layers.Dense(6), b or keras.layers.Dense(6), use

    def build(self, shape):
        self.a.build(shape)
        self.b.build(shape)

    def call(self, x, training=None):
        return self.a(x) + self.use(self, x, training)


def plain(use, b=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    return keras.Model(inputs, Using(use, b, name="u")(inputs))


def adapted(use, b=None):
    model = adapt(plain(use, b), config(target_modules=["a", "b"]))
    randomize(layer for _, layer in flix_layers(model.base))
    return model


BYPASSES = {
    "matmul": lambda m, x, t: ops.matmul(x, m.b.kernel),
    "tensorflow": lambda m, x, t: tf.linalg.matmul(x, m.b.kernel),
    "value": lambda m, x, t: x @ m.b.kernel.value,
    "cast": lambda m, x, t: ops.matmul(x, ops.cast(m.b.kernel, "float32")),
    "slices": lambda m, x, t: ops.matmul(x, m.b.kernel[:, :6]),
    "function": lambda m, x, t: tf.function(lambda x: tf.matmul(x, m.b.kernel))(x),
}


@pytest.mark.parametrize("use", BYPASSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_that_is_used_without_its_layer_is_an_error_that_names_it(use, compiled):
    model = adapted(BYPASSES[use])
    run = tf.function(model) if compiled else model
    for _ in range(2):  # until it is mended
        with pytest.raises(TargetError, match=r"u\.b: adapted, but .*exclude_modules=\['b'\]"):
            run(GIVEN)
    registry = model.flix_config.registry
    with route(registry, IDS), pytest.raises(TargetError, match=r"u\.b: adapted"):
        run(X)
    with disable(model):
        assert_close(model(X), plain(BYPASSES[use])(X))


def test_einsum_dense_and_training():
    model = adapted(
        lambda m, x, t: ops.matmul(x, m.b.kernel), keras.layers.EinsumDense("bi,io->bo", (6,))
    )
    with pytest.raises(TargetError, match=r"u\.b: adapted"):
        model(GIVEN)
    for eager in (True, False):
        model.compile("sgd", "mse", run_eagerly=eager)
        for call in (
            lambda: model.fit(GIVEN, X, verbose=0),
            lambda: model.evaluate(GIVEN, X, verbose=0),
            lambda: model.predict(GIVEN, verbose=0),
            lambda: model.train_on_batch(GIVEN, X),
        ):
            with pytest.raises(TargetError, match=r"u\.b: adapted"):
                call()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_is_bypassed_in_evaluation_alone(compiled):
    model = adapted(lambda m, x, training: m.b(x) if training else ops.matmul(x, m.b.kernel))
    run = tf.function(model) if compiled else model
    run(GIVEN, training=True)
    with pytest.raises(TargetError, match=r"u\.b: adapted"):
        run(GIVEN, training=False)


HARMLESS = {
    "not reached": lambda m, x, t: x,
    "dtype": lambda m, x, t: ops.cast(x, m.b.kernel.dtype),
    "shape": lambda m, x, t: x * m.b.kernel.shape[0],
    "called, and read": lambda m, x, t: m.b(x) + ops.sum(m.b.kernel**2),
}


@pytest.mark.parametrize("use", HARMLESS)
def test_a_look_is_none_and_neither_is_a_layer_that_is_not_reached(use):
    model = adapted(HARMLESS[use])
    run = tf.function(model)
    for _ in range(2):
        model(GIVEN)
        run(GIVEN)
    layer = model.base.get_layer("u")
    with route(model.flix_config.registry, IDS):
        wanted = layer.a(X) + layer.use(layer, X, False)
    assert_close(model(GIVEN), wanted)
    with disable(model):
        assert_close(model(X), plain(HARMLESS[use])(X))


def test_a_second_look_leaves_no_trace_in_the_model():
    def use(m, x, training):
        m.add_loss(ops.sum(x))
        return ops.cast(x, m.b.kernel.dtype)

    model = adapted(use)
    for _ in range(2):
        model(GIVEN)
        (loss,) = model.losses
        assert_close(loss, X.sum(), times=10)


def test_layers_without_ranks_run_as_others_do():
    base = plain(lambda m, x, t: m.b(x))
    wanted = base(X)
    model = adapt(base, config(target_modules=["a", "b"], ranks=0))
    assert_close(model(GIVEN), wanted)
