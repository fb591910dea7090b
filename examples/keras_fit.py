"""FLix with Keras: one small classifier, adapted to 2 tasks in 3 languages at once, with ``model.fit``.

Runs offline, in seconds, on made-up data: each language rotates the classes by its own offset, each task reads
another half of the input. The frozen base knows neither.
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
rng = np.random.default_rng(0)
keras.utils.set_random_seed(0)


def base_model() -> keras.Model:
    """A plain Keras model, as it might have been pretrained."""
    inputs = keras.Input((SIZE,), name="inputs")
    hidden = keras.layers.Dense(64, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="out")(hidden))


rows = [
    {"language": str(rng.choice(LANGUAGES)), "task": str(rng.choice(TASKS))} for _ in range(2048)
]
x = rng.normal(size=(len(rows), SIZE)).astype("float32")
halves = x.reshape(-1, 2, SIZE // 2)[np.arange(len(rows)), [TASKS.index(r["task"]) for r in rows]]
y = (halves[:, :CLASSES].argmax(1) + [LANGUAGES.index(r["language"]) for r in rows]) % CLASSES

registry = flix.FeatureRegistry({"language": LANGUAGES, "task": TASKS})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))
plain = base_model()
start = plain.get_weights()
model = adapt(plain, config)
print(summary(model))

routing = registry.encode(rows)
inputs = {"inputs": x, "flix_features": routing.ids, "flix_weights": routing.weights}
data = tf.data.Dataset.from_tensor_slices((inputs, y)).shuffle(2048, seed=0).batch(64)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.AdamW(1e-2, weight_decay=1e-3), loss, metrics=["accuracy"])
history = model.fit(data, epochs=8, shuffle=False, verbose=2)

with tempfile.TemporaryDirectory() as folder:
    save(model, folder)  # the adapter alone: opens in every flix backend
    fresh = base_model()
    fresh.set_weights(start)
    again = load(fresh, folder)
logits, same = model.predict(inputs, verbose=0), again.predict(inputs, verbose=0)
print(f"loaded adapter: largest difference {np.abs(logits - same).max():.1e}")
merged = merge(model, {"language": "swa", "task": "topic"})
print("merged for swa, topic:", [type(layer).__name__ for layer in merged.layers])
