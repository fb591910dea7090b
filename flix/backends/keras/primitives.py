"""The seam (:class:`flix.backends.protocol.Backend`), carried out on Keras models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras

from flix.backends import messages
from flix.backends.keras.adapt import FlixModel, attach, attach_layers
from flix.backends.keras.base import forget_traces, layer_infos
from flix.backends.keras.bases import base_name, kernel_samples
from flix.backends.keras.engine import engine
from flix.backends.keras.heads import head_places, heads, put_heads
from flix.backends.keras.merging import dequantized, merged
from flix.backends.keras.parameters import by_id, is_table
from flix.backends.keras.paths import flix_layers
from flix.backends.protocol import Counts, Pairs
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import Change
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo
from flix.core.errors import TargetError
from flix.core.features.names import Feature
from flix.core.features.search import Ask, BatchLoss


def check_plain(model: Any) -> None:
    """A Keras model, built, without adapted layers."""
    if not isinstance(model, keras.Model):
        raise TargetError(f"adapt needs a keras.Model, got {type(model).__name__}")
    if next(flix_layers(model), None) is not None:
        raise messages.adapted_already()
    if not model.built:
        raise TargetError(
            f"{type(model).__name__} is not built yet, so its layers have no kernels; call it on a batch "
            "(or give it an Input) before it is adapted"
        )


def layers(model: Any) -> list[LayerInfo]:
    """By dotted paths; see :mod:`flix.backends.keras.paths`."""
    return layer_infos(model.base if isinstance(model, FlixModel) else model)


def adapted(model: Any) -> FlixConfig | None:
    """The configuration of a FlixModel."""
    return model.flix_config if isinstance(model, FlixModel) else None


def shapes(model: FlixModel) -> dict[str, LayerShape]:
    """Of the adapted layers."""
    return {path: layer.layer_shape for path, layer in flix_layers(model.base)}


def read(model: FlixModel, features: Collection[Feature] | None = None) -> Pairs:
    """Each table of each layer is read once."""
    registry = model.flix_config.registry
    ids = None if features is None else [registry.id(*feature) for feature in features]
    return {
        path: {registry.features[i]: pair for i, pair in layer.values(ids).items()}
        for path, layer in flix_layers(model.base)
    }


def write(model: Any, pairs: Pairs) -> Any:
    """The variables stay, and with them what was compiled and an optimizer's state."""
    for path, layer in flix_layers(model.base):
        if path in pairs:
            layer.set_values(by_id(model.flix_config.registry, pairs[path]))
    return model


def change(model: Any, change: Change) -> Any:
    """Where every row of a layer's tables stays, its variables do, and with them the state of an optimizer.

    Where variables are made anew, the model counts as not compiled.
    """
    state, present = model.flix_state, dict(flix_layers(model.base))
    registry = change.config.registry
    kept = {registry.id(*feature) for feature in change.kept}  # the ids that they had before, too
    fresh = {path for path in change.layers if path not in present}
    state.config = change.config
    state.frozen = tuple(i for i in state.frozen if i in kept)
    remade = bool(fresh)
    for path, layout in change.config.layouts(present).items():
        layer, values = present[path], by_id(registry, change.pairs(path))
        same = layout.ranks == layer.flix_layout.ranks and not values
        if not same:
            values.update({i: pair for i, pair in layer.values().items() if i in kept})
        layer.set_layout(layout)
        if not same:
            layer.make_tables(values)
            remade = True
    if fresh:
        strategy = next(iter(present.values())).flix_strategy
        attach_layers(model, dict.fromkeys(fresh, strategy), lambda path, shape: change.pairs(path))
    state.version += 1
    forget_traces(model)
    if remade:
        model.compiled = False
    return model


def frozen(model: FlixModel) -> tuple[Feature, ...]:
    """Kept in ``.keras`` files, too."""
    return tuple(model.flix_config.registry.features[i] for i in model.flix_state.frozen)


def set_frozen(model: Any, features: Collection[Feature]) -> Any:
    """A compiled model stays compiled, and its optimizer's state valid."""
    registry = model.flix_config.registry
    model.flix_state.frozen = tuple(sorted({registry.id(*feature) for feature in features}))
    for _, layer in flix_layers(model.base):
        layer.set_layout(layer.flix_layout)
    model.flix_state.version += 1
    forget_traces(model)
    return model


def parameters(model: FlixModel) -> list[Any]:
    """The layers' tables, and what was unfrozen by hand."""
    return list(model.trainable_variables)


def count(model: FlixModel) -> Counts:
    """Of the base."""

    def size(variables: list[Any]) -> int:
        return sum(math.prod(v.shape) for v in variables if not is_table(v))

    return Counts(total=size(model.variables), trainable=size(model.trainable_variables))


def asking(model: FlixModel, loss: BatchLoss) -> AbstractContextManager[Ask]:
    """The engine's, as slopes are the framework's."""
    return engine.asking(model, loss)


def undropped(layers: Mapping[str, LayerShape]) -> list[str]:
    """None: embeddings see their tokens whole, as PEFT's do."""
    return []


def switch(model: FlixModel, by: int) -> None:
    """What Keras traces is kept apart for a model that is off (:class:`FlixModel`)."""
    engine.switch(model.flix_state, by)


__all__ = [
    "adapted", "asking", "attach", "base_name", "change", "check_plain", "count", "dequantized", "frozen", "head_places",
    "heads", "kernel_samples", "layers", "merged", "parameters", "put_heads", "read", "set_frozen", "shapes", "switch",
    "undropped", "write",
]  # fmt: skip
