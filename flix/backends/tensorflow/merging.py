"""One composition folded into a plain model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from flix.backends.tensorflow._base import flix_layers, plain, set_trainable_flags
from flix.backends.tensorflow._layer import is_table
from flix.backends.tensorflow._paths import named_layers
from flix.backends.tensorflow.files import to_adapter
from flix.backends.tensorflow.layers import FlixEinsumDense
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.core.adapter.composition import composition, delta
from flix.core.errors import TargetError
from flix.core.features.encoding import Row


def merge(model: FlixModel, row: Row) -> Any:
    """A plain copy of the base model with one composition folded into its kernels; no flix layer is left.

    The copy is made from the base's configuration, so a subclassed base needs ``get_config`` (as it does for
    ``save``), if its constructor takes arguments.

    Args:
        model: an adapted model; it is not changed.
        row: the composition, ``{group: name | [names] | {name: weight}}``.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: the model is not adapted, or its base cannot be copied.
    """
    active = composition(require_adapted(model, "merge"), row)
    adapter = to_adapter(model)
    merged = _copy(model)
    copies = dict(named_layers(merged))
    for path, layer in flix_layers(model.base):
        update = delta(adapter, path, active)  # [d_out, d_in]
        copy = copies[path]
        kernel = copy._embeddings if layer.flix_kind == "embedding" else copy._kernel
        value = kernel.numpy().astype(np.float64)
        if isinstance(layer, FlixEinsumDense):
            order = layer.flix_map.kernel_order
            shape = [value.shape[i] for i in order]
            value += update.T.reshape(shape).transpose(np.argsort(order))
        else:
            value += update.T
        kernel.assign(value)
    set_trainable_flags(merged, model.flix_flags)
    return merged


def _copy(model: FlixModel) -> Any:
    """The base as a plain model with the base's weights."""
    base = model.base
    classes = {type(layer).__name__: type(layer) for layer in (base, *_layers(base))}
    with plain(base):
        description = keras.saving.serialize_keras_object(base)
    with keras.saving.custom_object_scope(classes):
        copy = keras.saving.deserialize_keras_object(description)
    if not copy.built and model.flix_specs is not None:
        copy(keras.tree.map_structure(lambda s: _zeros(s), model.flix_specs))
    pairs = list(zip((base, *_layers(base)), (copy, *_layers(copy)), strict=False))
    same = len(_layers(base)) == len(_layers(copy)) and copy.built
    for old, new in pairs if same else ():
        values = [v for v in _own(old) if not is_table(v)]
        same = same and [tuple(v.shape) for v in values] == [tuple(v.shape) for v in _own(new)]
        if same:
            for value, variable in zip(values, _own(new), strict=True):
                variable.assign(value)
    if not same:
        raise TargetError(
            f"{type(base).__name__} cannot be copied from its configuration: its get_config and "
            "from_config must make the same layers, and it must be built or have been called"
        )
    return copy


def _zeros(spec: Any) -> Any:
    return np.zeros([1 if size is None else size for size in spec.shape], spec.dtype.as_numpy_dtype)


def _layers(model: Any) -> list[Any]:
    return [layer for _, layer in named_layers(model)]


def _own(layer: Any) -> list[Any]:
    """A layer's own variables, in the order in which it made them."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
