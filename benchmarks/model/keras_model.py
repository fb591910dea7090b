"""A whole Keras model on TensorFlow: a training step and a forward of a mixed batch, flix beside ``enable_lora``.

A decoder of transformer blocks with random weights; every Dense layer of the blocks is adapted. Keras's LoRA is one for
the whole batch: it cannot route rows, and is here as the cost of equal arithmetic. The step is Keras's own
(``train_on_batch``), without XLA, with one thread.

    python -m benchmarks.model.keras_model [--smoke]
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from benchmarks.common import Arm, Result, Table, environment, figure, interleave, over
from benchmarks.guards import guard
from benchmarks.layer.tensorflow_layer import one_thread
from benchmarks.model.problem import LORA_RANK, MixedBatch, randomized
from flix.backends.tensorflow import adapt, load_into, merge, to_adapter

PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy")
FROZEN, FLIX = "frozen model", "**flix**"
LORA = f"Keras `enable_lora({LORA_RANK})`, one for all rows"
RATE = 1e-12
"""Far too small to change the model: every round computes the same."""


@keras.saving.register_keras_serializable("flix-benchmarks")
class Attention(layers.Layer):
    """Causal attention over queries, keys and values that Dense layers have made; no weights of its own."""

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}

    def call(self, q: Any, k: Any, v: Any) -> Any:
        batch, length, d = ops.shape(q)[0], q.shape[1], q.shape[2]
        split = (batch, length, self.heads, d // self.heads)
        q, k, v = (ops.transpose(ops.reshape(x, split), (0, 2, 1, 3)) for x in (q, k, v))
        scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / (d // self.heads) ** 0.5
        hidden = np.triu(np.full((length, length), -1e9, np.float32), 1)
        out = ops.matmul(ops.softmax(scores + hidden), v)
        return ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (batch, length, d))


def decoder(
    d: int, heads: int, blocks: int, vocabulary: int, length: int, embedded: bool = False
) -> keras.Model:
    """Token ids, or embeddings, to logits; the same weights every time."""
    keras.utils.set_random_seed(0)
    if embedded:
        x = inputs = keras.Input((length, d))
    else:
        inputs = keras.Input((length,), dtype="int32")
        x = layers.Embedding(vocabulary, d, name="embed")(inputs)
    for i in range(blocks):
        h = layers.LayerNormalization(name=f"norm{i}")(x)
        q, k, v = (layers.Dense(d, name=f"{which}{i}")(h) for which in "qkv")
        x = x + layers.Dense(d, name=f"o{i}")(Attention(heads, name=f"attention{i}")(q, k, v))
        h = layers.LayerNormalization(name=f"norm_ff{i}")(x)
        h = layers.Dense(4 * d, activation="gelu", name=f"up{i}")(h)
        x = x + layers.Dense(d, name=f"down{i}")(h)
    x = layers.LayerNormalization(name="norm_last")(x)
    logits = layers.Dense(vocabulary, use_bias=False, name="lm_head")(x)
    return keras.Model(inputs, logits)


def _loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _compile(model: keras.Model) -> keras.Model:
    model.compile(keras.optimizers.AdamW(RATE), _loss(), jit_compile=False)
    return model


def flix_model(base: keras.Model, batch: MixedBatch) -> keras.Model:
    """The model adapted by flix, with updates that are not zero."""
    model = adapt(base, batch.config)
    return _compile(load_into(model, randomized(to_adapter(model))))


def lora_model(base: keras.Model) -> keras.Model:
    """The same layers with Keras's own LoRA, and nothing else trained."""
    rng = np.random.default_rng(1)
    for layer in base.layers:
        if not isinstance(layer, layers.Dense) or layer.name == "lm_head":
            layer.trainable = False
            continue
        layer.enable_lora(LORA_RANK)
        layer.bias.trainable = False
        b = layer.lora_kernel_b
        b.assign(rng.normal(size=b.shape) * 0.02)
    return _compile(base)


def _frozen_step(model: keras.Model) -> Any:
    loss = _loss()

    @tf.function
    def step(x: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(labels, model(x, training=True))
        return value, tape.gradient(value, x)

    return step


def _moments(model: keras.Model) -> dict[str, Any]:
    """The sums of squared gradients that AdamW keeps: they are zero where no gradient came through."""
    return {v.path: v.numpy() for v in model.optimizer.variables if "velocity" in v.path}


def _trained_step(name: str, model: keras.Model, inputs: Any, labels: Any) -> Arm:
    def results(loss: Any) -> dict[str, Any]:
        return {"loss": np.asarray(loss), **_moments(model)}

    return Arm(name, lambda: model.train_on_batch(inputs, labels), results)


def _forward(name: str, model: keras.Model, inputs: Any) -> Arm:
    call = tf.function(lambda given: model(given, training=False))
    return Arm(name, lambda: call(inputs).numpy(), lambda out: {"y": out})


def _composed_loss(model: keras.Model, batch: MixedBatch, tokens: Any) -> float:
    """The mixed batch's loss from plain models, one merged for each composition."""
    total = 0.0
    for row, numbers in batch.groups.items():
        part = tokens[np.asarray(numbers)]
        total += float(_loss()(part, merge(model, dict(row))(part))) * len(numbers)
    return total / len(batch.rows)


def guarded_arms(smoke: bool = False) -> tuple[list[Arm], list[Arm], str]:
    """The candidates of a training step and of a forward, each guarded; and what they are, in words."""
    d, heads, blocks, vocabulary, length = (32, 2, 1, 64, 8) if smoke else (512, 8, 6, 8192, 64)
    sizes = (d, heads, blocks, vocabulary, length)
    batch = MixedBatch(4, 2) if smoke else MixedBatch()
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, vocabulary, (len(batch.rows), length)).astype(np.int32)
    x = tf.constant(rng.normal(size=(*tokens.shape, d)).astype(np.float32))
    frozen = decoder(*sizes, embedded=True)
    frozen.trainable = False
    flix, lora = flix_model(decoder(*sizes), batch), lora_model(decoder(*sizes))
    composed = _composed_loss(flix, batch, tokens)
    routed = {"inputs": tokens, "flix_features": batch.ids}
    step = _frozen_step(frozen)
    arms = [
        Arm(
            FROZEN,
            lambda: [part.numpy() for part in step(x, tokens)],
            lambda out: {"loss": out[0], "dx": out[1]},
        ),
        _trained_step(FLIX, flix, routed, tokens),
        _trained_step(LORA, lora, tokens, tokens),
    ]
    guard(arms[0], ("loss", "dx"))
    for arm, model, loss in ((arms[1], flix, np.float64(composed)), (arms[2], lora, None)):
        arm.run()  # makes the optimizer's variables
        names = list(_moments(model))
        assert names, "the optimizer's moments were not found"
        guard(arm, {"loss": loss, **dict.fromkeys(names)})
    plain = decoder(*sizes)
    forwards = [
        _forward(FROZEN, plain, tf.constant(tokens)),
        _forward(FLIX, flix, {name: tf.constant(value) for name, value in routed.items()}),
        _forward(LORA, lora, tf.constant(tokens)),
    ]
    for arm in forwards:
        guard(arm, ("y",))
    said = (
        f"A decoder of {blocks} blocks, d = {d}, vocabulary {vocabulary:,}; {batch.describe()}; "
        f"{length} positions."
    )
    return arms, forwards, said


def suite(smoke: bool = False) -> Result:
    """The Keras model's part of the benchmark."""
    one_thread()
    rounds, limit = (1, 5.0) if smoke else (15, 40.0)
    arms, forwards, said = guarded_arms(smoke)
    times = interleave(arms, rounds, limit=limit)
    alone = interleave(forwards, rounds, limit=limit / 2)
    trained, ran = over(times, FROZEN), over(alone, FROZEN)
    rows = [
        [
            arm.name,
            figure([t * 1e3 for t in times[arm.name]]),
            trained[arm.name],
            figure([t * 1e3 for t in alone[arm.name]]),
            ran[arm.name],
        ]
        for arm in arms
    ]
    head = ["", "training step, ms", "over frozen", "forward, ms", "over frozen"]
    result = Result("model-keras", "A whole model: Keras", environment=environment(PACKAGES))
    result.method = (
        f"{said} The step is `train_on_batch` with AdamW, without XLA; the frozen model's is a forward and a backward to "
        "the embeddings. Keras's LoRA cannot route rows."
    )
    result.tables.append(Table("A training step and a forward, Keras", head, rows))
    return result


if __name__ == "__main__":
    from benchmarks.report import section

    print(section(suite("--smoke" in sys.argv).to_dict()))
