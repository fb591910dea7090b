"""Adapted models: functional, sequential, subclassed; merging; new features; shared layers."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends import tensorflow as backend
from flix.backends.tensorflow import adapt, add_feature, merge, named_pairs, summary
from flix.backends.tensorflow.base import layer_infos
from flix.backends.tensorflow.paths import flix_layers
from flix.core.adapter.initial import initial_a
from tests.helpers.claims import over
from tests.helpers.dense import dense
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import (
    IDS,
    KINDS,
    Block,
    X,
    adapted,
    functional,
    made,
    pairs_of,
    randomize,
)
from tests.helpers.tolerance import assert_close


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_starts_as_its_base_and_only_its_tables_train(kind):
    plain, x, targets = made(kind)
    before = plain(x).numpy()
    weights = plain.count_params()
    model = adapt(plain, config(target_modules=targets))
    assert_close(model({"inputs": x, "flix_features": IDS}), before)
    assert sorted(path for path, _ in flix_layers(model.base)) == sorted(targets)
    assert {v.name for v in model.trainable_variables} == {"flix_A", "flix_B"}
    assert len(model.trainable_variables) == 2 * len(targets)
    table = summary(model)
    assert table.total - sum(table.features.values()) == weights
    assert (
        table.trainable == sum(table.features.values()) and table.features["language", "yor"] == 0
    )
    assert "task:pos" in str(table)
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    assert len(model.trainable_variables) == 2 * len(targets)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_and_initial_values_are_the_same_in_every_instance(kind):
    first, second = adapted(kind)[0], adapted(kind)[0]
    one, two = named_pairs(first), named_pairs(second)
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.tobytes() == two[name].tobytes()
    path, layer = next(flix_layers(first.base))
    wanted = initial_a(seed=0, layer=path, group="task", feature="pos", rank=4, d_in=layer.d_in)
    np.testing.assert_array_equal(one[f"{path}.A.task.pos"], wanted)


@pytest.mark.covers("sequential", "mixed batch", backend="tensorflow")
def test_sequential_model_is_the_oracle():
    model, given = adapted("sequential")
    randomize(layer for _, layer in flix_layers(model.base))
    x = given["inputs"]
    for _, layer in flix_layers(model.base):
        x = dense(x, IDS, pairs_of(layer), kernel=layer.kernel.numpy().T, bias=layer.bias).y
    assert_close(model(given), x)
    outer = keras.Input((6,), name="inputs"), keras.Input((2,), dtype="int32")
    symbolic = keras.Model(outer, model({"inputs": outer[0], "flix_features": outer[1]}))
    assert_close(symbolic([given["inputs"], IDS]), x)


@over(KINDS, "merge", backend="tensorflow", argument="kind")
def test_merge_is_the_forward_and_leaves_no_flix_layer(kind):
    model, given = adapted(kind)
    randomize(layer for _, layer in flix_layers(model.base))
    row = {"language": {"swa": 0.5, "zul": -1.0}, "task": "pos"}
    merged = merge(model, row)
    routing = registry().encode([row] * 6)
    wanted = model({**given, "flix_features": routing.ids, "flix_weights": routing.weights})
    assert_close(merged(given["inputs"]), wanted)
    assert not list(flix_layers(merged)) and list(flix_layers(model.base))
    assert type(merged) is type(model.base)
    assert len(merged.trainable_variables) == len(made(kind)[0].trainable_variables)
    with pytest.raises(flix.RoutingError, match="activates none"):
        merge(model, {})
    with pytest.raises(flix.TargetError, match="needs an adapted model"):
        merge(merged, row)


@pytest.mark.parametrize("jit", [False, True])
def test_compiled_call_traces_once_whatever_the_features(jit):
    model, given = adapted("sequential")
    randomize(layer for _, layer in flix_layers(model.base))
    function = tf.function(model, jit_compile=jit)
    for ids in (IDS, IDS[::-1].copy(), np.full_like(IDS, -1)):
        ids, x = tf.constant(ids), tf.constant(given["inputs"])
        got = function({"inputs": x, "flix_features": ids})
        assert_close(got, model({"inputs": x, "flix_features": ids}))
    assert function.experimental_get_tracing_count() == 1


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


@pytest.mark.covers("functional", "add a feature", backend="tensorflow")
@pytest.mark.parametrize("freeze", [True, False])
def test_new_feature_joins_without_moving_the_others(freeze, tmp_path):
    model, given = adapted()
    randomize(layer for _, layer in flix_layers(model.base))
    before, output = named_pairs(model), model(given).numpy()
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(given, np.ones((6, 3)), epochs=0)
    add_feature(model, "language", "ibo", rank=3, init_from="swa", freeze_others=freeze)
    after = named_pairs(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert_close(model(given), output)
    new, swa = np.array([[6, 4]] * 6), np.array([[1, 4]] * 6)
    copied = model({"inputs": X, "flix_features": swa}).numpy()
    assert_close(model({"inputs": X, "flix_features": new}), copied)
    with pytest.raises(ValueError, match="compile"):
        model.fit(given, np.ones((6, 3)), verbose=0)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse", run_eagerly=True)
    mixed = np.array([[6, 4], [0, 4], [6, 5], [1, 5], [3, 5], [6, 4]], np.int32)
    model.fit({"inputs": X, "flix_features": mixed}, np.ones((6, 3)), epochs=2, verbose=0)
    moved = {
        name for name, value in named_pairs(model).items() if not np.array_equal(value, after[name])
    }
    assert any(".ibo" in name for name in moved)
    assert all(".ibo" in name for name in moved) == freeze
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    given = {"inputs": X, "flix_features": new}
    assert_close(again(given), model(given))
    trained = sum(
        summary(model).features[f] for f in summary(model).features if not freeze or f[1] == "ibo"
    )
    assert summary(again).trainable == trained
    with pytest.raises(flix.FeatureError, match="ibo"):
        add_feature(model, "language", "ibo", rank=1)
    with pytest.raises(flix.RankError, match="rank"):
        add_feature(model, "language", "xho")


def test_frozen_features_get_no_gradient():
    model, _ = adapted("sequential")
    add_feature(model, "language", "ibo", rank=2)
    randomize(layer for _, layer in flix_layers(model.base))
    ids = np.array([[6, 4], [0, 4], [6, 5], [1, 5], [3, 5], [-1, 4]], np.int32)
    x = np.random.default_rng(0).normal(size=(6, 6)).astype("f")
    with tf.GradientTape() as tape:
        y = model({"inputs": x, "flix_features": ids}, training=True)
    (a, *_) = tape.gradient(y, model.trainable_variables)
    rows = np.asarray(a.indices)
    assert set(rows.tolist()) == {0, 13, 14} and not np.asarray(a.values)[rows == 0].any()


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
        with pytest.raises(flix.RoutingError, match="called without routing"):
            model(call, training=True)
        with pytest.warns(UserWarning, match="base model answers alone"):
            base = model(call)
    nothing = np.full_like(IDS, -1)
    assert_close(model({"inputs": X, "flix_features": nothing}), base)
    with pytest.raises(flix.RoutingError, match="without flix_features"):
        model({"inputs": X, "flix_weights": np.ones((6, 2), "f")})
    with pytest.raises(flix.RoutingError, match="row 3"):
        model({"inputs": X, "flix_features": np.where(np.arange(6)[:, None] == 3, 9, IDS)})
    with pytest.raises(flix.RoutingError, match="routes 5 rows, but the batch has 6"):
        model({"inputs": X, "flix_features": IDS[:5]})
    with pytest.raises(flix.RoutingError, match="is adapted, but no routing is in force"):
        model.base(X, training=True)
    model.compile("adam", "mse", run_eagerly=True)
    with pytest.raises(flix.RoutingError, match="called without routing"):
        model.fit(X, np.ones((6, 3)), verbose=0)


def test_bad_targets_and_models_are_named():
    with pytest.raises(flix.TargetError, match=r"'qq' matches no layer \(did you mean 'q'"):
        adapt(functional(), config(target_modules=["qq"]))
    with pytest.raises(flix.TargetError, match="cannot be adapted"):
        adapt(functional(), config(target_modules=["mha"]))
    with pytest.raises(flix.TargetError, match="adapted already"):
        adapt(adapted()[0], config())
    with pytest.raises(flix.TargetError, match="adapted already"):
        adapt(adapted()[0].base, config())
    with pytest.raises(flix.TargetError, match="not built"):
        adapt(keras.Sequential([keras.layers.Dense(3)]), config())
    with pytest.raises(flix.TargetError, match=r"keras\.Model"):
        adapt(keras.layers.Dense(3), config())
    with pytest.raises(flix.ConfigError, match="FlixConfig"):
        adapt(functional(), {})
    with pytest.raises(flix.ConfigError, match="strategy"):
        adapt(functional(), config(), strategy="fast")
    model = functional()
    model.get_layer("q").enable_lora(2)
    with pytest.raises(flix.TargetError, match="LoRA of its own"):
        adapt(model, config(target_modules=["q"]))


def test_all_linear_leaves_out_heads_and_embeddings():
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(5, 4, name="emb")(inputs)
    x = keras.layers.Dense(4, name="a")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="lm_head")(x))
    model = adapt(model, config(target_modules="all-linear"))
    assert [path for path, _ in flix_layers(model.base)] == ["a"]
    assert [i.kind for i in layer_infos(model.base)] == ["embedding", "linear", "linear"]


def test_shared_layer_is_adapted_once_and_gets_both_gradients():
    inputs = keras.Input((4,), name="inputs")
    shared = keras.layers.Dense(4, name="q")
    base = keras.Model(inputs, shared(shared(inputs)))
    model = adapt(base, config(target_modules=["q"]))
    randomize(layer for _, layer in flix_layers(model.base))
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("f")
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit({"inputs": x, "flix_features": IDS}, x, verbose=0)
    assert len(model.trainable_variables) == 2


@pytest.mark.parametrize("eager", [True, False])
def test_rematerialised_blocks_give_the_plain_gradients(eager):
    x = np.random.default_rng(0).normal(size=(6, 9, 6)).astype("f")
    found = []
    for mode in ("full", None):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=mode):
            block = Block(6, name="block")
        inputs = keras.Input((9, 6), name="inputs")
        model = adapt(keras.Model(inputs, block(inputs)), config(target_modules=["up", "down"]))
        randomize(layer for _, layer in flix_layers(model.base))

        def gradients(model=model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model({"inputs": x, "flix_features": IDS}, training=True) ** 2)
            grads = tape.gradient(loss, model.trainable_variables)
            return [tf.convert_to_tensor(grad) for grad in grads]

        found.append((gradients if eager else tf.function(gradients))())
    for remat, plain in zip(*found, strict=True):
        assert np.abs(plain).max() > 0
        assert_close(remat, plain)


def test_batch_normalisation_of_the_base_keeps_its_statistics():
    model, given = adapted("subclassed")
    model.compile("adam", "mse", run_eagerly=True)
    before = [v.numpy() for v in model.base.norm.variables]
    model.fit(given, np.ones((6, 2)), verbose=0)
    for old, new in zip(before, model.base.norm.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


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


def test_public_names():
    for name in backend.__all__:
        assert getattr(backend, name) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert issubclass(backend.FlixModel, keras.Model)
