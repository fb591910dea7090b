"""Routing in all its forms; what breaks a rule is named, and never passes for the base."""

import asyncio
import concurrent.futures

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, disable, route
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import D_IN, IDS, ROUTINGS, X, adapted, flix_dense, randomize
from tests.helpers.tolerance import assert_close


def test_routing_in_force_reaches_layers_by_hand():
    layer = flix_dense()
    x, ids = np.ones((3, D_IN)), np.array(ROUTINGS["plain"], np.int32)
    with route(registry(), ids):
        inside = layer(x)
    assert_close(inside, layer(x, flix_features=ids))
    for training in (None, False, True):
        with pytest.raises(flix.RoutingError, match="layer 'q' is adapted, but no routing"):
            layer(x, training=training)
    other = flix.FeatureRegistry({"language": ["hau"], "task": ["pos"]})
    with (
        route(other, [[0, 1]] * 3),
        pytest.raises(flix.RoutingError, match="layer 'q' belongs to"),
    ):
        layer(x)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([[0, 4], [1, 7], [0, 0]], None, "id 7 in row 1"),
        ([[0, 4], [1, -2], [0, 0]], None, "id -2 in row 1"),
        ([[0.0, 4.0]] * 3, None, "integer ids"),
        ([0, 1, 2], None, "shape"),
        ([[0, 4]] * 2, None, "flix_features routes"),
        ([[0, 4]] * 3, [[1.0, 1.0], [1.0, np.nan], [1.0, 1.0]], "row 1 for task=ner"),
        ([[0, 4]] * 3, [[1.0, 1.0], [1.0, 1e39], [1.0, 1.0]], "beyond float32 in row 1"),
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


@pytest.mark.covers("functional", "per-token routing", backend="tensorflow")
def test_per_token_routing_packs_rows():
    model, _ = adapted("functional", target_modules=["emb", "q", "mha.query"])
    randomize(layer for _, layer in flix_layers(model.base))
    tokens = np.repeat(IDS[:, None, :], 5, 1)
    got = model({"inputs": X, "flix_features": tokens})
    assert_close(got, model({"inputs": X, "flix_features": IDS}))
    model, _ = adapted("functional")
    with pytest.raises(flix.RoutingError, match=r"layer 'out' got an input of leading shape \[6\]"):
        model({"inputs": X, "flix_features": tokens})


def test_named_inputs_flattened_inputs_and_one_row_for_all():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    extra = keras.Input((4,), name="extra")
    places = keras.ops.arange(5)[None]
    x = keras.layers.Embedding(11, 4, name="emb")(tokens)
    position = keras.layers.Embedding(5, 4, name="pos")
    position.build()

    @keras.saving.register_keras_serializable(package="tests")
    class Mixer(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.position = keras.layers.Embedding(5, 4, name="pos")
            self.flat = keras.layers.Dense(4, name="flat")

        def build(self, shape):
            self.position.build()
            self.flat.build((None, 4))

        def call(self, inputs):
            h = inputs + self.position(places)
            shape = keras.ops.shape(h)
            return keras.ops.reshape(self.flat(keras.ops.reshape(h, (-1, 4))), shape)

    x = Mixer(name="mixer")(x)
    x = keras.layers.GlobalAveragePooling1D()(x) + extra
    base = keras.Model({"tokens": tokens, "extra": extra}, keras.layers.Dense(2, name="q")(x))
    model = adapt(base, config(target_modules=["mixer.pos", "mixer.flat", "q"]))
    randomize(layer for _, layer in flix_layers(model.base))
    rest = {"tokens": X, "extra": np.ones((6, 4), "f")}
    got = model({**rest, "flix_features": IDS}).numpy()
    for row in range(6):
        one = {k: v[row : row + 1] for k, v in {**rest, "flix_features": IDS}.items()}
        assert_close(model(one)[0], got[row])
    function = tf.function(model, reduce_retracing=True)
    for size in (6, 3, 4):
        cut = {k: tf.constant(v[:size]) for k, v in {**rest, "flix_features": IDS}.items()}
        assert_close(function(cut), got[:size])


def test_routing_objects_lists_and_missing_routing():
    model, _ = adapted()
    rows = [{"language": "hau", "task": "pos"}] * 6
    routing = registry().encode(rows)
    wanted = model({"inputs": X, "flix_features": routing.ids})
    assert_close(model({"inputs": X, "flix_features": routing}), wanted)
    assert_close(model({"inputs": X, "flix_features": [[0, 5]] * 6}), wanted)
    other = flix.FeatureRegistry({"language": ["hau"], "task": ["pos"]}).encode(rows)
    with pytest.raises(flix.RoutingError, match="another registry"):
        model({"inputs": X, "flix_features": other})
    for call in ({"inputs": X}, X):
        for training in (None, False, True):
            with pytest.raises(flix.RoutingError, match="called without routing"):
                model(call, training=training)
    with disable(model):
        base = model(X)
    nothing = np.full_like(IDS, -1)
    assert_close(model({"inputs": X, "flix_features": nothing}), base)
    with pytest.raises(flix.RoutingError, match="without flix_features"):
        model({"inputs": X, "flix_weights": np.ones((6, 2), "f")})
    with pytest.raises(flix.RoutingError, match="row 3"):
        model({"inputs": X, "flix_features": np.where(np.arange(6)[:, None] == 3, 9, IDS)})
    with pytest.raises(flix.RoutingError, match="routes 5 rows, but the batch has 6"):
        model({"inputs": X, "flix_features": IDS[:5]})
    for part in (model.base, tf.function(model.base), model.base.get_layer("emb")):
        with pytest.raises(flix.RoutingError, match="layer 'emb' is adapted, but no routing"):
            part(tf.constant(X))
    for eager in (True, False):
        model.compile("adam", "mse", run_eagerly=eager)
        for call in (model.fit, model.evaluate):
            with pytest.raises(flix.RoutingError, match="called without routing"):
                call(X, np.ones((6, 3)), verbose=0)
        with pytest.raises(flix.RoutingError, match="called without routing"):
            model.predict(X, verbose=0)


def test_threads_and_tasks_see_their_own_routing_and_disable():
    model, _ = adapted("sequential")
    randomize(layer for _, layer in flix_layers(model.base))
    x = np.random.default_rng(0).normal(size=(1, 6)).astype("f")
    alone = [model({"inputs": x, "flix_features": [[i]]}).numpy() for i in (0, 1, 3, -1)]
    assert min(np.abs(a - alone[-1]).max() for a in alone[:-1]) > 1e-3
    function = tf.function(model.base)  # shared by all of them

    def called(i):
        return function(x).numpy() if i % 2 else model(x).numpy()

    async def ask(i):
        kind = i % 4
        context = disable(model) if kind == 3 else route(registry(), [[(0, 1, 3)[kind]]])
        found = []
        with context:
            for _ in range(5):
                await asyncio.sleep(0)
                found.append(model(x).numpy() if kind == 3 else called(i))
        return found

    async def all_at_once():
        return await asyncio.gather(*map(ask, range(8)))

    def in_a_thread(i):
        return asyncio.run(ask(i))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(in_a_thread, range(8)))
    for answers in (asyncio.run(all_at_once()), threads):
        for i, found in enumerate(answers):
            for y in found:
                assert_close(y, alone[i % 4])
    first, second = route(registry(), [[0]]), route(registry(), [[1]])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_close(model(x), alone[1])
    second.__exit__(None, None, None)
    with pytest.raises(flix.RoutingError, match="called without routing"):
        model(x)


@pytest.mark.parametrize("layers", [["q"], ["emb"]])
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_ids_of_no_feature_never_pass_for_the_base(layers, strategy):
    """In graphs, where values are known at run time only: an error; compiled by XLA, NaN in their rows."""
    inputs = keras.Input((5,), dtype="int32", name="inputs")
    x = keras.layers.Dense(3, name="q")(keras.layers.Embedding(11, 4, name="emb")(inputs))
    model = adapt(keras.Model(inputs, x), config(target_modules=layers), strategy=strategy)
    randomize(layer for _, layer in flix_layers(model.base))
    wanted = model({"inputs": X, "flix_features": IDS}).numpy()
    plain, compiled = tf.function(model), tf.function(model, jit_compile=True)
    for number in (6, 9, -2):
        ids = IDS.copy()
        ids[1, 0] = number
        given = {"inputs": tf.constant(X), "flix_features": tf.constant(ids)}
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="flix_features must be ids from 0 to 5"
        ):
            plain(given)
        y = compiled(given).numpy()
        assert np.isnan(y[1]).all()
        others = [0, 2, 3, 4, 5]
        assert_close(y[others], wanted[others])
