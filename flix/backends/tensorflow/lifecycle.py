"""Features over a model's life: they join, leave, get other names, and come from other people's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flix.backends.tensorflow._base import flix_layers, layer_shapes
from flix.backends.tensorflow._change import apply_change, forget
from flix.backends.tensorflow.files import load_into, to_adapter
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.backends.tensorflow.switching import freeze, thaw
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.changes import plan_growth, plan_joining, plan_removal, plan_renaming
from flix.core.adapter.compatibility import check_fits
from flix.core.adapter.files import load_adapter
from flix.core.adapter.lowrank import resized_mean
from flix.core.config.layout import LayerLayout
from flix.core.features.registry import Feature
from flix.core.files import Path_
from flix.core.peft.importing import from_peft


def add_feature(
    model: FlixModel,
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

    The layers' tables are variables of a fixed size and are made anew, so the model must be compiled again, with a
    fresh optimizer, and functions traced by hand (``tf.function``) must be made again.

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
    number = grown.registry.id(*feature)  # not the last where a removed feature comes back
    others = tuple(i for i in range(len(grown.registry)) if i != number)
    layouts: dict[LayerLayout, LayerLayout] = {}
    for path, layer in flix_layers(model.base):
        pairs: dict[Feature, tuple[Any, Any]] = {f: (a, b) for f, a, b in layer.pairs()}
        layout = grown.layout(path)
        frozen = others if freeze_others else layer.flix_frozen
        layer.set_config(grown, layouts.setdefault(layout, layout), frozen)
        a_new, b_new = layer.fresh_a(feature), np.zeros((layer.d_out, grown.rank(path, feature)))
        known = [origin for origin in origins if origin in pairs]
        if known and len(a_new):
            a_new, b_new = resized_mean(
                [(pairs[o][0].astype(np.float64), pairs[o][1].astype(np.float64)) for o in known],
                [grown.scale(path, origin) for origin in known],
                a_new,
                grown.scale(path, feature),
                len(origins),
            )
        pairs[feature] = (a_new, b_new)
        layer.make_tables(
            {f: a for f, (a, _) in pairs.items()}, {f: b for f, (_, b) in pairs.items()}
        )
    model.flix_config = grown
    forget(model, remade=True)


def remove_feature(model: FlixModel, group: str, name: str) -> None:
    """Remove one feature from an adapted model, in place; ids and values of the others stay.

    Its id stays reserved: routing that names it is an error, and ``add_feature`` of the same name takes it again.
    Compile the model again afterwards, as after ``add_feature``.

    Raises:
        FeatureError: no such feature, or the last of its group.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "remove_feature")
    apply_change(model, plan_removal(config, group, name))


def rename_feature(model: FlixModel, group: str, name: str, new: str) -> None:
    """Give one feature of an adapted model another name, in place; its id and values stay.

    Its variables stay, too: a compiled model stays compiled, and its optimizer's state valid.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "rename_feature")
    apply_change(model, plan_renaming(config, group, name, new))


def load_features(
    model: FlixModel,
    source: Path_ | Adapter,
    features: Any = None,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    freeze_others: bool = False,
) -> tuple[Feature, ...]:
    """Take features of another adapter into an adapted model, in place.

    The model's ids and values stay. Layers that the other adapter adapts and this model does not become adapted.
    Compile the model again afterwards, as after ``add_feature``.

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
    check_fits(adapter, layer_shapes(model.base))
    change = plan_joining(to_adapter(model), adapter, features, conflicts=conflicts)
    apply_change(model, change)
    if freeze_others:
        thaw(model)
        if change.kept:
            freeze(model, list(change.kept))
    return change.arriving


def import_peft(
    model: Any,
    folders: Mapping[str, Path_],
    group: str,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    skip_modules: bool = False,
    strategy: str = "auto",
) -> FlixModel:
    """Make features of LoRAs that PEFT wrote: each becomes one, together they are a group.

    A plain model is adapted, exactly in the LoRAs' layers; into an adapted one they come as by :func:`load_features`.
    PEFT names layers as torch does, so a Keras model mostly needs ``rename``.

    Args:
        model: a plain or adapted Keras model with the weights that the LoRAs were trained on.
        folders: the folder of each LoRA, by the name that its feature gets: ``{"ner": "loras/ner"}``.
        group: the group that they belong to; it may exist.
        conflicts: as for :func:`load_features`.
        rename: translates the LoRAs' layer paths to the model's.
        skip_modules: leave out whole modules that were trained beside a LoRA, instead of refusing them.
        strategy: as for ``adapt``, for a plain model.

    Returns:
        The adapted model: around the plain model that was given, or the adapted one itself.

    Raises:
        AdapterError: a folder that holds no plain LoRA, or one for another architecture.
        FeatureError: an ill-formed name.
    """
    adapter = from_peft(folders, group, skip_modules=skip_modules).renamed(rename)
    if not isinstance(model, FlixModel):
        return load_into(model, adapter, strategy=strategy)
    load_features(model, adapter, conflicts=conflicts)
    return model
