"""A base model as the target rules see it."""

import keras

from flix.backends.keras.base import layer_infos
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt
from tests.helpers.registry import config


def test_all_linear_leaves_out_heads_and_embeddings():
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(5, 4, name="emb")(inputs)
    x = keras.layers.Dense(4, name="a")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="lm_head")(x))
    model = adapt(model, config(target_modules="all-linear"))
    assert [path for path, _ in flix_layers(model.base)] == ["a"]
    assert [i.kind for i in layer_infos(model.base)] == ["embedding", "linear", "linear"]
