"""Features over a model's life: a new language or task joins a trained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flix.backends.torch._layer import FlixLayer
from flix.backends.torch.model import RoutedModel, flix_layers, require_adapted
from flix.core.factors import resized_mean
from flix.core.layout import LayerLayout
from flix.core.lifecycle import plan_growth
from flix.core.registry import Feature


def add_feature(
    model: nn.Module,
    group: str,
    name: str,
    rank: int | None = None,
    *,
    init_from: str | Sequence[str] | None = None,
    freeze_others: bool = True,
    alpha: float | None = None,
    implies: Sequence[Feature] = (),
) -> None:
    """Add one feature to an adapted model, in place; ids and values of the others stay.

    Args:
        model: an adapted model.
        group: a group of its registry.
        name: the new feature.
        rank: its rank in every layer; default: that of ``init_from``.
        init_from: None for fresh values (the update starts at zero), or features of the group whose update (for
            several: the mean of whose updates) the new one starts from, as near as its rank allows.
        freeze_others: let only the new feature train.
        alpha: its alpha; default: the configuration's rule.
        implies: features that it implies.

    Raises:
        FeatureError: an unknown group or source, or a name that exists already.
        RankError: no rank and nothing to take it from.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "add_feature")
    growth = plan_growth(
        config, group, name, rank, init_from=init_from, alpha=alpha, implies=implies
    )
    grown, feature, origins = growth.config, growth.feature, growth.origins
    layouts: dict[LayerLayout, LayerLayout] = {}
    for path, layer in flix_layers(model):
        layout = grown.layout(path)
        layer.set_config(grown, layouts.setdefault(layout, layout))
        layer.add_pair(feature)
        if freeze_others:
            for other, a, b in layer.pairs():
                a.requires_grad_(other == feature)
                b.requires_grad_(other == feature)
        if feature not in layer.flix_A or not origins:
            continue
        pairs = [_values(layer, origin) for origin in origins if origin in layer.flix_A]
        scales = [grown.scale(path, origin) for origin in origins if origin in layer.flix_A]
        if pairs:
            target_a, target_b = layer.flix_A[feature], layer.flix_B[feature]
            fresh = target_a.detach().double().cpu().numpy()
            scale = grown.scale(path, feature)
            a, b = resized_mean(pairs, scales, fresh, scale, len(origins))  # type: ignore[assignment]
            with torch.no_grad():
                target_a.copy_(torch.from_numpy(a))
                target_b.copy_(torch.from_numpy(b))
    for module in model.modules():
        if isinstance(module, RoutedModel):
            module.flix_config = grown
            vars(module).pop("flix_last", None)
            present = module.flix_present
            module.flix_present = present.new_zeros(len(grown.registry) + 1)


def _values(layer: FlixLayer, feature: Feature) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = layer.flix_A[feature], layer.flix_B[feature]
    return a.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()
