"""A base model seen from outside: its inputs, its layers, what trains in it, and what Keras has traced of it."""

from __future__ import annotations

from typing import Any

import keras

from flix.backends.keras.engine import engine
from flix.backends.keras.layers import FlixLayer, adaptable
from flix.backends.keras.parameters import is_table
from flix.backends.keras.paths import named_layers
from flix.core.adapter.adapter import LayerShape
from flix.core.config.targets import LayerInfo, is_head


def specs_of(own: Any) -> Any:
    """Inputs as the engine describes them, for batches of any size."""
    try:
        return keras.tree.map_structure(engine.spec, own)
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
    kind = engine.Kind(model.flix_state)
    for part in (model, *(layer for _, layer in named_layers(model))):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            vars(part).pop("flix_functions", None)
        if part is not model:
            engine.tell_apart(part, kind)


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
