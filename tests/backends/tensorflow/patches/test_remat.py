"""Rematerialised blocks run under their routing in the backward, too."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import remat as rematerialising

import flix
from flix.backends.keras.patches import remat
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, route
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import IDS, Block, randomize
from tests.helpers.tolerance import assert_close


def test_keras_gets_its_own_function_back():
    remat.install()
    wrapped = rematerialising.remat
    remat.install()
    assert rematerialising.remat is wrapped
    try:
        remat.undo()
        assert rematerialising.remat is wrapped.flix_wrapped
        remat.undo()
        assert rematerialising.remat is wrapped.flix_wrapped
    finally:
        remat.install()
    assert rematerialising.remat.flix_wrapped is wrapped.flix_wrapped


@pytest.mark.parametrize("eager", [True, False])
def test_rematerialised_blocks_give_the_plain_gradients(eager):
    x = np.random.default_rng(0).normal(size=(6, 9, 6)).astype("f")
    found = []
    for mode in ("full", None):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=mode):
            block = Block(6, name="block")
        inputs = keras.Input((9, 6), name="inputs")
        model = adapt(keras.Model(inputs, block(inputs)), config(target_modules=["up", "down"]))
        randomize(layer for _, layer in flix_layers(model.base))

        def gradients(model=model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model({"inputs": x, "flix_features": IDS}, training=True) ** 2)
            grads = tape.gradient(loss, model.trainable_variables)
            return [tf.convert_to_tensor(grad) for grad in grads]

        found.append((gradients if eager else tf.function(gradients))())
    for again, plain in zip(*found, strict=True):
        assert np.abs(plain).max() > 0
        assert_close(again, plain)


class Recomputed(keras.layers.Layer):
    """TensorFlow's own function, which runs a block again when the call is over."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(6, name="block")

    def build(self, shape):
        self.block.build(shape)

    def call(self, x):
        return tf.recompute_grad(self.block)(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_tensorflows_recompute_grad_is_refused_outside_of_its_route(compiled):
    x = np.random.default_rng(0).normal(size=(6, 9, 6)).astype("f")
    inputs = keras.Input((9, 6), name="inputs")
    model = adapt(keras.Model(inputs, Recomputed()(inputs)), config(target_modules=["up", "down"]))
    randomize(layer for _, layer in flix_layers(model.base))

    def gradients(x, block=model):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(block({"inputs": x, "flix_features": IDS}) ** 2)
        return tape.gradient(loss, x)

    run = tf.function(gradients) if compiled else gradients
    with pytest.raises(flix.RoutingError, match="no routing is in force"):
        run(tf.constant(x))
    with route(registry(), IDS):
        found = gradients(tf.constant(x))
        block = model.base.layers[1].block
        wanted = gradients(tf.constant(x), lambda given: block(given["inputs"]))
    assert_close(found, wanted)
