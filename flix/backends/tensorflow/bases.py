"""The base that a model's adapter is trained on, as files know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends.tensorflow.adapt import FlixModel
from flix.backends.tensorflow.layers import FlixLayer, adaptable
from flix.backends.tensorflow.parameters import kernel_of
from flix.backends.tensorflow.paths import named_layers
from flix.core.adapter.base import Places


def base_name(model: Any) -> tuple[str | None, str | None]:
    """Keras models have none that tells where they came from."""
    return None, None


def kernel_samples(model: Any, places: Mapping[str, Places]) -> dict[str, NDArray[Any]] | None:
    """Values of kernels; None where one is quantised."""
    layers = dict(named_layers(model.base if isinstance(model, FlixModel) else model))
    found = {}
    for path, where in places.items():
        layer = layers[path]
        kind = type(layer) if isinstance(layer, FlixLayer) else adaptable(layer)[0]
        value = tf.convert_to_tensor(kernel_of(layer).value)
        if kind is None or not value.dtype.is_floating:
            return None
        index = np.stack(kind.form_of(layer).at(where.rows, where.columns), 1)
        found[path] = tf.cast(tf.gather_nd(value, index), tf.float64).numpy()
    return found
