"""The seam (:mod:`flix.backends.protocol`): a model is an adapted nnx module, or a pair ``(config, bank)``.

A module is changed in place; of a pair comes a new one. A layer's tables are read and written whole, on the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from flix.backends import messages
from flix.backends.jax import finite, scopes
from flix.backends.jax.adapt import attach as attach
from flix.backends.jax.adapt import (
    flix_layers,
    layer_infos,
    path_of,
    put_state,
)
from flix.backends.jax.bases import base_name as base_name
from flix.backends.jax.bases import kernel_samples as kernel_samples
from flix.backends.jax.heads import head_places as head_places
from flix.backends.jax.heads import heads as heads
from flix.backends.jax.heads import put_heads as put_heads
from flix.backends.jax.layers import FlixParam
from flix.backends.jax.merging import dequantized as dequantized
from flix.backends.jax.merging import merged as merged
from flix.backends.jax.parameters import Bank, LayerBank, LayerSpec, changed, pack
from flix.backends.jax.patches.layers import become
from flix.backends.jax.patches.model import RoutedModel
from flix.backends.jax.processes import on_host
from flix.backends.jax.processes import writing as writing
from flix.backends.jax.searching import asking as asking
from flix.backends.jax.stacks import (
    check_alike,
    members,
    places,
    stacked,
    together,
    unstacked,
    whole,
)
from flix.backends.protocol import Counts, Pairs
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import Change
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo
from flix.core.errors import TargetError
from flix.core.features.names import Feature

M = TypeVar("M")


def is_bank(value: Any) -> bool:
    """Whether this is a bank: layers by path."""
    return isinstance(value, dict) and all(isinstance(x, LayerBank) for x in value.values())


def bank_of(model: Any) -> Bank:
    """The pairs of an adapted module, or of ``(config, bank)``, by the layers' own paths."""
    return {path: own for layer in banks_of(model) for path, own in unstacked(layer).items()}


def banks_of(model: Any) -> list[LayerBank]:
    """The same, as they are kept: those of a stack in one."""
    return (
        [*model[1].values()]
        if isinstance(model, tuple)
        else [x.bank for _, x in flix_layers(model)]
    )


def check_plain(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TargetError(
            f"adapt needs a flax.nnx Module, got {type(model).__name__}; for other JAX programs use "
            "init and linear"
        )
    if next(flix_layers(model), None) is not None:
        raise messages.adapted_already()


def layers(model: Any) -> Sequence[LayerInfo] | None:
    return None if isinstance(model, tuple) else layer_infos(model)


def adapted(model: Any) -> FlixConfig | None:
    if isinstance(model, RoutedModel):
        return model.flix_config
    if is_bank(model) and model:
        raise TargetError("a bank does not contain its configuration; give (config, bank)")
    pair = isinstance(model, tuple) and len(model) == 2
    return model[0] if pair and isinstance(model[0], FlixConfig) and is_bank(model[1]) else None


def shapes(model: Any) -> dict[str, LayerShape]:
    return {spec.path: spec.shape for spec in specs_in(model)}


def specs_in(model: Any) -> list[LayerSpec]:
    """The specs of all layers, those of a stack each by itself."""
    if isinstance(model, tuple):
        found = [layer.spec for layer in model[1].values()]
    else:
        found = [layer.flix_spec for _, layer in flix_layers(model)]
    return [own for spec in found for own in members(spec)]


def read(model: Any, features: Collection[Feature] | None = None) -> Pairs:
    found = {}
    for layer in on_host(banks_of(model)):
        a, b = (cast("Array", _wide(table)) for table in (layer.A, layer.B))
        held = LayerBank(a, b, layer.spec)
        for path, own in unstacked(held).items():
            found[path] = own.spec.pairs(own.A, own.B, features)
    return found


def _wide(table: NDArray[Any]) -> NDArray[Any]:
    return table if table.dtype in (np.float32, np.float64) else table.astype(np.float32)


def write(model: M, pairs: Pairs) -> M:
    bank = {**bank_of(model)}
    for path, own in pairs.items():
        old, spec = bank[path], bank[path].spec
        kept = {*np.flatnonzero(spec.ranks)} - {spec.registry.id(*feature) for feature in own}
        bank[path] = pack(spec, own, old.A.dtype, old, kept)
    if isinstance(model, tuple):
        return model[0], bank  # type: ignore[return-value]
    for path, layer in flix_layers(model):  # type: ignore[arg-type]
        spec = layer.flix_spec
        if not pairs.keys() & {*(spec.stack or (path,))}:
            continue
        finite.look_again(layer)
        new = stacked(path, spec.lead, [bank[own.path] for own in members(spec)])
        for variable, table in ((layer.flix_A, new.A), (layer.flix_B, new.B)):
            variable[...] = jax.device_put(table, variable[...].sharding)
    return model


def change(model: M, change: Change) -> M:
    before = bank_of(model)
    bank = changed(before, change)
    if isinstance(model, tuple):
        return change.config, bank  # type: ignore[return-value]
    known = [*flix_layers(model)]  # type: ignore[arg-type]
    first = known[0][1]
    found = places(model) if change.layers else {}  # type: ignore[arg-type]
    joining = whole(found, [*change.layers])
    groups = [*joining.values(), *([s.path for s in members(x.flix_spec)] for _, x in known)]
    for names in groups:
        check_alike([bank[name].spec for name in names])
    strategy, state, training = first.flix_strategy, first.flix_state, not first.deterministic
    for head, names in joining.items():
        place = found[head]
        path = path_of(model, place.module)  # type: ignore[arg-type]
        own = stacked(path, place.lead, [bank[name] for name in names])
        become(place.module, strategy, state, own, training)
    for path, layer in known:
        lead, names = layer.flix_spec.lead, [spec.path for spec in members(layer.flix_spec)]
        if all(bank[name].A is before[name].A for name in names):
            layer.flix_spec = together(path, lead, [bank[name].spec for name in names])
        else:
            layer.put(stacked(path, lead, [bank[name] for name in names]))
    put_state(model, replace(first.flix_state, config=change.config))
    return model


def frozen(model: Any) -> Collection[Feature]:
    specs = specs_in(model)
    ids = frozenset[int]().union(*{spec.frozen for spec in specs})
    return {specs[0].registry.features[i] for i in ids}


def set_frozen(model: M, features: Collection[Feature]) -> M:
    registry = adapted(model).registry  # type: ignore[union-attr]
    ids = frozenset(registry.id(*feature) for feature in features)
    if isinstance(model, tuple):
        specs = {path: replace(layer.spec, frozen=ids) for path, layer in model[1].items()}
        return model[0], {p: LayerBank(x.A, x.B, specs[p]) for p, x in model[1].items()}  # type: ignore[return-value]
    for _, layer in flix_layers(model):  # type: ignore[arg-type]
        layer.flix_spec = replace(layer.flix_spec, frozen=ids)
    return model


def parameters(model: Any) -> Any:
    return model[1] if isinstance(model, tuple) else nnx.state(model, FlixParam)


def count(model: Any) -> Counts:
    if isinstance(model, tuple):
        return Counts()
    base = nnx.state(model, nnx.All(nnx.Param, nnx.Not(FlixParam)))
    return Counts(total=sum(int(leaf.size) for leaf in jax.tree.leaves(base)))


def undropped(layers: Mapping[str, LayerShape]) -> list[str]:
    """None: embeddings see their tokens whole, as PEFT's do."""
    return []


def switch(model: Any, by: int) -> None:
    if isinstance(model, tuple):
        raise TargetError(
            "disable needs a model; a bank is never called, so leave out linear's update yourself"
        )
    if by > 0:
        layers = (layer for _, layer in flix_layers(model))
        scopes.enter(scopes.Block(model.flix_state, (model, *layers)))
    else:
        scopes.leave(model)
