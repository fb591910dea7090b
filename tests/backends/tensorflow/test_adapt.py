"""Adapted models: functional, sequential, subclassed; .keras files, heads, SavedModels."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import FlixModel, adapt, freeze, named_pairs, summary
from tests.helpers.claims import over
from tests.helpers.dense import dense
from tests.helpers.registry import config
from tests.helpers.tensorflow import (
    IDS,
    KINDS,
    X,
    adapted,
    flix_dense,
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
    assert "task=pos" in str(table)
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    assert len(model.trainable_variables) == 2 * len(targets)


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


def test_batch_normalisation_of_the_base_keeps_its_statistics():
    model, given = adapted("subclassed")
    model.compile("adam", "mse", run_eagerly=True)
    before = [v.numpy() for v in model.base.norm.variables]
    model.fit(given, np.ones((6, 2)), verbose=0)
    for old, new in zip(before, model.base.norm.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


@over(KINDS, "keras file", backend="tensorflow", argument="kind")
def test_keras_file_keeps_model_adapter_flags_and_optimizer(kind, tmp_path):
    model, given = adapted(kind)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse", run_eagerly=True)
    y = np.ones_like(model(given))
    model.fit(given, y, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert_close(again(given), model(given))
    assert again.flix_config == model.flix_config
    assert len(again.trainable_variables) == len(model.trainable_variables)
    model.fit(given, y, verbose=0)
    again.fit(given, y, verbose=0)
    for name, value in named_pairs(model).items():
        assert_close(named_pairs(again)[name], value)
    again.save_weights(tmp_path / "w.weights.h5")
    other = keras.models.load_model(tmp_path / "m.keras", compile=False)
    other.load_weights(tmp_path / "w.weights.h5")
    assert_close(other(given), again(given))


def test_head_unfrozen_by_hand_trains_and_stays_so(tmp_path):
    model, given = adapted(target_modules=["q"])
    model.base.get_layer("out").trainable = True
    assert len(model.trainable_variables) == 4
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert [v.name for v in again.trainable_variables] == [
        v.name for v in model.trainable_variables
    ]
    again.compile("adam", "mse", run_eagerly=True)
    kernel = again.base.get_layer("out").kernel.numpy()
    again.fit(given, np.ones((6, 3)), verbose=0)
    assert not np.array_equal(kernel, again.base.get_layer("out").kernel.numpy())


@over(["functional", "subclassed"], "export", backend="tensorflow", argument="kind")
def test_saved_model_serves_with_routing_as_an_input(kind, tmp_path):
    model, given = adapted(kind)
    randomize(layer for _, layer in flix_layers(model.base))
    wanted = model(given).numpy()
    model.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    signature = served.signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == {"inputs", "flix_features"}
    (got,) = signature(inputs=tf.constant(given["inputs"]), flix_features=tf.constant(IDS)).values()
    assert_close(got, wanted)
    wide = np.concatenate([IDS[:2], [[-1], [-1]]], 1).astype(np.int32)
    got = served.serve({"inputs": given["inputs"][:2], "flix_features": wide})
    assert_close(got, wanted[:2])
    model.export(
        str(tmp_path / "weighted"), verbose=False, input_signature=[model.input_specs(weights=True)]
    )
    weighted = tf.saved_model.load(str(tmp_path / "weighted"))
    weights = np.ones(IDS.shape, "f")
    assert_close(weighted.serve({**given, "flix_weights": weights}), wanted)


def test_files_that_list_frozen_features_by_layer_are_read():
    model, _ = adapted("sequential")
    freeze(model, {"task": "pos"})
    config = model.get_config()
    assert config["frozen"] == [5]
    again = FlixModel.from_config({**config, "frozen": [[5], [5]]})
    assert again.flix_state.frozen == model.flix_state.frozen == (5,)
    for (_, layer), (_, other) in zip(
        flix_layers(again.base), flix_layers(model.base), strict=True
    ):
        np.testing.assert_array_equal(layer.flix_live, other.flix_live)
        assert not layer.flix_live[layer.span(5)].any() and layer.flix_live.sum() == 9


def two_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="inputs")
    outputs = [keras.layers.Dense(n, name=name)(inputs) for name, n in (("ner", 2), ("pos", 3))]
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("losses", "weights", "metrics", "named"),
    [
        ({"ner": "mse", "pos": "mae"}, {"ner": 2.0, "pos": 0.5}, {"ner": ["mae"]}, True),
        (["mse", "mae"], [2.0, 0.5], [["mae"], []], False),
        ({"ner": "mse", "pos": "mae"}, None, {"pos": "mse"}, True),
        ("mse", None, None, False),
    ],
)
def test_losses_and_metrics_are_those_of_the_plain_model(losses, weights, metrics, named):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)).astype("f")
    y = {"ner": rng.normal(size=(6, 2)), "pos": rng.normal(size=(6, 3))}
    y = y if named else list(y.values())
    found = []
    for model in (two_outputs(), adapt(two_outputs(), config(target_modules=["ner", "pos"]))):
        given = {"inputs": x, "flix_features": IDS} if isinstance(model, FlixModel) else x
        model.compile("sgd", losses, loss_weights=weights, metrics=metrics)
        found.append(model.evaluate(given, y, verbose=0, return_dict=True))
        model.fit(given, y, verbose=0)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name


def test_sparse_inputs_give_what_dense_ones_do():
    inputs = keras.Input((4,), sparse=True, name="inputs")
    model = adapt(keras.Model(inputs, keras.layers.Dense(3, name="q")(inputs)), config())
    randomize(layer for _, layer in flix_layers(model.base))
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("f") * (np.arange(4) % 2)
    (layer,) = [layer for _, layer in flix_layers(model.base)]
    wanted = dense(x, IDS, pairs_of(layer), kernel=layer.kernel.numpy().T, bias=layer.bias).y
    sparse = tf.sparse.from_dense(x)
    assert_close(model({"inputs": sparse, "flix_features": IDS}), wanted)
    assert_close(tf.function(model)({"inputs": sparse, "flix_features": tf.constant(IDS)}), wanted)
    data = tf.data.Dataset.from_tensor_slices(({"inputs": sparse, "flix_features": IDS}, wanted))
    model.compile("sgd", "mse")
    assert model.evaluate(data.batch(3), verbose=0) < 1e-9
    model.fit(data.batch(3), verbose=0)


def test_quantize_and_lora_of_keras_are_refused_by_name_on_what_is_adapted():
    model, given = adapted("functional", target_modules=["q", "emb"])
    randomize(layer for _, layer in flix_layers(model.base))
    before = model(given).numpy()
    for call, name in (
        (lambda: model.quantize("int8"), "model 'flix_functional"),
        (lambda: model.base.quantize("int8"), "layer '"),
        (lambda: model.base.get_layer("q").quantize("int8"), "layer 'q'"),
        (lambda: model.base.get_layer("emb").quantize("int8"), "layer 'emb'"),
        (lambda: model.base.get_layer("q").enable_lora(2), "layer 'q'"),
        (lambda: model.base.get_layer("emb").enable_lora(2), "layer 'emb'"),
        (lambda: flix_dense().quantize("int8"), "layer 'q'"),
    ):
        with pytest.raises(flix.TargetError, match=f"on an adapted {name}"):
            call()
    assert_close(model(given), before)


def test_a_layer_quantized_by_gptq_is_refused_by_name_and_others_beside_it_act():
    plain = functional()
    settings = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None, group_size=4)
    plain.get_layer("q").quantize("gptq", config=settings)
    base = plain(X).numpy()
    with pytest.raises(flix.TargetError, match=r"quantized \(gptq\)"):
        adapt(plain, config(target_modules=["q"]))
    model = adapt(plain, config(target_modules=["out"]))
    randomize(layer for _, layer in flix_layers(model.base))
    with_none = np.full_like(IDS, -1)
    assert_close(model({"inputs": X, "flix_features": with_none}), base)
    assert np.abs(model({"inputs": X, "flix_features": IDS}) - base).max() > 1e-3
