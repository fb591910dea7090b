"""Carrying out a :class:`flix.core.adapter.changes.Change` on an adapted model."""

from __future__ import annotations

import torch
from torch import nn

from flix.backends.torch._layer import FlixLayer
from flix.backends.torch.model import RoutedModel, attach_layers, flix_layers
from flix.core.adapter.changes import Change
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.features.names import Feature


def apply_change(model: nn.Module, change: Change) -> None:
    """Give a model's layers the features that the change says, in place.

    The parameters of kept features stay the objects they are, so that an optimizer's state stays with them.
    """
    layers = list(flix_layers(model))
    if change.layers:
        strategy = layers[0][1].flix_strategy
        attach_layers(model, change.config, list(change.layers), strategy)
    layouts: dict[LayerLayout, LayerLayout] = {}
    for path, layer in layers:
        before = {feature: (a, b) for feature, a, b in layer.pairs()}
        layout = change.config.layout(path)
        layer.set_config(change.config, layouts.setdefault(layout, layout))
        layer.flix_A.clear()
        layer.flix_B.clear()
        for feature, old in change.kept.items():
            if old in before:
                layer.flix_A.hold(feature, before[old][0])
                layer.flix_B.hold(feature, before[old][1])
    for path, layer in flix_layers(model):
        for feature in change.arriving:
            _arrive(layer, path, feature, change)
    set_model_config(model, change.config)


def _arrive(layer: FlixLayer, path: str, feature: Feature, change: Change) -> None:
    pair = change.pair(path, feature)
    if pair is None:
        return
    if feature not in layer.flix_A:
        layer.add_pair(feature)
    with torch.no_grad():
        for parameter, value in zip(
            (layer.flix_A[feature], layer.flix_B[feature]), pair, strict=True
        ):
            parameter.copy_(torch.from_numpy(value))


def set_model_config(model: nn.Module, config: FlixConfig) -> None:
    """Tell the model, and what it keeps between forwards, of another configuration."""
    for module in model.modules():
        if isinstance(module, RoutedModel):
            module.flix_config = config
            vars(module).pop("flix_last", None)
            module.flix_present = module.flix_present.new_zeros(len(config.registry) + 1)
            if (pager := vars(module).get("flix_pager")) is not None:
                pager.forget()
