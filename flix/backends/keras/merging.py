"""One composition folded into a plain model."""

from __future__ import annotations

from itertools import chain
from typing import Any

import keras
import numpy as np

from flix.backends.keras import quantised
from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.base import set_trainable_flags
from flix.backends.keras.engine import engine
from flix.backends.keras.parameters import is_table, kernel_of, values_of
from flix.backends.keras.patches.classes import plain
from flix.backends.keras.paths import flix_layers, named_layers
from flix.backends.protocol import Updates
from flix.core.adapter.composition import Composition
from flix.core.errors import TargetError


def dequantized(model: Any, active: Composition, update: Updates) -> Any:
    """As :func:`merged`, with plain layers in the place of the adapted ones that are quantised."""
    return merged(model, active, update, dequantize=True)


def merged(model: Any, active: Composition, update: Updates, *, dequantize: bool = False) -> Any:
    """A plain copy of the base with an update added to each adapted layer's kernel; no flix layer is left.

    The copy is made from the base's configuration, so a subclassed base needs ``get_config`` (as it does for
    ``save``), if its constructor takes arguments.

    Raises:
        TargetError: the base cannot be copied; a kernel is quantised, and no plain layers are asked for.
    """
    layers = dict(flix_layers(model.base))
    whole = {path for path, layer in layers.items() if layer.quantization_mode is not None}
    if whole and not dequantize:
        path = next(path for path in layers if path in whole)
        raise quantised.refused(path, layers[path])
    merged = _copy(model)
    copies = dict(named_layers(merged))
    for path, layer in layers.items():
        added = layer.form_of(layer).unflatten(update(path).T)
        if path in whole:
            quantised.make_plain(copies[path], quantised.dequantised(layer) + added)
            continue
        kernel = kernel_of(copies[path])
        kernel.assign(values_of(kernel).astype(np.float64) + added)
    set_trainable_flags(merged, model.flix_state.flags)
    return merged


def _copy(model: FlixModel) -> Any:
    """The base as a plain model with the base's weights."""
    base = model.base
    classes = {
        type(x).__name__: type(x) for x in (base, *(layer for _, layer in named_layers(base)))
    }
    with plain(layer for _, layer in flix_layers(base)):
        description = keras.saving.serialize_keras_object(base)
    with keras.saving.custom_object_scope(classes):
        copy = keras.saving.deserialize_keras_object(description)
    if not copy.built and model.flix_state.specs is not None:
        copy(keras.tree.map_structure(engine.zeros, model.flix_state.specs))
    quantised.restore(named_layers(copy), quantised.facts(named_layers(base)))
    olds, news = _variables(base), _variables(copy)
    shapes = [[[tuple(v.shape) for v in own] for own in layers] for layers in (olds, news)]
    if not copy.built or shapes[0] != shapes[1]:
        raise TargetError(
            f"{type(base).__name__} cannot be copied from its configuration: its get_config and "
            "from_config must make the same layers, and it must be built or have been called"
        )
    for old, new in zip(chain(*olds), chain(*news), strict=True):
        new.assign(
            keras.ops.copy(old)
        )  # JAX gives the very array, which `fit` and `predict` of either would donate
    return copy


def _variables(model: Any) -> list[list[Any]]:
    """The variables of the model itself and of each layer, but the tables, in the order in which they were made.

    Those of a quantised layer by name: they are in another order where Keras quantised a layer that it had built.
    """
    found = []
    for layer in (model, *(layer for _, layer in named_layers(model))):
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        own = [v for v in own if not is_table(v)]
        quantized = getattr(layer, "quantization_mode", None) is not None
        found.append(sorted(own, key=lambda v: v.name) if quantized else own)
    return found
