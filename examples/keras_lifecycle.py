"""A trained adapter gets a new language: it trains alone, then others leave, are renamed, and are shared as files."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np

import flix
from flix.backends import tensorflow as ft

registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["scale"]})
config = flix.FlixConfig(registry=registry, ranks=4)
FACTOR = {"hau": 2.0, "swa": -1.0, "yor": 0.5}
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")


def base():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,), name="inputs")
    hidden = keras.layers.Dense(32, activation="tanh", name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(8, name="down")(hidden))


def train(model, languages):
    rows = [{"language": languages[i % len(languages)], "task": "scale"} for i in range(len(x))]
    y = np.stack([FACTOR[row["language"]] * v for row, v in zip(rows, x, strict=True)])
    inputs = {"inputs": x, "flix_features": model.flix_config.registry.encode(rows).ids}
    model.compile(keras.optimizers.AdamW(2e-2), "mse")  # after a change, always anew
    history = model.fit(inputs, y, batch_size=32, epochs=75, verbose=0)
    print(f"{', '.join(languages)}: loss {history.history['loss'][-1]:.4f}")


model = ft.adapt(base(), config)
train(model, ["hau", "swa"])
before = ft.named_pairs(model)
ft.add_feature(model, "language", "yor", rank=4, init_from=["hau", "swa"])  # the others are frozen
train(model, ["yor"])
pairs = ft.named_pairs(model)
assert all(np.array_equal(pairs[n], v) for n, v in before.items())  # the others: no bit moved
with ft.disable(model):
    print("disabled is the base:", np.array_equal(model(x), base()(x)))

with tempfile.TemporaryDirectory() as folder:
    ft.save(model, folder, {"language": "yor"})  # one language's file, without the rest
    other = ft.adapt(base(), config)
    ft.load_features(other, folder)
    print("another model got yoruba:", ("language", "yor") in other.flix_config.registry)
ft.remove_feature(model, "language", "hau")
ft.rename_feature(model, "language", "yor", "yoruba")
print("ids stay:", model.flix_config.registry.id("language", "yoruba"))
plain = ft.merge(model, {"language": "yoruba", "task": "scale"})
print(f"merged: mean error {np.abs(plain(x) - 0.5 * x).mean():.3f}")
