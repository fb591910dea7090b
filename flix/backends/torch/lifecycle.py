"""Features over a model's life: they join, leave, get other names, and come from other people's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flix.backends.torch._change import apply_change, set_model_config
from flix.backends.torch._layer import FlixLayer
from flix.backends.torch.files import load_into, to_adapter
from flix.backends.torch.model import flix_layers, layer_shapes, require_adapted
from flix.backends.torch.switching import freeze, thaw
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.changes import plan_growth, plan_joining, plan_removal, plan_renaming
from flix.core.adapter.compatibility import check_fits
from flix.core.adapter.files import load_adapter
from flix.core.adapter.lowrank import resized_mean
from flix.core.config.layout import LayerLayout
from flix.core.features.registry import Feature
from flix.core.files import Path_
from flix.core.peft.importing import from_peft

Model = TypeVar("Model", bound=nn.Module)


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
    set_model_config(model, grown)


def remove_feature(model: nn.Module, group: str, name: str) -> None:
    """Remove one feature from an adapted model, in place; ids and values of the others stay.

    Its id stays reserved: routing that names it is an error, and ``add_feature`` of the same name takes it again.

    Raises:
        FeatureError: no such feature, or the last of its group.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "remove_feature")
    apply_change(model, plan_removal(config, group, name))


def rename_feature(model: nn.Module, group: str, name: str, new: str) -> None:
    """Give one feature of an adapted model another name, in place; its id, values and parameters stay.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "rename_feature")
    apply_change(model, plan_renaming(config, group, name, new))


def load_features(
    model: nn.Module,
    source: Path_ | Adapter,
    features: Any = None,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    freeze_others: bool = False,
) -> tuple[Feature, ...]:
    """Take features of another adapter into an adapted model, in place.

    The model's ids and values stay. Layers that the other adapter adapts and this model does not become adapted.

    Args:
        model: an adapted model.
        source: an adapter's folder, or an adapter.
        features: ``[(group, name), ...]`` or ``{group: name or names}``; what they imply comes, too. Default: all.
        conflicts: what to do about features that both have and that differ: ``"error"``; ``"keep"`` the model's;
            ``"replace"`` them.
        rename: translates the adapter's layer paths to the model's.
        freeze_others: let only what came in train.

    Returns:
        The features that came in.

    Raises:
        FeatureError: an unknown feature.
        AdapterError: a damaged file, features that differ, or an adapter for another architecture.
        TargetError: the model is not adapted.
    """
    require_adapted(model, "load_features")
    adapter = (
        source.renamed(rename) if isinstance(source, Adapter) else load_adapter(source, rename)
    )
    check_fits(adapter, layer_shapes(model))
    change = plan_joining(to_adapter(model), adapter, features, conflicts=conflicts)
    apply_change(model, change)
    if freeze_others:
        thaw(model)
        if change.kept:
            freeze(model, list(change.kept))
    return change.arriving


def import_peft(
    model: Model,
    folders: Mapping[str, Path_],
    group: str,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    skip_modules: bool = False,
    strategy: str = "auto",
) -> Model:
    """Make features of LoRAs that PEFT wrote, in place: each becomes one, together they are a group.

    A plain model is adapted, exactly in the LoRAs' layers; into an adapted one they come as by :func:`load_features`.

    Args:
        model: a plain or adapted model, of the kind that the LoRAs were trained on.
        folders: the folder of each LoRA, by the name that its feature gets: ``{"ner": "loras/ner"}``.
        group: the group that they belong to; it may exist.
        conflicts: as for :func:`load_features`.
        rename: translates the LoRAs' layer paths to the model's.
        skip_modules: leave out whole modules that were trained beside a LoRA, instead of refusing them.
        strategy: as for ``adapt``, for a plain model.

    Returns:
        The same model.

    Raises:
        AdapterError: a folder that holds no plain LoRA, or one for another architecture.
        FeatureError: an ill-formed name.
    """
    adapter = from_peft(folders, group, skip_modules=skip_modules).renamed(rename)
    if next(flix_layers(model), None) is None:
        return load_into(model, adapter, strategy=strategy)
    load_features(model, adapter, conflicts=conflicts)
    return model


def _values(layer: FlixLayer, feature: Feature) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = layer.flix_A[feature], layer.flix_B[feature]
    return a.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()
