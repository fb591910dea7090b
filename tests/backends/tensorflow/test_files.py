"""Files of adapted models: .keras, weights, SavedModel, adapter folders. (Those between frameworks: tests/backends.)"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.tensorflow import load, named_pairs, save
from flix.backends.tensorflow.paths import flix_layers
from flix.core.adapter.files import load_adapter
from tests.helpers.claims import over
from tests.helpers.tensorflow import IDS, KINDS, adapted, made, randomize, sequential
from tests.helpers.tolerance import assert_all_same_bits, assert_close


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


@over(["functional", "subclassed"], "save and load", backend="tensorflow", argument="kind")
def test_adapter_folder_round_trip(kind, tmp_path):
    model, given = adapted(kind)
    randomize(layer for _, layer in flix_layers(model.base))
    save(model, tmp_path / "a")
    again = load(made(kind)[0], tmp_path / "a")
    assert_all_same_bits(named_pairs(again), named_pairs(model))
    assert_close(again(given), model(given))
    other, _ = adapted(kind)
    load(other, tmp_path / "a")
    assert_all_same_bits(named_pairs(other), named_pairs(model))
    assert_close(other(given), model(given))
    adapter = load_adapter(tmp_path / "a")
    path, layer = next(flix_layers(model.base))
    assert adapter.layers[path].d_in == layer.d_in
    with pytest.raises(flix.AdapterError, match="another architecture"):
        load(sequential(8), tmp_path / "a")
    with pytest.raises(flix.AdapterError, match="rank"):
        load(adapted(kind, ranks=2)[0], tmp_path / "a")
    with pytest.raises(flix.AdapterError, match="scale"):
        load(adapted(kind, alpha=1.0)[0], tmp_path / "a")
