"""Each layer against the oracle: forward, gradients, strategies, routing forms, dtypes, compilers, bad input."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flix
from flix.backends.tensorflow import FlixDense, FlixEinsumDense, FlixEmbedding, route
from flix.backends.tensorflow.einsum import linear_einsum
from flix.core.adapter.initial import initial_a
from tests.helpers.dense import dense
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import pairs_of, randomize, table_grads
from tests.helpers.tolerance import assert_close

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
    used = {1 + r for i in np.unique(ids) if i >= 0 for r in rows_of(layer, i)}
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


@pytest.mark.parametrize(
    "equation",
    ["abc,bcd->abd", "abc,c->ab", "ca,cd->da", "abc,cd->ad", "ab,bc,cd->ad", "abc,ccd->abd"],
)
def test_equations_that_are_no_linear_map_are_refused(equation):
    assert isinstance(linear_einsum(equation), str)
    with pytest.raises((flix.TargetError, ValueError), match=r"cannot be adapted"):
        FlixEinsumDense(equation, (4,), config=config())


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


def test_initial_values_are_the_cores_bytes():
    layer = FlixDense(D_OUT, config=config(seed=7), name="q")
    layer.build((None, D_IN))
    for (group, feature), a, b in layer.pairs():
        wanted = initial_a(seed=7, layer="q", group=group, feature=feature, rank=len(a), d_in=D_IN)
        assert a.dtype == np.float32 and a.tobytes() == wanted.tobytes() and not b.any()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float32"])
def test_half_precision_keeps_pairs_in_float32(policy):
    layer = flix_dense("gather", dtype=policy)
    assert layer.flix_A.dtype == layer.flix_B.dtype == "float32"
    x, ids = (
        np.random.default_rng(0).normal(size=(3, 9, D_IN)),
        np.array(ROUTINGS["plain"], np.int32),
    )
    y = layer(x, flix_features=ids)
    assert y.dtype == layer.compute_dtype
    assert_close(y, dense(x, ids, pairs_of(layer), kernel=tf.transpose(layer.kernel)).y, times=2)


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


def test_routing_in_force_reaches_layers_by_hand():
    layer = flix_dense()
    x, ids = np.ones((3, D_IN)), np.array(ROUTINGS["plain"], np.int32)
    with route(registry(), ids):
        inside = layer(x)
    assert_close(inside, layer(x, flix_features=ids))
    assert_close(layer(x), keras.layers.Dense.call(layer, tf.constant(x)))
    with pytest.raises(flix.RoutingError, match="layer 'q' is adapted, but no routing"):
        layer(x, training=True)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([[0, 4], [1, 7], [0, 0]], None, "id 7 in row 1"),
        ([[0, 4], [1, -2], [0, 0]], None, "id -2 in row 1"),
        ([[0.0, 4.0]] * 3, None, "integer ids"),
        ([0, 1, 2], None, "shape"),
        ([[0, 4]] * 2, None, "flix_features routes"),
        ([[0, 4]] * 3, [[1.0, 1.0], [1.0, np.nan], [1.0, 1.0]], "row 1 for task:ner"),
        ([[0, 4]] * 3, [[1.0]] * 3, "flix_weights must have the shape"),
        ([[0, 4]] * 3, [[1, 1]] * 3, "floating point"),
        ([[0, 4], [1]], None, "must be an array"),
        (None, [[1.0, 1.0]] * 3, "without flix_features"),
    ],
)
def test_bad_routing_is_named(ids, weights, message):
    layer = flix_dense()
    with pytest.raises(flix.RoutingError, match=message):
        layer(np.ones((3, D_IN)), flix_features=ids, flix_weights=weights)


def test_bad_routing_is_named_while_tracing():
    layer = flix_dense()
    x = tf.ones((3, D_IN), tf.float64)
    for ids, weights, message in (
        (tf.ones((3, 2)), None, "integer ids"),
        (tf.ones((3,), tf.int32), None, "shape"),
        (tf.ones((2, 2), tf.int32), None, "flix_features routes"),
        (tf.ones((3, 2), tf.int32), tf.ones((3, 3)), "flix_weights must have the shape"),
        (tf.ones((3, 2), tf.int32), tf.ones((3, 2), tf.int32), "floating point"),
    ):
        function = tf.function(
            lambda x, i, *w: layer(x, flix_features=i, flix_weights=w[0] if w else None),
            autograph=False,  # which would make another class of the error
        )
        with pytest.raises(flix.RoutingError, match=message):
            function(x, ids, *([] if weights is None else [weights]))


def test_bad_layers_are_named():
    with pytest.raises(flix.ConfigError, match="strategy"):
        FlixDense(3, config=config(), strategy="fast")
    with pytest.raises(flix.ConfigError, match="config=FlixConfig"):
        FlixDense(3, config="x")


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
