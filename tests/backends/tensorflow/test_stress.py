"""Many requests at once, and for long: each gets its own answer, and memory stays (docs/specification.md §5.1.4)."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, disable, route
from tests.helpers.stress import (
    CALLS,
    FEATURES,
    REGISTRY,
    answers,
    check_memory,
    in_tasks,
    in_threads,
    needs_proc,
    pair_of,
)
from tests.helpers.tensorflow import randomize

X = np.random.default_rng(0).normal(size=(2, 4, 16)).astype("f")


def made():
    """The model, and a compiled function that calls it."""
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(16, activation=a) for a in ("tanh", None)]
    base = keras.Sequential([keras.Input((4, 16)), *dense])
    model = adapt(base, flix.FlixConfig(registry=REGISTRY, ranks=4))
    randomize(layer for _, layer in flix_layers(model.base))
    spec = tf.TensorSpec([2, 1], tf.int32)
    return model, tf.function(
        lambda ids: model({"inputs": tf.constant(X), "flix_features": ids}), input_signature=[spec]
    )


def given(pair):
    return {"inputs": X, "flix_features": np.array(pair, np.int32)[:, None]}


@pytest.mark.parametrize("calls", CALLS)
def test_threads_get_their_own_answers(calls):
    model, compiled = made()
    want = answers(lambda pair: model(given(pair)))

    def ask(worker, call):
        pair = pair_of(worker, call)
        kind = (worker + call) % 4
        if kind == 0:
            with route(REGISTRY, given(pair)["flix_features"]):
                y = model(X)
        elif kind == 1:
            with disable(model):
                y, pair = model(given(pair)), None
        else:
            y = compiled(given(pair)["flix_features"]) if kind == 2 else model(given(pair))
        return np.allclose(y, want[pair], atol=1e-5)

    assert in_threads(calls, ask) == {"right": calls}


@pytest.mark.parametrize("calls", CALLS)
def test_tasks_get_their_own_answers(calls):
    model, compiled = made()
    want = answers(lambda pair: model(given(pair)))

    def block(worker, call):
        ids = given(pair_of(worker, call))["flix_features"]
        return disable(model) if call % 5 == 0 else route(REGISTRY, ids)

    def ask(worker, call):
        pair = pair_of(worker, call)
        off = call % 5 == 0
        y = compiled(given(pair)["flix_features"]) if call % 2 and not off else model(X)
        return np.allclose(y, want[None if off else pair], atol=1e-5)

    assert in_tasks(calls, block, ask) == {"right": calls}


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_steps(record_property):
    model, _ = made()
    model.compile(keras.optimizers.AdamW(1e-3), "mse")
    rng = np.random.default_rng(1)

    def steps(count):
        for _ in range(count):
            model.train_on_batch(given(rng.integers(0, FEATURES, 2)), X)

    check_memory(record_property, lambda: steps(1000), lambda: steps(10_000))


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_calls_at_once(record_property):
    model, _ = made()
    rng = np.random.default_rng(1)

    def calls(count):
        for _ in range(count):
            model(given(rng.integers(0, FEATURES, 2)))

    check_memory(record_property, lambda: calls(1000), lambda: calls(10_000))
