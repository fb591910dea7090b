"""Functions compiled by hand: right at each call, or refused by name (docs/specification.md §5.1.4)."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, disable, freeze, route
from flix.backends.tensorflow.patches.captures import at_calls, late, traced_function
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import GIVEN, IDS, X, adapted, randomize
from tests.helpers.tolerance import assert_close

TENSORS = {name: tf.constant(value) for name, value in GIVEN.items()}


def test_what_is_looked_up_is_so_at_each_call_through_functions_and_branches():
    held = [1.0]

    @tf.function
    def inner(x):
        spec = tf.TensorSpec([], tf.float32)
        return x * late(traced_function(), "held", lambda: tf.constant(held[0]), spec)

    @tf.function
    def outer(x):
        return tf.cond(x > 0, lambda: inner(x), lambda: x)

    assert traced_function() is None
    two = tf.constant(2.0)
    assert float(inner(two)) == 2 and float(outer(two)) == 2
    held[0] = 3.0
    assert float(inner(two)) == 6
    assert float(outer(two)) == 2  # it belongs to the outer function's trace, as `held` does


def test_what_is_checked_is_so_at_each_call_and_functions_can_be_saved(tmp_path):
    checked = []

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
    def function(x):
        at_calls(traced_function(), "key", lambda: checked.append(1))
        return 2 * x

    assert float(function(3.0)) == float(function(3.0)) == 6
    assert len(checked) >= 2
    module = tf.Module()
    module.function = function
    tf.saved_model.save(module, str(tmp_path))
    assert float(tf.saved_model.load(str(tmp_path)).function(tf.constant(3.0))) == 6


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_traced_otherwise_is_refused_by_name(jit):
    model, _ = adapted("functional")
    randomize(layer for _, layer in flix_layers(model.base))
    function, wanted = tf.function(model, jit_compile=jit), model(GIVEN).numpy()
    with disable(model):
        base = model(GIVEN)
        off = tf.function(model, jit_compile=jit)
        assert_close(off(TENSORS), base)
    assert_close(function(TENSORS), wanted)
    with (
        disable(model),
        pytest.raises(flix.RoutingError, match=r"around 'flix_functional.*outside of disable"),
    ):
        function(TENSORS)
    with pytest.raises(flix.RoutingError, match="was traced inside of disable"):
        off(TENSORS)
    assert_close(function(TENSORS), wanted)

    @tf.function(jit_compile=jit)
    def both(given):
        with disable(model):
            base = model(given)
        return model(given), base

    for _ in range(2):
        assert_close(both(TENSORS)[0], wanted)
        assert_close(both(TENSORS)[1], base)
    freeze(model, [("task", "ner")])
    with pytest.raises(flix.RoutingError, match="before features joined or left, froze"):
        function(TENSORS)


def test_a_function_of_the_base_follows_the_routing_in_force_and_needs_one():
    model, _ = adapted("functional", target_modules=["q"])
    randomize(layer for _, layer in flix_layers(model.base))
    function = tf.function(model.base)
    x = tf.constant(X)
    for ids in (IDS, IDS[::-1].copy(), IDS[:, :1], np.full_like(IDS, -1)):
        with route(registry(), ids):
            assert_close(function(x), model({"inputs": X, "flix_features": ids}))
    with pytest.raises(flix.RoutingError, match="layer 'q' is adapted, but no routing"):
        function(x)
    with (
        route(registry(), np.repeat(IDS[:, None], 5, 1)),
        pytest.raises(flix.RoutingError, match=r"traced for routing by row.*by token"),
    ):
        function(x)
    with (
        route(flix.FeatureRegistry({"language": ["hau"]}), np.zeros((6, 1), int)),
        pytest.raises(flix.RoutingError, match="layer 'q' belongs to"),
    ):
        function(x)


def test_saved_models_answer_every_request(tmp_path):
    model, _ = adapted("functional")
    randomize(layer for _, layer in flix_layers(model.base))
    model.predict(GIVEN, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    function = tf.function(model, input_signature=[model.input_specs()])
    tf.saved_model.save(model, str(tmp_path / "saved"), function.get_concrete_function())
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    for ids in (IDS, IDS[::-1].copy(), np.full_like(IDS, -1)):
        given = {"inputs": TENSORS["inputs"], "flix_features": tf.constant(ids)}
        assert_close(served.serve(given), model(given))
        (answer,) = saved.signatures["serving_default"](**given).values()
        assert_close(answer, model(given))


@pytest.mark.parametrize("through", ["map_fn", "vectorized_map", "scan"])
def test_loops_inside_a_layer_run_under_the_rows_own_features(through):
    """Each step sees one position of every row."""

    class Steps(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="steps")
            self.q = keras.layers.Dense(4)

        def build(self, shape):
            self.q.build((None, 4))

        def call(self, x):
            x = tf.transpose(x, [1, 0, 2])
            if through == "scan":
                y = tf.scan(lambda _, step: self.q(step), x, x[0])
            else:
                y = getattr(tf, through)(self.q, x)
            return tf.transpose(y, [1, 0, 2])

    inputs = keras.Input((5, 4), name="inputs")
    model = adapt(keras.Model(inputs, Steps()(inputs)), config(target_modules=["q"]))
    randomize(layer for _, layer in flix_layers(model.base))
    q, x = model.base.get_layer("steps").q, np.random.default_rng(0).normal(size=(6, 5, 4))
    for call in (model, tf.function(model)):
        for ids in (IDS, IDS[::-1].copy()):
            given = {"inputs": tf.constant(x, tf.float32), "flix_features": tf.constant(ids)}
            assert_close(call(given), q(given["inputs"], flix_features=ids))
