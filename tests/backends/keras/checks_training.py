"""What holds of training on every backend of Keras but TensorFlow; run like checks.py."""

import keras
import numpy as np
import pytest
from keras import ops

import flix
from flix.backends.keras import FlixDense, freeze, keep_absent, merge, named_pairs, thaw
from tests.backends.keras.models import (
    ABSENT,
    D_IN,
    D_OUT,
    IDS,
    JAX,
    X,
    Y,
    adapted,
    numpy_of,
    randomize,
)
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close


def test_a_run_that_is_stopped_keeps_its_last_step():
    model, given = adapted()
    model.compile(keras.optimizers.SGD(1e-2), "mse")
    before = named_pairs(model)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(given, Y, batch_size=2, shuffle=False, verbose=0, callbacks=[Stop()])
    twice, _ = adapted()
    twice.compile(keras.optimizers.SGD(1e-2), "mse")
    for row in (0, 2):
        twice.train_on_batch({k: v[row : row + 2] for k, v in given.items()}, Y[row : row + 2])
    for path, value in named_pairs(model).items():
        assert_close(value, named_pairs(twice)[path], dtype="float32")
    assert any((value != before[path]).any() for path, value in named_pairs(model).items())


OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
    "momentum, nesterov": lambda: keras.optimizers.SGD(
        1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "clipped": lambda: keras.optimizers.Adam(1e-2, global_clipnorm=0.5),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-2, momentum=0.5, centered=True),
    "Adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "Lion": lambda: keras.optimizers.Lion(1e-3, weight_decay=0.1),
    "accumulated": lambda: keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_moves_the_features_of_the_batch_and_no_bit_of_others(name):
    model, given = adapted()
    y = Y
    model.compile(OPTIMIZERS[name](), "mse")
    model.fit(
        given, y, epochs=2, batch_size=3, shuffle=False, verbose=0
    )  # slots are not 0 any more
    before = named_pairs(model)
    few = np.where(np.isin(IDS, (3, 5)), -1, IDS)  # zul and pos are absent
    model.fit({**given, "flix_features": few}, y, epochs=2, batch_size=3, shuffle=False, verbose=0)
    after = named_pairs(model)
    for path, value in before.items():
        same = value.tobytes() == after[path].tobytes()
        assert same == path.endswith(ABSENT), path


def test_a_rare_features_first_step_is_a_first_step():
    """Adam's correction goes by each row's own count: the first step is as large as the learning rate."""
    model, given = adapted()
    y = Y
    model.compile(keras.optimizers.Adam(1e-2, epsilon=1e-12), "mse")
    few = np.where(IDS == 3, -1, IDS)
    model.fit({**given, "flix_features": few}, y, epochs=5, verbose=0)
    before = named_pairs(model)
    model.fit({**given, "flix_features": np.where(IDS[:, :1] == 3, IDS, 3)}, y, verbose=0)
    name = next(n for n in before if n.startswith("out.B") and n.endswith("language.zul"))
    assert_close(np.abs(named_pairs(model)[name] - before[name]).max(), 1e-2, dtype="float32")


def test_frozen_features_keep_their_bits_and_thaw():
    model, given = adapted()
    y = np.zeros((6, 3), "f")
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    model.fit(given, y, verbose=0)
    freeze(model, {"task": "ner"})
    before = named_pairs(model)
    model.fit(given, y, verbose=0)
    after = named_pairs(model)
    moved = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert moved and not [n for n in moved if n.endswith("task.ner")]
    thaw(model, {"task": "ner"})
    model.fit(given, y, verbose=0)
    assert [
        n
        for n in before
        if after[n].tobytes() != named_pairs(model)[n].tobytes() and n.endswith("task.ner")
    ]


def test_a_loop_by_hand_keeps_absent_features_too():
    model, given = adapted()
    few = {**given, "flix_features": np.where(np.isin(IDS, (3, 5)), -1, IDS)}
    optimizer = keep_absent(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    variables = model.trainable_variables
    optimizer.build(variables)
    before = named_pairs(model)
    if JAX:
        import jax

        def loss(trainable, fixed, given):
            y, _ = model.stateless_call(trainable, fixed, given, training=True)
            return ops.mean(y**2)

        @jax.jit
        def step(trainable, fixed, state, given):
            grads = jax.grad(loss)(trainable, fixed, given)
            return optimizer.stateless_apply(state, grads, trainable)

        values = [v.value for v in variables]
        fixed, state = (
            [v.value for v in model.non_trainable_variables],
            [v.value for v in optimizer.variables],
        )
        for _ in range(2):
            values, state = step(
                values, fixed, state, {k: ops.convert_to_tensor(v) for k, v in few.items()}
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    else:
        for _ in range(2):
            model.zero_grad()
            (model(few, training=True) ** 2).mean().backward()
            optimizer.apply([v.value.grad for v in variables], variables)
    after = named_pairs(model)
    for path, value in before.items():
        assert (value.tobytes() == after[path].tobytes()) == path.endswith(ABSENT), path


def test_an_optimizer_without_the_uses_is_refused():
    model, _ = adapted()
    tables = [v for v in model.trainable_variables if "flix_use" not in v.path]
    optimizer = keep_absent(keras.optimizers.AdamW(1e-2))
    optimizer.build(tables)
    with pytest.raises(flix.ConfigError, match=r"flix_use.*model\.trainable_variables"):
        optimizer.apply([ops.ones(v.shape) for v in tables], tables)


def test_a_keras_file_goes_on_as_if_nothing_had_happened(tmp_path):
    y = Y

    def started():
        model, given = adapted(randomized=False)
        model.compile(keras.optimizers.AdamW(1e-2), "mse")
        model.fit(given, y, epochs=2, shuffle=False, verbose=0)
        return model, given

    model, given = started()
    model.save(tmp_path / "m.keras")
    model.fit(given, y, epochs=2, shuffle=False, verbose=0)
    again = keras.saving.load_model(tmp_path / "m.keras")
    again.fit(given, y, epochs=2, shuffle=False, verbose=0)
    assert {n: v.tobytes() for n, v in named_pairs(model).items()} == {
        n: v.tobytes() for n, v in named_pairs(again).items()
    }


def test_dropout_acts_in_training_alone():
    layer = FlixDense(D_OUT, config=config(lora_dropout=0.5), name="q")
    layer.build((None, D_IN))
    randomize([layer])
    x = np.ones((3, 2, D_IN), "f")
    ids = [[0, 4], [1, 5], [3, 5]]
    plain = [numpy_of(layer(x, flix_features=ids)) for _ in range(2)]
    assert (plain[0] == plain[1]).all()
    drops = [numpy_of(layer(x, flix_features=ids, training=True)) for _ in range(2)]
    assert (drops[0] != plain[0]).any() and (drops[0] != drops[1]).any()


def test_a_rematerialised_layer_trains_the_same_or_is_refused():
    ends = []
    for mode in (None, "full"):
        with keras.RematScope(mode=mode):
            model, given = adapted()
            model.compile(keras.optimizers.SGD(1e-1), "mse")
            if JAX and mode:
                with pytest.raises(Exception, match=r"keras\.RematScope on JAX"):
                    model.fit(given, Y, shuffle=False, verbose=0)
                return
            model.fit(given, Y, shuffle=False, verbose=0)
        ends.append(named_pairs(model))
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, dtype="float32")


def test_a_merged_model_and_its_model_go_their_own_ways():
    # JAX donates a model's arrays to what fit and predict compile: two models that shared one would lose it.
    model, given = adapted(whole=True)
    plain = merge(model, {"language": "swa", "task": "ner"})
    expected = plain.predict(X, verbose=0)
    y = model.predict(given, verbose=0)
    for one in (plain, model):
        one.compile(keras.optimizers.SGD(1e-2), "mse")
    plain.fit(X, np.zeros_like(expected), verbose=0)
    assert_close(model.predict(given, verbose=0), y, dtype="float32")
    moved = plain.predict(X, verbose=0)
    assert np.abs(moved - expected).max() > 1e-6
    model.fit(given, np.zeros_like(y), verbose=0)
    assert_close(plain.predict(X, verbose=0), moved, dtype="float32")


CALLS = {
    "fit": lambda m, x: m.fit(x, Y, verbose=0),
    "evaluate": lambda m, x: m.evaluate(x, Y, verbose=0),
    "predict": lambda m, x: m.predict(x, verbose=0),
    "train_on_batch": lambda m, x: m.train_on_batch(x, Y),
    "test_on_batch": lambda m, x: m.test_on_batch(x, Y),
    "predict_on_batch": lambda m, x: m.predict_on_batch(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_routing_costs_a_model_nothing(name):
    model, given = adapted()
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    model.train_on_batch(given, Y)
    before = {n: v.tobytes() for n, v in named_pairs(model).items()}
    with pytest.raises(flix.RoutingError, match="without routing"):
        CALLS[name](model, X)
    assert {n: v.tobytes() for n, v in named_pairs(model).items()} == before
    CALLS[name](model, given)
    model.fit(given, Y, verbose=0)
    fresh, given = adapted()  # never compiled
    with pytest.raises(flix.RoutingError, match="without routing"):
        fresh.predict(X, verbose=0)
    fresh.predict(given, verbose=0)
