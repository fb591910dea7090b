"""What the torch backend gives (docs/specification.md §5.1): see :mod:`flix.backends.protocol` for each function."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from flix.backends.protocol import Counts, Pairs, Values
from flix.backends.torch import scopes
from flix.backends.torch.adapt import attach as attach_features
from flix.backends.torch.adapt import become_layers, peft_layer, settle
from flix.backends.torch.adapt import layer_infos as layers
from flix.backends.torch.bases import base_name, kernel_samples
from flix.backends.torch.distributed.writing import one_writes
from flix.backends.torch.heads import (
    base_parameters,
    head_places,
    heads,
    put_heads,
    shared_heads,
)
from flix.backends.torch.layer import flix_layers
from flix.backends.torch.merging import dequantized, fold, merged, peft_facts, unfold
from flix.backends.torch.parameters import Bank
from flix.backends.torch.patches.hooked import runs_own
from flix.backends.torch.patches.models import RoutedModel
from flix.backends.torch.searching import asking
from flix.backends.torch.state import FlixState
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import Change
from flix.core.adapter.flat import flat_layout
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError, listed
from flix.core.features.names import Feature

M = TypeVar("M")


def check_plain(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TargetError(f"adapt needs a torch nn.Module, got {type(model).__name__}")
    if not runs_own(model):
        raise TargetError(
            "the model's forward is patched on the instance (as Accelerator.prepare does); adapt it before it is prepared"
        )
    if (path := peft_layer(model)) is not None:
        raise TargetError(
            f"{path!r} is one of PEFT's layers; fold them in (merge_and_unload()) or take them out (unload()) before "
            "adapt, and import_peft(model, folders) turns saved LoRAs into features"
        )
    if (found := next(flix_layers(model), None)) is not None:
        raise TargetError(
            f"layer {found[0]!r} is adapted already; adapt a model of plain layers, or run the adapted ones by hand"
        )


def attach(model: M, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values) -> M:
    attach_features(model, config, paths, strategy, values)  # type: ignore[arg-type]
    return model


def adapted(model: Any) -> FlixConfig | None:
    return model.flix_state.config if isinstance(model, RoutedModel) else None


def shapes(model: Any) -> Mapping[str, LayerShape]:
    return {path: layer.shape_of(layer) for path, layer in flix_layers(model)}


def read(model: Any, features: Collection[Feature] | None = None) -> Pairs:
    bank, registry = _bank(model), _state(model).config.registry
    found: dict[str, dict[Feature, Any]] = {path: {} for path, _ in flix_layers(model)}
    for feature, vector in bank.arrays(registry.live if features is None else features):
        for path, pair in bank.layout.pairs(vector, registry.id(*feature)).items():
            found[path][feature] = pair
    return found


def write(model: M, pairs: Pairs) -> M:
    bank = _bank(model)
    vectors: dict[Feature, Any] = {}
    for path, layer in pairs.items():
        for feature, pair in layer.items():
            if feature not in vectors:
                vectors[feature] = bank.array(feature).copy()
            bank.layout.put(vectors[feature], bank.ids[feature], path, pair)
    for feature, vector in vectors.items():
        bank.fill(feature, vector)
    return model


def change(model: M, change: Change) -> M:
    """Give the model the configuration and the features that a change says.

    The parameters of kept features stay the objects they are, so that an optimizer's state stays with them.
    """
    state, bank = _state(model), _bank(model)
    kept = {f: p for f, old in change.kept.items() if (p := bank.parameter(old)) is not None}
    like = next(bank.parameters(), torch.empty(0, dtype=torch.float32))
    sizes = dict(zip(bank.layout.places, bank.layout.shapes, strict=True))
    sizes |= become_layers(model, state, list(change.layers), len(sizes))  # type: ignore[arg-type]
    bank.arrange(change.config.registry.features, flat_layout(change.config, sizes))
    settle(model, state)  # type: ignore[arg-type]
    bank._parameters.clear()
    for feature, parameter in kept.items():
        bank.hold(feature, parameter)
    arriving = ((path, change.pairs(path)) for path in sizes)
    bank.receive(arriving, change.arriving, like.dtype, like.device)
    state.config = change.config
    state.forget()
    return model


def frozen(model: Any) -> Collection[Feature]:
    bank = _bank(model)
    return [bank.features[i] for i, p in bank.held().items() if not p.requires_grad]


def set_frozen(model: M, features: Collection[Feature]) -> M:
    bank, chosen = _bank(model), set(features)
    for i, parameter in bank.held().items():
        parameter.requires_grad_(bank.features[i] not in chosen)
    return model


def parameters(model: Any) -> list[nn.Parameter]:
    if shared := shared_heads(model):
        raise TargetError(
            f"{listed(shared)} would also train for another model that shares this base "
            f"(share_base); give this model its own first: module.weight = "
            f"nn.Parameter(module.weight.detach().clone())"
        )
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(model: Any) -> Counts:
    base = {id(p): p for _, p in base_parameters(model)}.values()
    return Counts(
        total=sum(p.numel() for p in base),
        trainable=sum(p.numel() for p in base if p.requires_grad),
    )


def undropped(layers: Mapping[str, LayerShape]) -> list[str]:
    """Experts, whose tokens come sorted; embeddings see theirs whole, as PEFT's do."""
    return [path for path, shape in layers.items() if shape.experts]


@contextmanager
def writing(model: Any) -> Iterator[bool]:
    if _bank(model).sharding is None:  # each process holds it all
        yield True
        return
    with one_writes() as first:
        yield first


def switch(model: Any, by: int) -> None:
    scopes.switch(_state(model), by)


def folded(model: Any) -> Mapping[str, Any] | None:
    return _state(model).folded


def _state(model: Any) -> FlixState:
    return model.flix_state  # type: ignore[no-any-return]


def _bank(model: Any) -> Bank:
    return model.flix_state.bank  # type: ignore[no-any-return]


__all__ = [
    "adapted",
    "asking",
    "attach",
    "base_name",
    "change",
    "check_plain",
    "count",
    "dequantized",
    "fold",
    "folded",
    "frozen",
    "head_places",
    "heads",
    "kernel_samples",
    "layers",
    "merged",
    "parameters",
    "peft_facts",
    "put_heads",
    "read",
    "set_frozen",
    "shapes",
    "switch",
    "undropped",
    "unfold",
    "write",
    "writing",
]
