"""FLix with Keras: one small classifier, adapted to 2 tasks in 3 languages with ``model.fit``, callbacks and resuming.

Offline, on made-up data: each language rotates the classes by an offset of its own, each task reads another half of the
input. The frozen base knows neither.
"""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import flix
from flix.backends.tensorflow import adapt, load, merge, save, summary

LANGUAGES, TASKS, CLASSES, SIZE = ["hau", "swa", "yor"], ["topic", "tone"], 4, 16
registry = flix.FeatureRegistry({"language": LANGUAGES, "task": TASKS})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))


def base_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE,), name="inputs")
    hidden = keras.layers.Dense(64, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="out")(hidden))


rng = np.random.default_rng(0)
langs, tasks = rng.integers(0, 3, 2304), rng.integers(0, 2, 2304)
x = rng.normal(size=(2304, SIZE)).astype("float32")
y = (x.reshape(-1, 2, 8)[np.arange(2304), tasks, :CLASSES].argmax(1) + langs) % CLASSES
rows = [{"language": LANGUAGES[i], "task": TASKS[j]} for i, j in zip(langs, tasks, strict=True)]
inputs = {"inputs": x, "flix_features": registry.encode(rows).ids}
data = tf.data.Dataset.from_tensor_slices((inputs, y))
train, valid = data.take(2048).batch(64), data.skip(2048).batch(64)

model = adapt(base_model(), config)
print(summary(model))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.AdamW(1e-2, weight_decay=1e-3), loss, metrics=["accuracy"])
with tempfile.TemporaryDirectory() as folder:
    last = keras.callbacks.ModelCheckpoint(f"{folder}/last.keras")  # weights, optimizer, steps
    options = {"validation_data": valid, "shuffle": False, "verbose": 2}
    model.fit(train, epochs=3, callbacks=[last], **options)
    # As if the process had been stopped here: what follows is what would have followed.
    model = keras.models.load_model(f"{folder}/last.keras")
    stop = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    model.fit(train, initial_epoch=3, epochs=12, callbacks=[last, stop], **options)
    save(model, f"{folder}/adapter")  # the adapter alone: opens in every flix backend
    again = load(base_model(), f"{folder}/adapter")
difference = np.abs(model.predict(inputs, verbose=0) - again.predict(inputs, verbose=0)).max()
print(f"loaded adapter: largest difference {difference:.1e}")
merged = merge(model, {"language": "swa", "task": "topic"})
print("merged for swa, topic:", [type(layer).__name__ for layer in merged.layers])
