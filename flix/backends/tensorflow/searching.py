"""The loss of a model's examples under weights, and its slope, for ``search_weights``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends.keras.inputs import FEATURES, INPUTS, WEIGHTS, symbolic_inputs
from flix.core.features.search import Ask, BatchLoss


@contextmanager
def asking(model: Any, loss: BatchLoss) -> Iterator[Ask]:
    """See :class:`flix.backends.protocol.SupportsSearching`.

    Outputs are compiled; the loss is, too, where its slope is asked.
    """
    struct = symbolic_inputs(model.base)
    names = struct if isinstance(struct, dict) else {INPUTS}

    def called(batch: Mapping[str, Any], ids: Any, weights: Any) -> Any:
        own = {name: x for name, x in batch.items() if struct is None or name in names}
        return model({**own, FEATURES: ids, WEIGHTS: weights}, training=False)

    def sloping(batch: Mapping[str, Any], ids: Any, weights: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            value = loss(called(batch, ids, weights), batch)
        return value, tape.gradient(value, weights, unconnected_gradients="zero")

    outputs, slopes = tf.function(called), tf.function(sloping)

    def ask(
        batch: Mapping[str, Any], ids: NDArray[Any], weights: NDArray[Any], sloped: bool
    ) -> tuple[float, NDArray[np.float64] | None]:
        given = keras.tree.map_structure(tf.convert_to_tensor, dict(batch))
        point = tf.constant(ids), tf.constant(weights)
        if not sloped:
            return float(loss(outputs(given, *point), batch)), None
        value, slope = slopes(given, *point)
        return float(value), np.asarray(slope, np.float64)

    yield ask
