"""Each layer against the dense reference, by hand and in models; dtypes, bad arguments."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.tensorflow import FlixDense, FlixEinsumDense, FlixEmbedding, route
from tests.helpers.dense import dense
from tests.helpers.registry import config
from tests.helpers.tensorflow import (
    D_IN,
    D_OUT,
    ROUTINGS,
    STRATEGIES,
    flix_dense,
    pairs_of,
    randomize,
    table_grads,
)
from tests.helpers.tolerance import assert_close


def test_bias_and_activation_come_after_the_sum():
    layer = flix_dense(activation="relu")
    layer.bias.assign([0.5, -0.5, 1.0, 0.0])
    x, ids = (
        np.random.default_rng(0).normal(size=(3, 9, D_IN)),
        np.array(ROUTINGS["plain"], np.int32),
    )
    wanted = dense(x, ids, pairs_of(layer), kernel=layer.kernel.numpy().T, bias=layer.bias).y
    assert_close(layer(x, flix_features=ids), np.maximum(wanted, 0))


EQUATIONS = {
    # equation: the input's shape, the output's without its batch, the kernel's axes shared with the input
    "abc,cde->abde": ((3, 2, 5), (None, 2, 3), "c"),  # attention's query
    "abcd,cde->abe": ((3, 2, 2, 3), (None, 4), "cd"),  # attention's output
    "abdc,cde->abe": (
        (3, 2, 3, 2),
        (None, 4),
        "cd",
    ),  # contracted axes in another order than the kernel's
    "abc,dce->abed": (
        (3, 2, 5),
        (None, 3, 2),
        "c",
    ),  # made axes around the contracted one, swapped after
    "abc,cd->adb": ((3, 2, 5), (4, None), "c"),  # the new axis not last
    "...c,cd->...d": ((3, 2, 5), (4,), "c"),
    "abc...,cd->abd...": ((3, 2, 5, 2), (2, 4), "c"),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_einsum_dense_is_the_oracle(equation, strategy):
    rng = np.random.default_rng(0)
    shape, made, contracted = EQUATIONS[equation]
    layer = FlixEinsumDense(
        equation, made, config=config(), name="q", strategy=strategy, dtype="float64"
    )
    x, ids = rng.normal(size=shape), np.array(ROUTINGS["wide"], np.int32)
    layer.build(x.shape)
    randomize([layer])
    kernel = layer.kernel.numpy()
    axes = equation.split(",")[1].split("->")[0]
    order = [axes.index(c) for c in contracted + "".join(c for c in axes if c not in contracted)]
    wanted = np.einsum(equation, x, kernel)
    for row, active in enumerate(ids):
        for i in active:
            if i in (pairs := pairs_of(layer)):
                a, b, s = pairs[i]
                update = (s * b @ a).T.reshape([kernel.shape[k] for k in order])
                update = update.transpose(np.argsort(order))
                wanted[row] += np.einsum(equation, x[row : row + 1], update)[0]
    assert_close(layer(x, flix_features=ids), wanted)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "single"])
def test_embedding_is_the_oracle(strategy):
    rng, vocabulary = np.random.default_rng(0), 7
    layer = FlixEmbedding(
        vocabulary, D_OUT, config=config(), name="emb", strategy=strategy, dtype="float64"
    )
    layer.build()
    randomize([layer])
    kernel = layer.embeddings.numpy()
    forms = [*ROUTINGS.values(), rng.integers(-1, 6, (3, 9, 2)), np.zeros((0, 2), np.int32)]
    if strategy == "single":
        forms = [[[1, 4]] * 3]
    for ids in map(np.array, forms):
        tokens = rng.integers(0, vocabulary, (len(ids), 9)).astype(np.int32)
        onehot = np.eye(vocabulary)[tokens]
        weights = rng.normal(size=ids.shape)
        if strategy == "single":
            weights[:] = weights[0]
        dy = rng.normal(size=(len(ids), 9, D_OUT))
        wanted = dense(onehot, ids, pairs_of(layer), weights, kernel=kernel.T, dy=dy)
        w = tf.constant(weights)
        with tf.GradientTape() as tape:
            tape.watch(w)
            got = layer(tokens, flix_features=ids, flix_weights=w)
        assert_close(got, wanted.y)
        da, db, got_dw = tape.gradient(got, [layer.flix_A, layer.flix_B, w], tf.constant(dy))
        assert_close(got_dw, wanted.weights)
        for part, grad in (("A", da), ("B", db)):
            found, _ = table_grads(layer, grad, part)
            for i, value in getattr(wanted, part).items():
                assert_close(found[i], value)


def test_layers_by_hand_in_a_functional_model():
    x, ids = keras.Input((9, D_IN)), keras.Input((2,), dtype="int32")
    weights = keras.Input((2,))
    layer = FlixDense(D_OUT, config=config(), name="q")
    model = keras.Model([x, ids, weights], layer(x, flix_features=ids, flix_weights=weights))
    randomize([layer])
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=(3, 9, D_IN)).astype("f"), np.array(ROUTINGS["plain"], np.int32)
    weights = rng.normal(size=ids.shape).astype("f")
    wanted = dense(values, ids, pairs_of(layer), weights, kernel=layer.kernel.numpy().T).y
    assert_close(model([values, ids, weights]), wanted, dtype="float32")
    assert [v.name for v in model.trainable_variables] == ["flix_A", "flix_B"]


def test_bad_layers_are_named():
    with pytest.raises(flix.ConfigError, match="strategy"):
        FlixDense(3, config=config(), strategy="fast")
    with pytest.raises(flix.ConfigError, match="config=FlixConfig"):
        FlixDense(3, config="x")


def test_weights_without_features_are_refused_and_told_so():
    layer = FlixDense(3, config=config())
    x = np.ones((2, 4), "f")
    layer(x, flix_features=[[0], [1]])
    told = pytest.raises(flix.RoutingError, match="given without flix_features")
    with route(config().registry, [[0], [1]]), told:  # whose weights would be taken
        layer(x, flix_weights=[[2.0], [2.0]])


@pytest.mark.parametrize(
    "equation",
    ["abc,bcd->abd", "abc,c->ab", "ca,cd->da", "abc,cd->ad", "ab,bc,cd->ad", "abc,ccd->abd"],
)
def test_equations_that_are_no_linear_map_of_a_batch_are_refused(equation):
    with pytest.raises((flix.TargetError, ValueError), match=r"cannot be adapted"):
        FlixEinsumDense(equation, (4,), config=config())


@pytest.mark.parametrize("shape", [(2, 3, D_IN), (3, D_IN)])
def test_a_layer_whose_ranks_are_all_0_refuses_malformed_routing_too(shape):
    """The nightly kit found that it took ids of more positions than the input has, and gave the base."""
    layer = FlixDense(D_OUT, config=config(ranks=0, alpha=None), name="q")
    layer.build((None, D_IN))
    x = np.ones(shape, np.float32)
    fitting = np.zeros((shape[0], 1), np.int32)
    assert_close(layer(x, flix_features=fitting), x @ layer.kernel.numpy() + layer.bias.numpy())
    for ids in (np.zeros((shape[0], 4, 1), np.int32), np.zeros((5, 1), np.int32)):
        with pytest.raises(flix.RoutingError):
            layer(x, flix_features=ids)
