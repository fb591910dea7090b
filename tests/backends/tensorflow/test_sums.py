"""Every strategy is the dense reference, forward and backward, eagerly and compiled."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flix
from flix.backends.tensorflow import FlixDense
from tests.helpers.dense import dense
from tests.helpers.registry import config
from tests.helpers.tensorflow import (
    D_IN,
    D_OUT,
    ROUTINGS,
    STRATEGIES,
    check,
    flix_dense,
    pairs_of,
    randomize,
    table_grads,
)
from tests.helpers.tolerance import assert_close


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", ROUTINGS)
def test_dense_is_the_oracle(strategy, form):
    layer, rng = flix_dense(strategy, use_bias=False), np.random.default_rng(0)
    ids = np.array(ROUTINGS[form], np.int32)
    weights = rng.normal(size=ids.shape)
    weights[0, 0] = 0.0
    for length in (None, 1, 9):
        x = rng.normal(size=(3, D_IN) if length is None else (3, length, D_IN))
        check(layer, layer.kernel.numpy(), x, ids, weights)
    check(layer, layer.kernel.numpy(), x, ids, None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_routing_per_token(strategy):
    rng = np.random.default_rng(1)
    ids = rng.integers(-1, 6, (2, 3, 2)).astype(np.int32)
    weights = rng.normal(size=ids.shape)
    layer = flix_dense(strategy, use_bias=False)
    check(layer, layer.kernel.numpy(), rng.normal(size=(2, 3, D_IN)), ids, weights)
    check(layer, layer.kernel.numpy(), rng.normal(size=(2, 3, 4, D_IN)), ids, None)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 4),
    length=st.integers(1, 9),
    width=st.integers(1, 3),
    seed=st.integers(0, 99),
    strategy=st.sampled_from(["gather", "masked"]),
    per_token=st.booleans(),
)
def test_any_shape_is_the_oracle(rows, length, width, seed, strategy, per_token):
    rng = np.random.default_rng(seed)
    lead = (rows, length) if per_token else (rows,)
    ids = rng.integers(-1, 6, (*lead, width)).astype(np.int32)
    weights = np.where(rng.random(ids.shape) < 0.3, 0.0, rng.normal(size=ids.shape))
    layer = flix_dense(strategy, use_bias=False)
    check(layer, layer.kernel.numpy(), rng.normal(size=(rows, length, D_IN)), ids, weights)


def test_single_is_one_composition_for_all():
    rng, layer = np.random.default_rng(0), flix_dense("single", use_bias=False)
    ids = np.tile([[1, 4]], (3, 1)).astype(np.int32)
    weights = np.tile([[0.5, -2.0]], (3, 1))
    x = rng.normal(size=(3, 2, D_IN))
    check(layer, layer.kernel.numpy(), x, ids, weights)
    check(layer, layer.kernel.numpy(), x[:1], ids[:1], weights[:1])
    check(layer, layer.kernel.numpy(), x[:0], ids[:0], weights[:0])
    with pytest.raises(flix.ConfigError, match="row 2 differs from row 0"):
        layer(x, flix_features=np.array([[1, 4], [1, 4], [0, 4]]))


@pytest.mark.parametrize("strategy", ["gather", "masked", "single", "fused"])
@pytest.mark.parametrize("jit", [False, True])
def test_tf_function_with_unknown_shapes_traces_once(strategy, jit):
    rng, layer = np.random.default_rng(0), flix_dense(strategy, use_bias=False)
    kernel, pairs = layer.kernel.numpy(), pairs_of(layer)

    def step(x, ids, weights):
        with tf.GradientTape() as tape:
            y = layer(x, flix_features=ids, flix_weights=weights)
        return y, [tf.convert_to_tensor(g) for g in tape.gradient(y, [layer.flix_A, layer.flix_B])]

    unknown = [None, None]
    signature = [
        tf.TensorSpec([*unknown, D_IN], tf.float64),
        tf.TensorSpec([None, 2], tf.int32),
        tf.TensorSpec(unknown, tf.float64),
    ]
    function = tf.function(step, input_signature=signature, jit_compile=jit)
    for form in ("plain", "padding", "duplicates", "nothing"):
        ids = np.array(ROUTINGS[form], np.int32)
        if strategy == "single":
            ids = ids[:1]
        x, weights = rng.normal(size=(len(ids), 9, D_IN)), rng.normal(size=ids.shape)
        y, (da, db) = function(x, ids, weights)
        wanted = dense(x, ids, pairs, weights, kernel=kernel.T, dy=np.ones((*x.shape[:2], D_OUT)))
        assert_close(y, wanted.y)
        for i in pairs:
            assert_close(table_grads(layer, da, "A")[0][i], wanted.A[i])
            assert_close(table_grads(layer, db, "B")[0][i], wanted.B[i])
    assert function.experimental_get_tracing_count() == 1
    if not jit and strategy != "single":
        with pytest.raises(tf.errors.InvalidArgumentError, match="flix_features routes"):
            function(rng.normal(size=(4, 9, D_IN)), ids, weights)


def test_strategies_agree_on_a_rank_pattern_and_no_rank_at_all():
    made = config(rank_pattern={"q": {"language": 0}, "none": 0})
    x, ids = (
        np.random.default_rng(0).normal(size=(3, 9, D_IN)),
        np.array(ROUTINGS["plain"], np.int32),
    )
    outputs = []
    for strategy in ("gather", "masked"):
        keras.utils.set_random_seed(0)
        layer = FlixDense(D_OUT, config=made, name="q", strategy=strategy, dtype="float64")
        layer.build((None, D_IN))
        randomize([layer])
        outputs.append(layer(x, flix_features=ids))
    assert_close(*outputs)
    plain = FlixDense(D_OUT, config=made, name="none")
    y = plain(x.astype("f"), flix_features=ids, training=True)
    assert plain.flix_A is None and y.shape == (3, 9, D_OUT)
