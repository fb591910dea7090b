"""The base that a model's adapter is trained on, as files know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import backend, ops
from numpy.typing import NDArray

from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.layers import FlixLayer, adaptable
from flix.backends.keras.parameters import kernel_of
from flix.backends.keras.paths import named_layers
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
        value = ops.convert_to_tensor(kernel_of(layer).value)
        if kind is None or not backend.is_float_dtype(backend.standardize_dtype(value.dtype)):
            return None
        at = np.ravel_multi_index(kind.form_of(layer).at(where.rows, where.columns), value.shape)
        taken = ops.take(ops.reshape(value, (-1,)), at.astype(np.int32))
        found[path] = np.asarray(ops.convert_to_numpy(taken)).astype(np.float64)
    return found
