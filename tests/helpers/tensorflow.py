"""Small Keras models to try things on."""

import keras
import numpy as np
import tensorflow as tf

from flix.backends.tensorflow import FlixDense, adapt
from tests.helpers.dense import by_id, dense
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close


def randomize(layers, seed=0):
    """Random tables, so that B is not zero; row 0, which stands for unused slots, stays zero."""
    rng = np.random.default_rng(seed)
    for layer in layers:
        for table in (layer.flix_A, layer.flix_B):
            value = rng.normal(size=table.shape) * 0.5
            value[0] = 0
            table.assign(value)


def pairs_of(layer):
    """A layer's pairs for the dense reference."""
    return by_id(layer.flix_config, layer.pairs())


def table_grads(layer, grad, part):
    """A table's gradient (slices or dense) as {id: dA or dB}, and the rows that it speaks of."""
    rows = set(np.asarray(grad.indices).tolist()) if isinstance(grad, tf.IndexedSlices) else None
    dense = np.asarray(tf.convert_to_tensor(grad), np.float64)
    assert not dense[0].any()
    found, start = {}, 1
    for i, rank in enumerate(layer.flix_layout.ranks):
        span = dense[start : start + rank]
        found[i] = span if part == "A" else span.T
        start += rank
    return found, rows


def functional(vocabulary=11, d=8, length=5):
    """Embedding, Dense, attention (EinsumDense inside), Dense."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((length,), dtype="int32", name="inputs")
    x = keras.layers.Embedding(vocabulary, d, name="emb")(inputs)
    x = keras.layers.Dense(d, activation="tanh", name="q")(x)
    x = keras.layers.MultiHeadAttention(2, 4, name="mha")(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="out")(x))


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A composite layer without names."""

    def __init__(self, d, **kwargs):
        super().__init__(**kwargs)
        self.d = d
        self.up = keras.layers.Dense(2 * d, activation="relu")
        self.down = keras.layers.Dense(d)

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], 2 * self.d))

    def call(self, inputs):
        return inputs + self.down(self.up(inputs))

    def get_config(self):
        return {**super().get_config(), "d": self.d}


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A subclassed model with unnamed layers, one list of blocks, dropout, and batch normalisation."""

    def __init__(self, d=6, **kwargs):
        super().__init__(**kwargs)
        self.d = d
        self.first = keras.layers.Dense(d)
        self.blocks = [Block(d), Block(d)]
        self.norm = keras.layers.BatchNormalization()
        self.head = keras.layers.Dense(2)

    def build(self, input_shape):
        self.first.build(input_shape)
        inner = (*input_shape[:-1], self.d)
        for layer in (*self.blocks, self.norm, self.head):
            layer.build(inner)

    def call(self, inputs):
        x = self.first(inputs)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def get_config(self):
        return {**super().get_config(), "d": self.d}


def sequential(d=6):
    """A sequential model with automatic names."""
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((d,)), keras.layers.Dense(d), keras.layers.Dense(d)])


def batch(rows=6, length=5, vocabulary=11, seed=0):
    """Token ids ``[rows, length]`` and routing ids ``[rows, 2]``."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    ids = np.stack([rng.integers(-1, 4, rows), rng.integers(4, 6, rows)], 1).astype(np.int32)
    return x, ids


X, IDS = batch()
GIVEN = {"inputs": X, "flix_features": IDS}
KINDS = ["functional", "sequential", "subclassed"]


def made(kind):
    """(a plain model, its inputs, its targets)."""
    if kind == "functional":
        return functional(), X, ["emb", "q", "mha.query", "mha.attention_output", "out"]
    x = np.random.default_rng(0).normal(size=(6, 6)).astype("f")
    if kind == "sequential":
        return sequential(), x, ["dense", "dense_1"]
    keras.utils.set_random_seed(3)
    model = Subclassed()
    model(x)
    return model, x, ["first", "blocks.0.up", "blocks.1.down", "head"]


def adapted(kind="functional", **changes):
    model, x, targets = made(kind)
    model = adapt(model, config(**{"target_modules": targets, **changes}))
    return model, {"inputs": x, "flix_features": IDS}


STRATEGIES = ["gather", "masked", "auto", "fused"]
D_IN, D_OUT = 5, 4


def flix_dense(strategy="auto", dtype="float64", **kwargs):
    layer = FlixDense(D_OUT, config=config(), name="q", strategy=strategy, dtype=dtype, **kwargs)
    layer.build((None, D_IN))
    randomize([layer])
    return layer


def gradients(layer, x, ids, weights, dy):
    """y and the gradients to x, A, B and the weights."""
    x = tf.constant(x)
    w = None if weights is None else tf.constant(weights)
    with tf.GradientTape() as tape:
        tape.watch([t for t in (x, w) if t is not None])
        y = layer(x, flix_features=ids, flix_weights=w)
    sources = [x, layer.flix_A, layer.flix_B] + ([w] if w is not None else [])
    return y, tape.gradient(y, sources, tf.constant(dy))


def check(layer, kernel, x, ids, weights):
    """Forward and every gradient, as the oracle has them; gradients speak only of features in use."""
    dy = np.random.default_rng(3).normal(size=(*x.shape[:-1], kernel.shape[1]))
    wanted = dense(x, ids, pairs_of(layer), weights, kernel=kernel.T, dy=dy)
    y, (dx, da, db, *dw) = gradients(layer, x, ids, weights, dy)
    assert_close(y, wanted.y)
    assert_close(dx, wanted.x)
    acting = np.asarray(ids)[
        np.ones_like(ids, bool) if weights is None else np.not_equal(weights, 0)
    ]
    used = {1 + r for i in np.unique(acting) if i >= 0 for r in rows_of(layer, i)}
    for part, grad in (("A", da), ("B", db)):
        found, rows = table_grads(layer, grad, part)
        for i, value in getattr(wanted, part).items():
            assert_close(found[i], value)
        if rows is not None:
            assert rows - {0} == used
    if weights is not None:
        assert_close(dw[0], wanted.weights)


def rows_of(layer, feature):
    ranks = layer.flix_layout.ranks
    return range(sum(ranks[:feature]), sum(ranks[: feature + 1]))


ROUTINGS = {
    "plain": [[0, 4], [1, 5], [3, 5]],
    "padding": [[0, -1], [-1, -1], [-1, 5]],
    "duplicates": [[1, 1], [4, 4], [0, 4]],
    "rank 0 alone": [[2, -1], [2, 4], [2, 2]],
    "nothing": [[-1, -1], [-1, -1], [-1, -1]],
    "wide": [[0, 1, 2, 3, 4, 5], [-1] * 6, [5, 4, -1, -1, 0, 0]],
}
