"""Dropout on the low-rank path (docs/specification.md §1.8): Keras's training flag says when."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from flix.backends.keras.adapt import flix_layers
from flix.backends.tensorflow import FlixDense, FlixModel, adapt, load, merge, save
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tensorflow import functional, randomize

RATE = 0.4
TOKENS = np.arange(len(IDS) * 5).reshape(len(IDS), 5) % 11
GIVEN = {"inputs": TOKENS, "flix_features": IDS}


def adapted(rate=RATE, targets="all-linear"):
    model = adapt(functional(), config(lora_dropout=rate, target_modules=targets))
    randomize(layer for _, layer in flix_layers(model.base))
    return model


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_the_features_alone_see_less(strategy):
    layer = FlixDense(4, config=config(lora_dropout=RATE), name="q", strategy=strategy)
    other = FlixDense(4, config=config(), name="q", strategy=strategy)
    x = tf.random.stateless_normal([len(IDS), 3, 6], [0, 1])
    for each in (layer, other):
        each.build(x.shape)
        each.kernel.assign(np.arange(24).reshape(6, 4) / 24)
        randomize([each])
    twin = keras.random.SeedGenerator(int(layer.flix_seed.state.numpy()[0]))
    assert layer.flix_seed.state.numpy()[1] == 0
    less = keras.random.dropout(x, RATE, seed=twin)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, less])
        y = layer(x, IDS, WEIGHTS, training=True)
        base = tf.matmul(x, layer.kernel) + layer.bias
        wanted = base + other(less, IDS, WEIGHTS) - tf.matmul(less, other.kernel) - other.bias
        losses = [tf.reduce_sum(v**2) for v in (y, wanted)]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    for name in ("flix_A", "flix_B"):
        grads = [
            tf.convert_to_tensor(tape.gradient(loss, getattr(each, name).value))
            for loss, each in zip(losses, (layer, other), strict=True)
        ]
        np.testing.assert_allclose(*grads, rtol=1e-3, atol=1e-4)
    assert np.array_equal(layer(x, IDS, WEIGHTS), other(x, IDS, WEIGHTS))


def test_models_drop_while_they_train():
    model, plain = adapted(), adapted(0.0)
    first, second = (model(GIVEN, training=True).numpy() for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(adapted()(GIVEN, training=True), first)  # seeded
    assert np.array_equal(model(GIVEN), plain(GIVEN))
    assert np.array_equal(plain(GIVEN, training=True), plain(GIVEN))
    assert all(layer.flix_seed is None for _, layer in flix_layers(plain.base))


def test_compiled_training_draws_anew():
    model = adapted()
    run = tf.function(lambda ids: model({"inputs": TOKENS, "flix_features": ids}, training=True))
    first, second = (run(tf.constant(IDS)).numpy() for _ in range(2))
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(adapted()(GIVEN, training=True), first, rtol=1e-4, atol=1e-5)
    model.compile("adam", "mse")
    history = model.fit(GIVEN, np.zeros((len(IDS), 3), "float32"), epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_embeddings_see_their_tokens_whole():
    model, plain = adapted(targets=["emb"]), adapted(0.0, targets=["emb"])
    assert np.array_equal(model(GIVEN, training=True), plain(GIVEN, training=True))


def test_files_keep_the_rate_and_merged_copies_are_plain(tmp_path):
    model = adapted()
    save(model, tmp_path / "a")
    again = load(functional(), tmp_path / "a")
    assert again.flix_config.lora_dropout == RATE
    assert not np.array_equal(*(again(GIVEN, training=True) for _ in range(2)))
    model.save(tmp_path / "m.keras")
    whole = keras.models.load_model(tmp_path / "m.keras")
    assert isinstance(whole, FlixModel)
    np.testing.assert_allclose(whole(GIVEN), model(GIVEN), rtol=1e-5, atol=1e-5)
    assert not np.array_equal(*(whole(GIVEN, training=True) for _ in range(2)))
    plain = merge(model, {"language": "swa"})
    assert np.array_equal(plain(TOKENS, training=True), plain(TOKENS))
