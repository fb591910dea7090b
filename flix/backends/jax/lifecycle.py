"""Features over a model's life: they join, leave, get other names, and come from other people's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from flix.backends.jax._change import apply_change, changed_bank, placed_like, put_bank
from flix.backends.jax.bank import Bank, host_pairs, make_spec, pack
from flix.backends.jax.files import Source, config_and_bank, load_into, to_adapter
from flix.backends.jax.model import flix_layers, layer_shapes
from flix.backends.jax.switching import freeze, thaw
from flix.core.adapter.adapter import Adapter, LayerShape, Rename
from flix.core.adapter.changes import (
    Change,
    Growth,
    plan_growth,
    plan_joining,
    plan_removal,
    plan_renaming,
)
from flix.core.adapter.compatibility import check_fits
from flix.core.adapter.files import load_adapter
from flix.core.adapter.initial import initial_a, initial_b
from flix.core.adapter.lowrank import resized_mean
from flix.core.features.registry import Feature
from flix.core.files import Path_
from flix.core.peft.importing import from_peft


def add_feature(
    source: Source,
    group: str,
    name: str,
    rank: int | None = None,
    *,
    init_from: str | Sequence[str] | None = None,
    freeze_others: bool = True,
    alpha: float | None = None,
    implies: Sequence[Feature] = (),
) -> Any:
    """Add one feature; ids and values of the others stay. An adapted nnx model is changed in place.

    The tables grow, so optimizer state made before does not fit any more: make a new optimizer. Frozen features get no
    gradient, and ``FlixOptimizer``, ``mask_absent`` and ``sparse_update`` leave them bit-identical; a bare optax
    optimizer with weight decay would shrink them.

    Args:
        source: an adapted model, or ``(config, bank)``.
        group: a group of its registry.
        name: the new feature.
        rank: its rank in every layer; default: that of ``init_from``.
        init_from: None for fresh values (the update starts at zero), or features of the group whose update (for
            several: the mean of whose updates) the new one starts from, as near as its rank allows.
        freeze_others: let only the new feature train.
        alpha: its alpha; default: the configuration's rule.
        implies: features that it implies.

    Returns:
        ``(config, bank)`` for ``(config, bank)``; None for a model.

    Raises:
        FeatureError: an unknown group or source, or a name that exists already.
        RankError: no rank and nothing to take it from.
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "add_feature")
    growth = plan_growth(
        config, group, name, rank, init_from=init_from, alpha=alpha, implies=implies
    )
    new = _grown(growth, bank, freeze_others)
    if isinstance(source, tuple):
        return growth.config, new
    put_bank(source, growth.config, new)
    return None


def remove_feature(source: Source, group: str, name: str) -> Any:
    """Remove one feature; ids and values of the others stay. An adapted nnx model is changed in place.

    Its id stays reserved: routing that names it is an error (traced ids: NaN in the row), and ``add_feature`` of the
    same name takes it again. The tables shrink, so make a new optimizer.

    Args:
        source: an adapted model, or ``(config, bank)``.
        group: its group.
        name: the feature.

    Returns:
        ``(config, bank)`` for ``(config, bank)``; None for a model.

    Raises:
        FeatureError: no such feature, or the last of its group.
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "remove_feature")
    return _carried_out(source, bank, plan_removal(config, group, name))


def rename_feature(source: Source, group: str, name: str, new: str) -> Any:
    """Give one feature another name; its id and values stay. An adapted nnx model is changed in place.

    The tables stay as they are, and with them the state of a model's optimizer. State for a bank names the features in
    its structure: ``jax.tree.unflatten(jax.tree.structure(tx.init(bank)), jax.tree.leaves(state))`` gives it the new.

    Args:
        source: an adapted model, or ``(config, bank)``.
        group: its group.
        name: the feature.
        new: its name from now on.

    Returns:
        ``(config, bank)`` for ``(config, bank)``; None for a model.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "rename_feature")
    return _carried_out(source, bank, plan_renaming(config, group, name, new))


def load_features(
    model: Source,
    source: Path_ | Adapter,
    features: Any = None,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    freeze_others: bool = False,
) -> Any:
    """Take features of another adapter in. An adapted nnx model is changed in place.

    Present ids and values stay. Layers that the other adapter adapts and this model does not become adapted. The tables
    grow, so make a new optimizer.

    Args:
        model: an adapted nnx model, or ``(config, bank)``.
        source: an adapter's folder, or an adapter.
        features: ``[(group, name), ...]`` or ``{group: name or names}``; what they imply comes, too. Default: all.
        conflicts: what to do about features that both have and that differ: ``"error"``; ``"keep"`` the present ones;
            ``"replace"`` them.
        rename: translates the adapter's layer paths to the model's.
        freeze_others: let only what came in train.

    Returns:
        For a model, the features that came in; for ``(config, bank)``, the new ``(config, bank)``.

    Raises:
        FeatureError: an unknown feature.
        AdapterError: a damaged file, features that differ, or an adapter for another architecture.
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(model, "load_features")
    adapter = (
        source.renamed(rename) if isinstance(source, Adapter) else load_adapter(source, rename)
    )
    if not isinstance(model, tuple):
        check_fits(adapter, layer_shapes(model))
    change = plan_joining(to_adapter((config, bank)), adapter, features, conflicts=conflicts)
    changed = _carried_out(model, bank, change) or model
    if freeze_others:
        changed = thaw(changed) or changed
        if change.kept:
            changed = freeze(changed, list(change.kept)) or changed
    return changed if isinstance(model, tuple) else change.arriving


def import_peft(
    model: Any,
    folders: Mapping[str, Path_],
    group: str,
    *,
    conflicts: str = "error",
    rename: Rename = None,
    skip_modules: bool = False,
    strategy: str = "auto",
) -> Any:
    """Make features of LoRAs that PEFT wrote: each becomes one, together they are a group.

    A plain nnx model is adapted in place, exactly in the LoRAs' layers; into an adapted one, or ``(config, bank)``,
    they come as by :func:`load_features`. For a new bank: ``to_bank(flix.from_peft(folders, group).renamed(rename))``.
    PEFT names layers as torch does, so a Flax model mostly needs ``rename``.

    Args:
        model: a plain or adapted nnx model with the weights that the LoRAs were trained on, or ``(config, bank)``.
        folders: the folder of each LoRA, by the name that its feature gets: ``{"ner": "loras/ner"}``.
        group: the group that they belong to; it may exist.
        conflicts: as for :func:`load_features`.
        rename: translates the LoRAs' layer paths to the model's.
        skip_modules: leave out whole modules that were trained beside a LoRA, instead of refusing them.
        strategy: as for ``adapt``, for a plain model.

    Returns:
        The same model; for ``(config, bank)``, the new one.

    Raises:
        AdapterError: a folder that holds no plain LoRA, or one for another architecture.
        FeatureError: an ill-formed name.
        TargetError: no nnx model, nor ``(config, bank)``.
    """
    adapter = from_peft(folders, group, skip_modules=skip_modules).renamed(rename)
    if isinstance(model, nnx.Module) and next(flix_layers(model), None) is None:
        return load_into(model, adapter, strategy=strategy)
    found = load_features(model, adapter, conflicts=conflicts)
    return found if isinstance(model, tuple) else model


def _carried_out(source: Source, bank: Bank, change: Change) -> Any:
    if isinstance(source, tuple):
        return change.config, changed_bank(bank, change)
    apply_change(source, change)
    return None


def _grown(growth: Growth, bank: Bank, freeze_others: bool) -> Bank:
    grown, feature = growth.config, growth.feature
    others = frozenset(range(len(grown.registry))) - {grown.registry.id(*feature)}
    result = {}
    for path, layer in bank.items():
        old = others if freeze_others else layer.spec.frozen
        spec = make_spec(grown, path, layer.spec.shape, old)
        pairs = host_pairs(layer)
        if grown.rank(path, feature):
            pairs[feature] = _new_pair(growth, path, layer.spec.shape, pairs)
        result[path] = placed_like(pack(spec, pairs, layer.A.dtype), layer)
    return result


def _new_pair(
    growth: Growth, path: str, shape: LayerShape, pairs: Mapping[Feature, tuple[Any, Any]]
) -> tuple[Any, Any]:
    grown, feature = growth.config, growth.feature
    rank = grown.rank(path, feature)
    fresh = initial_a(
        seed=grown.seed,
        layer=path,
        group=feature[0],
        feature=feature[1],
        rank=rank,
        d_in=shape.d_in,
    )
    known = [origin for origin in growth.origins if origin in pairs]
    if not known:
        return fresh, initial_b(rank=rank, d_out=shape.d_out)
    return resized_mean(
        [(pairs[o][0].astype(np.float64), pairs[o][1].astype(np.float64)) for o in known],
        [grown.scale(path, origin) for origin in known],
        fresh,
        grown.scale(path, feature),
        len(growth.origins),
    )
