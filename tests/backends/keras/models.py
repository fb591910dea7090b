"""A small Keras model to try things on, on any backend of Keras."""

import keras
import numpy as np
from keras import ops

from flix.backends.keras import adapt
from flix.backends.keras.paths import flix_layers
from tests.helpers.registry import config

JAX = keras.backend.backend() == "jax"
D_IN, D_OUT = 5, 4
ABSENT = ("language.zul", "task.pos")
TARGETS = ["emb", "q", "mha.query", "mha.attention_output", "out"]
SMALL = ["q", "out"]
_rng = np.random.default_rng(0)
X = _rng.integers(0, 11, (6, 5)).astype(np.int32)
IDS = np.array([[0, 4], [1, 5], [3, 5], [-1, 4], [0, -1], [3, 4]], np.int32)
GIVEN = {"inputs": X, "flix_features": IDS}
FLOATS = _rng.normal(size=(6, 5)).astype(np.float32)
Y = _rng.normal(size=(6, 3)).astype(np.float32)


def functional(vocabulary=11, d=8, length=5):
    """Embedding, Dense, attention (EinsumDense inside), Dense; the same values on every backend."""
    inputs = keras.Input((length,), dtype="int32", name="inputs")
    x = keras.layers.Embedding(vocabulary, d, name="emb")(inputs)
    x = keras.layers.Dense(d, activation="tanh", name="q")(x)
    x = keras.layers.MultiHeadAttention(2, 4, name="mha")(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return _filled(keras.Model(inputs, keras.layers.Dense(3, name="out")(x)))


def small():
    """Two Dense layers, which compile in little time."""
    inputs = keras.Input((5,), name="inputs")
    x = keras.layers.Dense(4, activation="tanh", name="q")(inputs)
    return _filled(keras.Model(inputs, keras.layers.Dense(3, name="out")(x)))


def _filled(model):
    rng = np.random.default_rng(1)
    model.set_weights(
        [(rng.normal(size=w.shape) * 0.4).astype(w.dtype) for w in model.get_weights()]
    )
    return model


def randomize(layers, seed=0):
    """Random tables, so that B is not zero; row 0, which stands for unused slots, stays zero."""
    rng = np.random.default_rng(seed)
    for layer in layers:
        for table in (layer.flix_A, layer.flix_B):
            value = rng.normal(size=table.shape) * 0.5
            value[0] = 0
            table.assign(value)


def adapted(whole=False, randomized=True, **changes):
    """An adapted model, small or of every kind of layer, and what it is called with."""
    targets = TARGETS if whole else SMALL
    model = functional() if whole else small()
    model = adapt(model, config(**{"target_modules": targets, **changes}))
    if randomized:
        randomize(layer for _, layer in flix_layers(model.base))
    return model, {"inputs": X if whole else FLOATS, "flix_features": IDS}


def numpy_of(x):
    return np.asarray(ops.convert_to_numpy(x), np.float64)
