"""Carrying out a :class:`flix.core.adapter.changes.Change` on a bank or an adapted nnx model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from flix.backends.jax.bank import Bank, LayerBank, LayerSpec, host_pairs, make_spec, pack
from flix.backends.jax.model import attach_layers, flix_layers, set_config
from flix.core.adapter.changes import Change
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.features.names import Feature


def changed_bank(bank: Bank, change: Change) -> Bank:
    """A bank with the features that the change says; layers whose values all stay keep their arrays."""
    layouts: dict[LayerLayout, LayerLayout] = {}
    result: Bank = {}
    for path, layer in bank.items():
        spec = make_spec(change.config, path, layer.spec.shape, _still_frozen(layer.spec, change))
        result[path] = _changed(layer, _shared(spec, layouts), change)
    first = next(iter(bank.values()), None)
    for path, shape in (change.layers or {}).items():
        if path in bank:
            continue
        frozen = frozenset[int]() if first is None else _still_frozen(first.spec, change)
        spec = _shared(make_spec(change.config, path, shape, frozen), layouts)
        dtype = np.float32 if first is None else first.A.dtype
        result[path] = pack(spec, _arriving(path, change), dtype)
    return result


def _shared(spec: LayerSpec, layouts: dict[LayerLayout, LayerLayout]) -> LayerSpec:
    """The spec, with one object for equal layouts."""
    object.__setattr__(spec, "layout", layouts.setdefault(spec.layout, spec.layout))
    return spec


def _still_frozen(spec: LayerSpec, change: Change) -> frozenset[int]:
    """What was frozen and stays; ids do not change."""
    features = change.config.registry.features
    return frozenset(i for i in spec.frozen if features[i] in change.kept)


def _arriving(path: str, change: Change) -> dict[Feature, tuple[Any, Any]]:
    found = ((feature, change.pair(path, feature)) for feature in change.arriving)
    return {feature: pair for feature, pair in found if pair is not None}


def _changed(layer: LayerBank, spec: LayerSpec, change: Change) -> LayerBank:
    pairs = _arriving(spec.path, change)
    if spec.layout.ranks == layer.spec.layout.ranks and not pairs:
        return LayerBank(layer.A, layer.B, spec)
    before = host_pairs(layer)
    pairs.update({f: before[old] for f, old in change.kept.items() if old in before})
    return placed_like(pack(spec, pairs, layer.A.dtype), layer)


def placed_like(new: LayerBank, old: LayerBank) -> LayerBank:
    """A layer's new tables, on the mesh that the old ones are on."""

    def placed(table: Array, like: Array) -> Array:
        sharding = like.sharding
        return jax.device_put(table, sharding) if isinstance(sharding, NamedSharding) else table

    return LayerBank(placed(new.A, old.A), placed(new.B, old.B), new.spec)


def apply_change(model: nnx.Module, change: Change) -> None:
    """Give an adapted model's layers the features that the change says, in place."""
    layers = dict(flix_layers(model))
    if change.layers:
        first = next(iter(layers.values()))
        attach_layers(model, change.config, list(change.layers), first.flix_strategy)
        for path, layer in flix_layers(model):
            if path not in layers:
                layer.deterministic = first.deterministic
                layer.flix_spec = replace(layer.flix_spec, frozen=first.flix_spec.frozen)
    before = {path: layer.bank for path, layer in flix_layers(model)}
    put_bank(model, change.config, changed_bank(before, change), before)


def put_bank(model: nnx.Module, config: FlixConfig, bank: Bank, before: Bank | None = None) -> None:
    """Set an adapted model's configuration and pairs.

    Args:
        model: the model.
        config: the configuration.
        bank: the pairs of every layer.
        before: the layers' pairs so far; tables that stay are left as they are, Variables included.
    """
    for path, layer in flix_layers(model):
        if before is not None and bank[path].A is before[path].A:
            layer.flix_spec = bank[path].spec
        else:
            layer.put(bank[path])
    set_config(model, config)
