"""A base model seen from outside: its inputs, its layers, what trains in it, and what it was before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from flix.backends.tensorflow._layer import FlixLayer, is_table
from flix.backends.tensorflow._paths import named_layers
from flix.backends.tensorflow.layers import adaptable
from flix.core.adapter.adapter import LayerShape
from flix.core.config.targets import LayerInfo, is_head

INPUTS, FEATURES, WEIGHTS = "inputs", "flix_features", "flix_weights"


def split_inputs(inputs: Any, base: Any) -> tuple[Any, Any, Any]:
    """(the base's own inputs, features or None, weights or None)."""
    if not isinstance(inputs, dict):
        return inputs, None, None
    own = {k: v for k, v in inputs.items() if k not in (FEATURES, WEIGHTS)}
    if set(own) == {INPUTS} and not isinstance(symbolic_inputs(base), dict):
        own = own[INPUTS]
    return own, inputs.get(FEATURES), inputs.get(WEIGHTS)


def symbolic_inputs(base: Any) -> Any:
    """The inputs of a functional or sequential model as it was built from them; None of a subclassed one."""
    return getattr(getattr(base, "_functional", None) or base, "_inputs_struct", None)


def specs_of(own: Any) -> Any:
    """Inputs as ``tf.TensorSpec`` for batches of any size."""

    def spec(x: Any) -> Any:
        shape = [None, *x.shape[1:]] if len(x.shape) else []
        return tf.TensorSpec(shape, tf.as_dtype(x.dtype), name=getattr(x, "name", None))

    try:
        return keras.tree.map_structure(spec, own)
    except (AttributeError, TypeError):
        return None


def flix_layers(base: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer inside a model, in the model's order."""
    for path, layer in named_layers(base):
        if isinstance(layer, FlixLayer):
            yield path, layer


def layer_infos(base: Any) -> list[LayerInfo]:
    """Every layer of a model as the target rules see it."""
    infos = []
    for path, layer in named_layers(base):
        target: Any = type(layer) if isinstance(layer, FlixLayer) else None
        reason = ""
        if target is None:
            target, reason = adaptable(layer)
        sizes = (0, 0)
        if target is not None:
            sizes = target.sizes_of(layer)
        kind = target.flix_kind if target is not None else ""
        infos.append(LayerInfo(path, kind, sizes[0], sizes[1], is_head(path), reason))
    return infos


def layer_shapes(base: Any) -> dict[str, LayerShape]:
    """Kind and sizes of every layer that is adapted or could be."""
    return {
        info.path: LayerShape(d_in=info.d_in, d_out=info.d_out, kind=info.kind)
        for info in layer_infos(base)
        if info.kind
    }


def forget_traces(model: Any) -> None:
    """Drop compiled functions of a model that were traced before its layers changed."""
    model.train_function = model.test_function = model.predict_function = None


def trainable_flags(base: Any) -> str:
    """Which layers are trainable, the model first, as a string of 0 and 1."""
    return "".join(str(int(layer.trainable)) for layer in _tree(base))


def set_trainable_flags(base: Any, flags: str) -> None:
    """Set what :func:`trainable_flags` gave; the kernels of adapted layers stay frozen, their tables do not."""
    for layer, flag in zip(_tree(base), flags, strict=True):
        layer._trainable = flag == "1"
        adapted = isinstance(layer, FlixLayer)
        for variable in layer._trainable_variables:
            variable.trainable = is_table(variable) if adapted else flag == "1"


def _tree(base: Any) -> list[Any]:
    return [base, *(layer for _, layer in named_layers(base))]


_plain_lock = threading.RLock()


@contextmanager
def plain(base: Any) -> Iterator[None]:
    """Inside, the adapted layers of a model have their plain classes, so that its configuration is the plain one's."""
    with _plain_lock:
        layers = [(layer, type(layer)) for _, layer in flix_layers(base)]
        for layer, cls in layers:
            layer.__class__ = cls.flix_base
        try:
            yield
        finally:
            for layer, cls in layers:
                layer.__class__ = cls
