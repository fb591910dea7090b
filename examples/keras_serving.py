"""Serve an adapted Keras model as a SavedModel: one model for all tasks and languages, with routing as an input."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import flix
from flix.backends.tensorflow import adapt

TASKS = ["double", "negate", "reverse"]
registry = flix.FeatureRegistry({"task": TASKS})
keras.utils.set_random_seed(0)
inputs = keras.Input((8,), name="inputs")
hidden = keras.layers.Dense(64, activation="relu", name="up")(inputs)
base = keras.Model(inputs, keras.layers.Dense(8, name="down")(hidden))
model = adapt(base, flix.FlixConfig(registry=registry, ranks=8))

rng = np.random.default_rng(0)
x = rng.normal(size=(1024, 8)).astype("float32")
tasks = rng.integers(0, len(TASKS), len(x))
y = np.select([tasks[:, None] == i for i in range(3)], [2 * x, -x, x[:, ::-1]])
ids = registry.encode([{"task": TASKS[i]} for i in tasks]).ids
model.compile(keras.optimizers.AdamW(2e-2, weight_decay=0.0), "mse")
model.fit({"inputs": x, "flix_features": ids}, y, batch_size=64, epochs=15, verbose=0)

with tempfile.TemporaryDirectory() as folder:
    # The signature takes weights, too, for soft compositions; export(folder) alone leaves them out.
    model.export(folder, verbose=False, input_signature=[model.input_specs(weights=True)])
    served = tf.saved_model.load(folder).signatures["serving_default"]  # knows nothing of flix
print("inputs:", sorted(served.structured_input_signature[1]))


def ask(x, rows, **options):
    """What a client sends: the batch, and each row's composition as ids and weights."""
    routing = registry.encode(rows, **options)
    given = {"inputs": x, "flix_features": routing.ids, "flix_weights": routing.weights}
    (answer,) = served(**{name: tf.constant(value) for name, value in given.items()}).values()
    return answer.numpy()


mixed = [{"task": "double"}, {"task": "negate"}, {"task": "reverse"}]
wanted = np.stack([2 * x[0], -x[1], x[2, ::-1]])
print(f"a mixed batch: mean error {np.abs(ask(x[:3], mixed) - wanted).mean():.3f}")
both = ask(x[:1], [{"task": {"double": 0.5, "negate": 0.5}}])
direct = model({"inputs": x[:1], "flix_features": [[0, 1]], "flix_weights": [[0.5, 0.5]]})
print(f"weighted, and wider: largest difference to the model {np.abs(both - direct).max():.1e}")
try:
    served(inputs=x[:1], flix_features=tf.constant([[3]]), flix_weights=tf.constant([[1.0]]))
except tf.errors.InvalidArgumentError as error:
    print("an id of no feature:", error.message.partition("assertion failed: ")[2][:70])
