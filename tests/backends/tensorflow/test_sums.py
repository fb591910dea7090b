"""Every strategy is the dense reference, forward and backward, eagerly and compiled."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flix
from flix.backends.tensorflow import FlixDense, FlixEmbedding
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


MANY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(8)], "task": ["ner", "pos"]})
RANKS = flix.ranks.by_group(language=2, task=3)


def many(kind, strategy, dtype):
    """A layer of ten features, with values that are not zero."""
    made = {"config": flix.FlixConfig(registry=MANY, ranks=RANKS), "strategy": strategy}
    keras.utils.set_random_seed(0)
    if kind == "linear":
        layer = FlixDense(D_OUT, name="q", dtype=dtype, **made)
        layer.build((None, D_IN))
    else:
        layer = FlixEmbedding(7, D_OUT, name="q", dtype=dtype, **made)
        layer.build()
    randomize([layer])
    return layer


def outcome(layer, compiled):
    """A function to y, and the gradients of x, weights and tables, as float64."""

    def step(x, ids, weights, dy):
        with tf.GradientTape() as tape:
            tape.watch([t for t in (x, weights) if t.dtype.is_floating])
            y = layer(x, flix_features=ids, flix_weights=weights)
        grads = tape.gradient(y, [x, weights, layer.flix_A, layer.flix_B], tf.cast(dy, y.dtype))
        return y, [None if g is None else tf.convert_to_tensor(g) for g in grads]

    function = tf.function(step) if compiled else step

    def run(*given):
        y, grads = function(*map(tf.constant, given))
        return [None if v is None else np.asarray(tf.cast(v, tf.float64)) for v in (y, *grads)]

    return run


@pytest.mark.filterwarnings("ignore:values of")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        *itertools.product(["gather", "masked"], ["float32", "mixed_float16", "mixed_bfloat16"]),
        ("fused", "float32"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_what_is_not_finite_stays_in_its_rows(kind, strategy, dtype, compiled):
    """One feature's values, or one row's input or gradient: all else is as it is without them."""
    rng, count, tokens = np.random.default_rng(0), 12, 4
    ids = np.array([[i % 3, 8 + i % 2] for i in range(count)], np.int32)
    ids[-1] = [3, 8]  # the one row that uses feature 3
    ids[-2, 1] = -1
    weights = rng.uniform(0.5, 1.5, ids.shape).astype("f")
    x = rng.integers(0, 7, (count, tokens)).astype(np.int32)
    if kind == "linear":
        x = rng.normal(size=(count, tokens, D_IN)).astype("f")
    dy = rng.normal(size=(count, tokens, D_OUT)).astype("f")
    layer = many(kind, strategy, dtype)
    run = outcome(layer, compiled)
    wanted = run(x, ids, weights, dy)
    tables = [(table, table.numpy()) for table in (layer.flix_A, layer.flix_B)]
    span, large = layer.span(3), 6e4 if dtype == "mixed_float16" else 3e38
    for broken in ("A", "B", "both", "overflow", "x", "dy"):
        bad_x, bad_dy = x.copy(), dy.copy()
        for (table, value), part in zip(tables, "AB", strict=True):
            value = value.copy()
            if broken in (part, "both"):
                value[span.start] = np.nan
                value[span.stop - 1, 0] = np.inf
            elif broken == "overflow":
                value[span] = large
            table.assign(value)
        if broken == "x" and kind == "linear":
            bad_x[-1, 0, 1] = np.nan
            bad_x[-1, 1, 0] = np.inf
        if broken == "dy":
            bad_dy[-1, 0, 1] = np.nan
            bad_dy[-1, 1] = -np.inf
        y, dx, dw, da, db = run(bad_x, ids, weights, bad_dy)
        same = [(y, wanted[0]), (dw, wanted[2])] + ([(dx, wanted[1])] if kind == "linear" else [])
        for found, before in same:
            np.testing.assert_allclose(found[:-1], before[:-1], rtol=1e-5, err_msg=broken)
        others = np.r_[
            [i for f in (0, 1, 2, 4, 5, 6, 7, 9) for i in range(*layer.span(f).indices(99))]
        ]
        own = 3 if broken in ("x", "dy") else None
        for found, before in ((da, wanted[3]), (db, wanted[4])):
            np.testing.assert_allclose(found[others], before[others], rtol=1e-5, atol=1e-6)
        if broken in ("A", "B", "both"):
            assert not np.isfinite(y[-1]).all(), "a broken feature must show in its own row"
        assert own is None or not np.isfinite(da[layer.span(own)]).all() or kind == "embedding"
        for table, value in tables:
            table.assign(value)


# Feature 3, which breaks, has the weight 0 in the fourth row; 9 there, and in no other.
ZERO_IDS = np.array([[0, 8, 9], [3, 9, -1], [2, -1, -1], [0, 3, 9], [-1, -1, -1]], np.int32)
ZERO_WEIGHTS = np.array([[1, 0.5, 2], [1.5, -1, 0], [0.5, 0, 0], [1, 0, 0], [0, 0, 0]], "f")
OTHERS = [0, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:values of")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "masked", "fused"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_feature_with_the_weight_zero_is_absent(kind, strategy, compiled):
    """Whatever its values are; weights have their gradients all the same."""
    rng, tokens = np.random.default_rng(0), kind == "embedding"
    x = rng.integers(0, 7, (5, 4)).astype(np.int32) if tokens else None
    x = rng.normal(size=(5, 4, D_IN)).astype("f") if x is None else x
    dy = rng.normal(size=(5, 4, D_OUT)).astype("f")
    dy[1] = 0  # a loss of the other rows
    layer = many(kind, strategy, "float32")
    run = outcome(layer, compiled)
    wanted = run(x, ZERO_IDS, ZERO_WEIGHTS, dy)
    for n, k in np.argwhere(ZERO_IDS >= 0):
        more = ZERO_WEIGHTS.copy()
        more[n, k] += 1  # the sum is linear in its weights
        apart = layer(x, flix_features=ZERO_IDS, flix_weights=more) - wanted[0]
        found = np.sum(dy * apart.numpy())
        np.testing.assert_allclose(wanted[2][n, k], found, rtol=1e-3, atol=1e-4)
    tables = [(table, table.numpy()) for table in (layer.flix_A, layer.flix_B)]
    for a, b, bad in (
        (np.nan, None, None),
        (None, np.nan, None),
        (np.inf, -np.inf, None),
        (3e38, 3e38, None),
        (None, None, np.nan),
    ):
        given, broken = x.copy(), [3]
        for (table, value), new in zip(tables, (a, b), strict=True):
            value = value.copy()
            if new is not None:
                value[layer.span(3)] = new
            table.assign(value)
        if bad is not None:
            if tokens:
                continue
            given[3], broken = bad, [0]  # which that row uses
        found = run(given, ZERO_IDS, ZERO_WEIGHTS, dy)
        for values in (found[0], found[1], found[2]):
            if bad is not None and values is not None:
                assert not np.isfinite(values[3]).all() or values is found[1]
        rows = OTHERS if bad is None else [0, 2, 4]
        found[2] = np.array(found[2])
        found[2][3, 1] = wanted[2][3, 1]  # the weight of the broken feature itself
        for got, want in zip(found[:3], wanted[:3], strict=True):
            if got is not None:
                np.testing.assert_allclose(got[rows], want[rows], rtol=1e-4, atol=1e-5)
        kept = np.arange(layer.flix_A.shape[0]) > 0  # that row stands for unused slots
        for feature in broken:
            kept[layer.span(feature)] = False
        for got, want in zip(found[3:], wanted[3:], strict=True):
            np.testing.assert_allclose(got[kept], want[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:values of")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_one_composition_with_a_weight_of_zero(kind, jit):
    """Under "single", and by XLA; the width and batch are not known while the function is traced."""
    x = np.ones((4, 3), np.int32) if kind == "embedding" else np.ones((4, 3, D_IN), "f")
    ids, weights = np.array([[0, 3]] * 4, np.int32), np.array([[1, 0]] * 4, "f")
    found = []
    for strategy in ("single", "gather"):
        layer = many(kind, strategy, "float32")

        def step(x, ids, weights, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                loss = tf.reduce_sum(layer(x, flix_features=ids, flix_weights=weights) ** 2)
            return loss, tape.gradient(loss, weights)

        run = tf.function(
            step,
            input_signature=[
                tf.TensorSpec([None, *x.shape[1:]], x.dtype),
                tf.TensorSpec([None, None], tf.int32),
                tf.TensorSpec([None, None]),
            ],
            jit_compile=jit,
        )
        found += [run(x, ids, weights)]
        value = layer.flix_B.numpy()
        value[layer.span(3)] = np.nan
        layer.flix_B.assign(value)
        assert_close(run(x, ids, weights)[0], found[-1][0])
    (loss, grads), (want, want_grads) = found
    assert_close(loss, want)
    assert_close(grads, want_grads)
    assert np.abs(grads).min() > 1e-3


@pytest.mark.filterwarnings("ignore:values of")
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_what_is_not_finite_stays_in_its_tokens_rows(strategy):
    layer = many("linear", strategy, "float32")
    x = np.random.default_rng(0).normal(size=(2, 5, D_IN)).astype("f")
    ids = np.random.default_rng(1).integers(0, 3, (2, 5, 1)).astype(np.int32)
    wanted = layer(x, flix_features=ids).numpy()
    value = layer.flix_B.numpy()
    value[layer.span(3)] = np.nan
    layer.flix_B.assign(value)
    ids[1, 2] = 3
    got = layer(x, flix_features=ids).numpy()
    assert np.isnan(got[1, 2]).all()
    got[1, 2] = wanted[1, 2]
    assert_close(got, wanted)


def test_a_warning_names_a_broken_feature_once_and_only_where_it_acts():
    layer = many("linear", "auto", "float32")
    value = layer.flix_B.numpy()
    value[layer.span(3), 1] = np.inf
    layer.flix_B.assign(value)
    x = np.ones((2, D_IN), "f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, flix_features=[[0, 8], [1, 8]])
    with pytest.warns(UserWarning, match=r"values of .*language=l3.* are NaN or infinite"):
        layer(x, flix_features=[[3, 8], [1, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, flix_features=[[3, 8], [1, 8]])


@pytest.mark.parametrize("jit", [False, True])
def test_single_refuses_rows_that_differ_at_run_time_too(jit):
    layer = many("linear", "single", "float32")
    spec = tf.TensorSpec([None, D_IN]), tf.TensorSpec([None, 2], tf.int32)
    function = tf.function(
        lambda x, ids: layer(x, flix_features=ids), input_signature=spec, jit_compile=jit
    )
    x = np.ones((3, D_IN), "f")
    assert_close(function(x, [[0, 8]] * 3), layer(x, flix_features=[[0, 8]] * 3))
    if jit:
        assert np.isnan(function(x, [[0, 8], [1, 8], [0, 8]])[1]).all()
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="one composition for all rows"):
        function(x, [[0, 8], [1, 8], [0, 8]])
