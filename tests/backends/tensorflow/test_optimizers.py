"""Training: absent features stay bit-identical, whatever the optimizer; a numpy AdamW is the truth."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import FlixDense, adapt, keep_absent, named_pairs
from tests.helpers.dense import dense
from tests.helpers.registry import config
from tests.helpers.tensorflow import adapted, batch, pairs_of, randomize, sequential
from tests.helpers.tolerance import assert_close

X, IDS = batch(8, 6, seed=4)
X = X.astype("f") / 11
IDS[:, 0] = np.where(np.arange(8) % 2, 0, 1)
IDS[:, 1] = 4
TARGET = np.ones((8, 6), "f")
GIVEN = {"inputs": X, "flix_features": IDS}
ABSENT = ("language.zul", "task.pos")

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-2, momentum=0.9, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(1e-2),
    "adadelta": lambda: keras.optimizers.Adadelta(1e-2),
    "adamax": lambda: keras.optimizers.Adamax(1e-2),
    "nadam": lambda: keras.optimizers.Nadam(1e-2),
    "ftrl": lambda: keras.optimizers.Ftrl(1e-2),
    "lion": lambda: keras.optimizers.Lion(1e-2, weight_decay=0.1),
    "lamb": lambda: keras.optimizers.Lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 9)),
    "clipnorm": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, clipnorm=0.1),
    "global clipnorm": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, clipvalue=0.01),
    "loss scale factor": lambda: keras.optimizers.AdamW(1e-2, loss_scale_factor=8.0),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(1e-2)),
    "accumulation": lambda: keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=2),
    "muon": lambda: keras.optimizers.Muon(1e-2, exclude_layers=["flix_"]),
}


def table_model(targets=("dense", "dense_1")):
    model = adapt(sequential(), config(target_modules=targets))
    randomize(layer for _, layer in flix_layers(model.base))
    return model


def some_moved_and_absent_stayed(model, before, absent=ABSENT):
    after = named_pairs(model)
    for name, value in before.items():
        same = value.tobytes() == after[name].tobytes()
        assert same == name.endswith(absent), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_features_are_bit_identical_after_any_optimizer(name):
    model = table_model(["dense_1"])
    model.compile(OPTIMIZERS[name](), "mse", run_eagerly=name not in ("adamw", "accumulation"))
    everything = {
        "inputs": X,
        "flix_features": np.tile([[0, 1, 3, 4, 5]], (8, 1)).astype(np.int32),
    }
    model.fit(everything, TARGET, batch_size=4, shuffle=False, verbose=0)
    before = named_pairs(model)  # with momentum in all of them
    model.fit(GIVEN, TARGET, epochs=2, batch_size=4, shuffle=False, verbose=0)
    some_moved_and_absent_stayed(model, before)
    for _, layer in flix_layers(model.base):
        assert not layer.flix_A.numpy()[0].any() and not layer.flix_B.numpy()[0].any()
        assert np.isfinite(layer.flix_A.numpy()).all()


@pytest.mark.parametrize("eager", [True, False])
def test_features_with_the_weight_zero_are_absent(eager):
    model = table_model(["dense_1"])
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1)
    model.compile(optimizer, "mse", run_eagerly=eager)
    ids = np.concatenate([IDS, np.full((8, 1), 3, np.int32)], 1)
    given = {**GIVEN, "flix_features": ids, "flix_weights": np.ones(ids.shape, "f")}
    model.fit(given, TARGET, verbose=0)  # with momentum in zul, which is 3
    given["flix_weights"][:, 2] = 0
    before = named_pairs(model)
    model.fit(given, TARGET, epochs=2, verbose=0)
    some_moved_and_absent_stayed(model, before)


def test_optimizer_inside_a_multi_optimizer():
    module = pytest.importorskip(
        "keras.src.optimizers.multi_optimizer", reason="this Keras has none"
    )

    model = table_model()
    adam, sgd = (
        keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        keras.optimizers.SGD(0.1, momentum=0.9),
    )
    choose = {False: adam, True: sgd}
    model.compile(
        module.MultiOptimizer(lambda v: choose["flix_A" in v.path]), "mse", run_eagerly=True
    )
    model.fit({**GIVEN, "flix_features": np.tile([[0, 1, 3, 4, 5]], (8, 1))}, TARGET, verbose=0)
    before = named_pairs(model)
    model.fit(GIVEN, TARGET, verbose=0)
    some_moved_and_absent_stayed(model, before)


class NumpyAdamW:
    """AdamW for one matrix of its own, as PyTorch has it for a parameter whose gradient may be None."""

    def __init__(self, value, lr, decay):
        self.value, self.lr, self.decay = value.copy(), lr, decay
        self.m, self.v, self.t = np.zeros_like(value), np.zeros_like(value), 0

    def step(self, grad):
        self.t += 1
        self.value -= self.lr * self.decay * self.value
        self.m += (grad - self.m) * 0.1
        self.v += (grad**2 - self.v) * 0.001
        rate = self.lr * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        self.value -= rate * self.m / (np.sqrt(self.v) + 1e-7)


def trajectory(whole, jit, strategy="gather", accumulate=False):
    """Training steps under changing features against the oracle's; returns the largest difference."""
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    layer = FlixDense(
        4, config=config(), name="q", strategy=strategy, dtype="float64", use_bias=False
    )
    layer.build((None, 5))
    randomize([layer])
    pairs = pairs_of(layer)
    truth = {i: [NumpyAdamW(v, 0.01, 0.1) for v in (a, b)] for i, (a, b, _) in pairs.items()}
    steps = 2 if accumulate else None
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, gradient_accumulation_steps=steps)
    keep_absent(optimizer, whole=whole)
    tables = [layer.flix_A, layer.flix_B]
    optimizer.build(tables)

    def step(x, ids, dy):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, flix_features=ids) * dy)
        optimizer.apply(tape.gradient(loss, tables), tables)

    run = tf.function(step, jit_compile=jit)
    # Keras rounds Adam's coefficients to float32, whatever the variable's dtype: hence the bound of 2e-6.
    kept = {}
    for number in range(8 if not jit else 5):
        x, dy = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 4))
        ids = rng.choice([[-1, 4], [0, 5], [1, 1], [3, -1], [2, 5]][number % 3 : number % 3 + 3], 4)
        now = {i: (t[0].value, t[1].value, pairs[i][2]) for i, t in truth.items()}
        grads = dense(x, ids, now, kernel=layer.kernel.numpy().T, dy=dy)
        run(tf.constant(x), tf.constant(ids, tf.int32), tf.constant(dy))
        for i in np.unique(ids):
            if i in truth:
                a, b = kept.get(i, (0.0, 0.0))
                kept[i] = (a + grads.A[i], b + grads.B[i])
        if accumulate and number % 2 == 0:
            continue
        for i, pair in kept.items():
            for optimizer_of, grad in zip(truth[i], pair, strict=True):
                optimizer_of.step(grad / (steps or 1))
        kept = {}
    got = pairs_of(layer)
    return max(np.abs(got[i][k] - t[k].value).max() for i, t in truth.items() for k in (0, 1))


@pytest.mark.parametrize("strategy", ["gather", "masked"])
@pytest.mark.parametrize("whole", [False, True])
def test_adamw_trajectory_is_that_of_one_optimizer_a_feature(whole, strategy):
    assert trajectory(whole, False, strategy) < 2e-6


def test_adamw_trajectory_compiled_by_xla():
    assert trajectory(True, True) < 2e-6


def test_adamw_trajectory_under_accumulation():
    assert trajectory(False, False, accumulate=True) < 2e-6


def test_fit_on_a_dataset_compiled_by_xla():
    model = adapt(sequential(), config(target_modules=["dense_1"]))
    randomize(layer for _, layer in flix_layers(model.base))
    data = tf.data.Dataset.from_tensor_slices((GIVEN, TARGET)).batch(4)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse", jit_compile=True)
    before = named_pairs(model)
    model.fit(data, epochs=2, shuffle=False, verbose=0)
    assert model.jit_compile
    some_moved_and_absent_stayed(model, before)


def test_optimizer_costs_nothing_for_absent_features():
    """The step's tensors are as large as the rows in use: the graph holds no slot of the table's size but variables."""
    registry = flix.FeatureRegistry({"language": [f"l{i}" for i in range(500)]})
    layer = FlixDense(
        4, config=flix.FlixConfig(registry=registry, ranks=2), name="q", strategy="gather"
    )
    layer.build((None, 9, 5))
    optimizer = keep_absent(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    tables = [layer.flix_A, layer.flix_B]
    optimizer.build(tables)

    @tf.function
    def step(x, ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, flix_features=ids))
        grads = tape.gradient(loss, tables)
        assert all(isinstance(grad, tf.IndexedSlices) for grad in grads)
        optimizer.apply(grads, tables)

    graph = step.get_concrete_function(tf.ones((3, 9, 5)), tf.zeros((3, 1), tf.int32)).graph
    whole = [
        op.name
        for op in graph.get_operations()
        for tensor in op.outputs
        if tensor.shape.rank == 2 and tensor.shape[0] == 1001 and op.type != "ReadVariableOp"
    ]
    assert whole == []


def test_batch_that_activates_nothing_moves_nothing():
    model = table_model()
    model.compile(OPTIMIZERS["adafactor"](), "mse", run_eagerly=True)
    before = named_pairs(model)
    nothing = np.full((8, 2), -1, np.int32)
    model.fit({"inputs": X, "flix_features": nothing}, TARGET, verbose=0)
    some_moved_and_absent_stayed(model, before, absent=tuple("abcdefghijklmnopqrstuvwxyz"))
    model.fit(GIVEN, TARGET, verbose=0)
    assert all(np.isfinite(value).all() for value in named_pairs(model).values())


def test_loss_scaling_under_mixed_float16():
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = table_model()
        model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.optimizer.initial_scale = (
            8.0  # the default overflows in the first steps, which are skipped
        )
        before = named_pairs(model)
        model.fit(GIVEN, TARGET, epochs=2, verbose=0)
        some_moved_and_absent_stayed(model, before)
    finally:
        keras.mixed_precision.set_global_policy(policy)


def test_optimizers_that_cannot_be_exact_are_refused():
    model = table_model()
    with pytest.raises(flix.ConfigError, match="use_ema"):
        model.compile(keras.optimizers.Adam(use_ema=True), "mse")
    model.compile(keras.optimizers.Muon(), "mse", run_eagerly=True)
    with pytest.raises(flix.ConfigError, match="exclude_layers"):
        model.fit(GIVEN, TARGET, verbose=0)
    with pytest.raises(flix.ConfigError, match="Keras optimizer"):
        keep_absent("adam")
    optimizer = keras.optimizers.Adam()
    assert keep_absent(keep_absent(optimizer)) is optimizer


def outer(optimizer, **options):
    """A model around an adapted one, with a head of its own; (model, adapted, x, ids)."""
    model, given = adapted("sequential")
    randomize(layer for _, layer in flix_layers(model.base))
    x, ids = keras.Input((6,)), keras.Input((2,), dtype="int32")
    y = keras.layers.Dense(1)(model({"inputs": x, "flix_features": ids}))
    around = keras.Model([x, ids], y)
    if optimizer is not None:
        around.compile(optimizer, "mse", **options)
    return around, model, given["inputs"], np.tile(np.array([[0, 4]], np.int32), (6, 1))


def moved(model, before):
    """Which features' values differ from those before."""
    return {
        feature
        for name, value in named_pairs(model).items()
        if not np.array_equal(value, before[name])
        for feature in [tuple(name.split(".")[-2:])]
    }


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        lambda: keras.optimizers.SGD(1e-2, momentum=0.9, weight_decay=0.1),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(1e-2)),
    ],
    ids=["adamw", "sgd", "scaled"],
)
def test_a_model_around_an_adapted_one_keeps_absent_features(optimizer, eager):
    around, model, x, ids = outer(optimizer(), run_eagerly=eager)
    others = np.tile(np.array([[1, 5]], np.int32), (6, 1))
    around.fit([x, others], np.ones((6, 1)), verbose=0)  # momentum of other features, to begin with
    before = named_pairs(model)
    head = around.layers[-1].kernel.numpy()
    around.fit([x, ids], np.ones((6, 1)), epochs=2, verbose=0)
    assert moved(model, before) == {("language", "hau"), ("task", "ner")}
    assert np.abs(around.layers[-1].kernel - head).max() > 0


def test_a_model_around_an_adapted_one_trains_as_the_adapted_one_does():
    """The same layers and loss, inside of another model and not: the same bits but for rounding."""
    found = []
    for inside in (True, False):
        around, model, x, ids = outer(None)
        trained = keras.Model(around.inputs, around.layers[-2].output) if inside else model
        trained.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse", jit_compile=False)
        given = [x, ids] if inside else {"inputs": x, "flix_features": ids}
        trained.fit(given, np.ones((6, 6)), epochs=3, verbose=0, shuffle=False)
        found.append(named_pairs(model))
    for name, value in found[0].items():
        assert_close(value, found[1][name])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_by_hand_with_a_plain_optimizer_keeps_absent_features(compiled):
    around, model, x, ids = outer(None)
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1)

    def step(x, ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(around([x, ids]) ** 2)
        variables = around.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    step = tf.function(step) if compiled else step
    before = named_pairs(model)
    for _ in range(3):
        step(tf.constant(x), tf.constant(ids))
    assert moved(model, before) == {("language", "hau"), ("task", "ner")}


def test_a_model_around_an_adapted_one_refuses_what_moves_every_row():
    around, _, x, ids = outer(keras.optimizers.AdamW(1e-2, use_ema=True))
    with pytest.raises(flix.ConfigError, match="use_ema=True overwrites"):
        around.fit([x, ids], np.ones((6, 1)), verbose=0)


def test_a_gradient_of_a_whole_table_moves_every_row_of_it():
    layer = FlixDense(3, config=config(), name="q")
    layer(tf.ones([1, 4]), flix_features=[[0]])
    before, table = np.array(layer.flix_B), layer.flix_B
    optimizer = keep_absent(keras.optimizers.SGD(1.0))
    optimizer.build([table])
    optimizer.apply([tf.ones(table.shape)], [table])
    after = np.array(table)
    np.testing.assert_array_equal(after[0], before[0])  # stands for unused slots
    np.testing.assert_allclose(after[1:], before[1:] - 1)
