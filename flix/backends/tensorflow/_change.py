"""Carrying out a :class:`flix.core.adapter.changes.Change` on an adapted Keras model."""

from __future__ import annotations

from typing import Any

from flix.backends.tensorflow._base import flix_layers, forget_traces
from flix.backends.tensorflow.model import FlixModel, attach_layers
from flix.core.adapter.changes import Change
from flix.core.config.layout import LayerLayout
from flix.core.features.names import Feature


def apply_change(model: FlixModel, change: Change) -> None:
    """Give a model's layers the features that the change says, in place.

    Where every row of a layer's tables stays, its variables do, and with them the state of an optimizer. Where
    variables are made anew, the model counts as not compiled.
    """
    layers = list(flix_layers(model.base))
    model.flix_config = change.config
    fresh = [path for path in change.layers or {} if path not in dict(layers)]
    if fresh:
        first = layers[0][1]
        frozen = [tuple(first.flix_frozen)] * len(fresh)
        attach_layers(model, fresh, [first.flix_strategy] * len(fresh), frozen)
    layouts: dict[LayerLayout, LayerLayout] = {}
    remade = bool(fresh)
    features = change.config.registry.features
    for path, layer in flix_layers(model.base):
        pairs: dict[Feature, Any] = {f: change.pair(path, f) for f in change.arriving}
        pairs = {feature: pair for feature, pair in pairs.items() if pair is not None}
        layout = change.config.layout(path)
        same = layout.ranks == layer.flix_layout.ranks and not pairs
        if not same:
            before = {f: (a, b) for f, a, b in layer.pairs()}
            pairs.update({f: before[old] for f, old in change.kept.items() if old in before})
        frozen_ids = tuple(i for i in layer.flix_frozen if features[i] in change.kept)
        layer.set_config(change.config, layouts.setdefault(layout, layout), frozen_ids)
        if not same:
            layer.make_tables(
                {feature: a for feature, (a, _) in pairs.items()},
                {feature: b for feature, (_, b) in pairs.items()},
            )
            remade = True
    forget(model, remade)


def forget(model: FlixModel, remade: bool = False) -> None:
    """Drop what was traced before a change; after variables were made anew, the compilation too."""
    forget_traces(model)
    forget_traces(model.base)
    if remade:
        model.compiled = False
