"""Layers for the planner's measurements (see :mod:`flix.core.strategy.calibrate`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends.tensorflow.layers import FlixDense
from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError
from flix.core.strategy.calibrate import Run
from flix.core.strategy.decide import Facts


def device_class() -> str:
    """The class of devices that is measured here."""
    return "tensorflow-gpu" if tf.config.list_physical_devices("GPU") else "tensorflow-cpu"


def use_threads(count: int | None) -> str:
    """Compute with some number of threads, if one is given; what is measured, in words.

    Raises:
        ConfigError: TensorFlow has started, with another number.
    """
    if count is not None:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(count)
            tf.config.threading.set_inter_op_parallelism_threads(count)
        except RuntimeError as error:
            raise ConfigError(f"the number of threads must come first: {error}") from error
    return f"tensorflow {tf.__version__}, {count or 'its own number of'} threads"


def make(config: FlixConfig, facts: Facts, ids: NDArray[np.int32], strategy: str | None) -> Run:
    """Forward and gradients of one layer in float32, in a tf.function; of the input and the batch's features."""
    rng = np.random.default_rng(0)
    shape = (facts.examples, facts.tokens)
    x = tf.constant(rng.normal(size=(*shape, facts.d_in)), tf.float32)
    dy = tf.constant(rng.normal(size=(*shape, facts.d_out)), tf.float32)
    kernel = tf.constant(rng.normal(size=(facts.d_in, facts.d_out)), tf.float32)
    layer = FlixDense(
        facts.d_out, use_bias=False, config=config, name="layer", strategy=strategy or "auto"
    )
    layer.build(x.shape)
    layer.kernel.assign(kernel)

    def forward(x: Any, ids: Any) -> Any:
        if strategy is not None:
            return layer(x, flix_features=ids)
        flat = tf.matmul(tf.reshape(x, [-1, facts.d_in]), kernel)
        return tf.reshape(flat, [*shape, facts.d_out])

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any, ids: Any, dy: Any) -> Any:
        wanted = [x] if strategy is None else [x, layer.flix_A, layer.flix_B]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x, ids)
        return y, tape.gradient(y, wanted, dy)

    routing = tf.constant(ids)

    def run() -> None:
        y, _ = step(x, routing, dy)
        y.numpy()

    return run
