"""A base model seen from outside: its inputs, its layers, what trains in it, and what Keras has traced of it."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from flix.backends.tensorflow.layers import FlixLayer, adaptable
from flix.backends.tensorflow.parameters import is_table
from flix.backends.tensorflow.patches import functions
from flix.backends.tensorflow.paths import named_layers
from flix.backends.tensorflow.routing import Kind
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


def layer_infos(base: Any) -> list[LayerInfo]:
    """Every layer of a model as the target rules see it; an adapted one as what it was."""
    infos = []
    for path, layer in named_layers(base):
        target, reason = (type(layer), "") if isinstance(layer, FlixLayer) else adaptable(layer)
        shape = target.shape_of(layer) if target else LayerShape(0, 0, "")
        infos.append(LayerInfo(path, shape.kind, shape.d_in, shape.d_out, is_head(path), reason))
    return infos


def forget_traces(model: Any) -> None:
    """Drop what an adapted model, and the layers inside, had compiled before something changed."""
    kind = Kind(model.flix_state)
    for part in (model, *(layer for _, layer in named_layers(model))):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            vars(part).pop("flix_functions", None)
        if part is not model:
            functions.tell_apart(part, kind)


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
