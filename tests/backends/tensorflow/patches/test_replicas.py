"""Replicas run under what the caller has in force."""

import threading

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import mirrored_run

from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import disable, route
from flix.backends.tensorflow.patches import replicas
from tests.helpers.registry import registry
from tests.helpers.tensorflow import IDS, X, adapted, randomize
from tests.helpers.tolerance import assert_close


def test_replicas_see_the_callers_disable_and_routing():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model, given = adapted("functional")
    randomize(layer for _, layer in flix_layers(model.base))
    wanted = model(given).numpy()
    with disable(model):
        base = model(X)
        assert_close(strategy.run(lambda: model(given)), base)
        assert_close(model.predict(given, verbose=0), base)
    with route(registry(), IDS):
        assert_close(strategy.run(lambda: model(X)), wanted)
    assert_close(strategy.run(lambda: model(given)), wanted)
    assert_close(model.predict(given, verbose=0), wanted)
    assert np.abs(wanted - base).max() > 1e-3


def test_the_class_gets_its_own_methods_back():
    cls = mirrored_run._MirroredReplicaThread
    replicas.install()
    wrapped = cls.run
    replicas.install()
    assert cls.run is wrapped and issubclass(cls, threading.Thread)
    replicas.undo()
    try:
        assert cls.run is not wrapped
        replicas.undo()
    finally:
        replicas.install()
