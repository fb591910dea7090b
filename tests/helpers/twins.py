"""One small BERT three times: transformers' own in torch, and its twins in flax.nnx and Keras, with the same weights.

Their layers go by three kinds of paths; ``RENAMES`` translates between them.
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx
from transformers import BertConfig, BertModel

VOCABULARY, SIZE, HEADS, LAYERS, LENGTH = 50, 32, 4, 2, 12
# Each adapted layer of a block, by its path in torch and its name in the twins.
BLOCK = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "intermediate.dense": "up",
    "output.dense": "down",
}
PATHS = {
    "embeddings.word_embeddings": {"jax": "words", "tensorflow": "words"},
    **{
        f"encoder.layer.{i}.{path}": {"jax": f"blocks.{i}.{name}", "tensorflow": f"block{i}.{name}"}
        for i in range(LAYERS)
        for path, name in BLOCK.items()
    },
}
NAMES = {"torch": {path: path for path in PATHS}}
for _backend in ("jax", "tensorflow"):
    NAMES[_backend] = {path: names[_backend] for path, names in PATHS.items()}


def renames(source, target):
    """{path in one framework's twin: path in another's}."""
    return {NAMES[source][path]: NAMES[target][path] for path in PATHS}


def torch_model():
    """transformers' BERT; the embeddings of position and type, and the norms, are the framework's own."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=64, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def weights():
    """The base's weights, by torch's names."""
    return {name: value.numpy() for name, value in torch_model().state_dict().items()}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        for name in ("query", "key", "value", "mix"):
            setattr(self, name, nnx.Linear(SIZE, SIZE, rngs=rngs))
        self.up, self.down = nnx.Linear(SIZE, 64, rngs=rngs), nnx.Linear(64, SIZE, rngs=rngs)
        self.norm1 = nnx.LayerNorm(SIZE, epsilon=1e-12, rngs=rngs)
        self.norm2 = nnx.LayerNorm(SIZE, epsilon=1e-12, rngs=rngs)

    def __call__(self, x):
        q, k, v = (
            layer(x).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        p = jax.nn.softmax(q @ k.swapaxes(2, 3) / np.sqrt(SIZE // HEADS), -1)
        x = self.norm1(x + self.mix((p @ v).swapaxes(1, 2).reshape(x.shape)))
        return self.norm2(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class NnxBert(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(VOCABULARY, SIZE, rngs=rngs)
        self.offset = nnx.Variable(jnp.zeros((LENGTH, SIZE)))
        self.norm = nnx.LayerNorm(SIZE, epsilon=1e-12, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens):
        x = self.norm(self.words(tokens) + self.offset[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return x


def jax_model():
    """The twin in flax.nnx."""
    model, w = NnxBert(nnx.Rngs(0)), weights()
    kinds = w["embeddings.token_type_embeddings.weight"][0]
    model.offset[...] = jnp.asarray(w["embeddings.position_embeddings.weight"] + kinds)
    model.words.embedding[...] = jnp.asarray(w["embeddings.word_embeddings.weight"])
    _norm(model.norm, w, "embeddings.LayerNorm")
    for i, block in enumerate(model.blocks):
        for path, name in BLOCK.items():
            layer = getattr(block, name)
            layer.kernel[...] = jnp.asarray(w[f"encoder.layer.{i}.{path}.weight"].T)
            layer.bias[...] = jnp.asarray(w[f"encoder.layer.{i}.{path}.bias"])
        _norm(block.norm1, w, f"encoder.layer.{i}.attention.output.LayerNorm")
        _norm(block.norm2, w, f"encoder.layer.{i}.output.LayerNorm")
    return model


def _norm(layer, w, name):
    layer.scale[...], layer.bias[...] = jnp.asarray(w[f"{name}.weight"]), jnp.asarray(w[f"{name}.bias"])  # fmt: skip


class KerasBlock(keras.layers.Layer):
    def __init__(self, name):
        super().__init__(name=name)
        for part in ("query", "key", "value", "mix", "down"):
            setattr(self, part, keras.layers.Dense(SIZE, name=part))
        self.up = keras.layers.Dense(64, name="up")
        self.norm1 = keras.layers.LayerNormalization(epsilon=1e-12, name="norm1")
        self.norm2 = keras.layers.LayerNormalization(epsilon=1e-12, name="norm2")

    def call(self, x):
        shape = keras.ops.shape(x)
        q, k, v = (
            keras.ops.swapaxes(keras.ops.reshape(layer(x), (*shape[:2], HEADS, -1)), 1, 2)
            for layer in (self.query, self.key, self.value)
        )
        p = keras.ops.softmax(q @ keras.ops.swapaxes(k, 2, 3) / np.sqrt(SIZE // HEADS), -1)
        x = self.norm1(x + self.mix(keras.ops.reshape(keras.ops.swapaxes(p @ v, 1, 2), shape)))
        return self.norm2(x + self.down(keras.activations.gelu(self.up(x), approximate=False)))


class KerasBert(keras.Model):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.words = keras.layers.Embedding(VOCABULARY, SIZE, name="words")
        self.offset = self.add_weight(shape=(LENGTH, SIZE), name="offset")
        self.norm = keras.layers.LayerNormalization(epsilon=1e-12, name="norm")
        self.blocks = [KerasBlock(f"block{i}") for i in range(LAYERS)]

    def call(self, tokens):
        x = self.norm(self.words(tokens) + self.offset[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return x


def tensorflow_model():
    """The twin in Keras."""
    model, w = KerasBert(), weights()
    model(np.zeros((1, LENGTH), np.int32))
    kinds = w["embeddings.token_type_embeddings.weight"][0]
    model.offset.assign(w["embeddings.position_embeddings.weight"] + kinds)
    model.words.set_weights([w["embeddings.word_embeddings.weight"]])
    norms = [(model.norm, "embeddings.LayerNorm")]
    for i, block in enumerate(model.blocks):
        for path, name in BLOCK.items():
            kernel, bias = (w[f"encoder.layer.{i}.{path}.{part}"] for part in ("weight", "bias"))
            getattr(block, name).set_weights([kernel.T, bias])
        norms.append((block.norm1, f"encoder.layer.{i}.attention.output.LayerNorm"))
        norms.append((block.norm2, f"encoder.layer.{i}.output.LayerNorm"))
    for layer, name in norms:
        layer.set_weights([w[f"{name}.weight"], w[f"{name}.bias"]])
    return model
