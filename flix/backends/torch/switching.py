"""Features switched off, frozen, folded in for a while; and several adapted models over one base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from flix.backends.torch.files import to_adapter
from flix.backends.torch.layers import FlixConv1D
from flix.backends.torch.model import RoutedModel, flix_layers, require_adapted, unadapt
from flix.core.adapter.composition import composition, delta
from flix.core.adapter.sharing import chosen_features
from flix.core.errors import TargetError
from flix.core.features.encoding import Row

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Inside, an adapted model is its base: no feature acts, and no routing is needed or looked at.

    It switches the model itself, for every thread. Contexts may nest.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "disable")
    before = [(layer, layer.flix_enabled) for _, layer in flix_layers(model)]
    for layer, _ in before:
        layer.flix_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.flix_enabled = enabled


def freeze(model: nn.Module, features: Any) -> None:
    """Let these features of an adapted model train no more; the others stay as they are.

    Args:
        model: an adapted model.
        features: ``[(group, name), ...]`` or ``{group: name or names}``.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    _set_trainable(model, features, False, "freeze")


def thaw(model: nn.Module, features: Any = None) -> None:
    """Let these features of an adapted model train again; default: all of them.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    _set_trainable(model, features, True, "thaw")


def _set_trainable(model: nn.Module, features: Any, value: bool, what: str) -> None:
    registry = require_adapted(model, what).registry
    chosen = set(registry.live if features is None else chosen_features(registry, features))
    for _, layer in flix_layers(model):
        for feature, a, b in layer.pairs():
            if feature in chosen:
                a.requires_grad_(value)
                b.requires_grad_(value)


def share_base(model: Model) -> Model:
    """A plain model over the same base: every base parameter and buffer is the other model's own, not a copy.

    Adapted anew, it stands beside the first; two adapters then cost one base in memory::

        other = load(share_base(model), "another adapter")

    Args:
        model: a plain or adapted model; it is not changed.
    """
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    if next(flix_layers(twin), None) is not None:
        trainable = [p.requires_grad for p in model.parameters()]
        unadapt(twin)
        # The twin's parameters are the first's: unadapting must not unfreeze those.
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)
    return twin


def merge_in_place(model: nn.Module, row: Row) -> None:
    """Fold one composition into an adapted model's kernels until :func:`unmerge`; ``merge`` gives a copy instead.

    Meanwhile the model answers under this composition at the base's speed, takes no routing, and keeps its features and
    its kernels of before, so that ``save`` works and ``unmerge`` restores every bit.

    Args:
        model: an adapted model.
        row: the composition, ``{group: name | [names] | {name: weight}}``.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: the model is not adapted, or merged already.
    """
    config = require_adapted(model, "merge_in_place")
    if "flix_merged" in vars(model):
        raise TargetError(
            f"the model is merged already, with {vars(model)['flix_merged']!r}; unmerge(model) first"
        )
    active = composition(config, row)
    adapter = to_adapter(model)
    with torch.no_grad():
        for path, layer in flix_layers(model):
            update = torch.from_numpy(delta(adapter, path, active))  # [d_out, d_in]
            if isinstance(layer, FlixConv1D) or layer.flix_kind == "embedding":
                update = update.t()
            kernel: nn.Parameter = layer.weight  # type: ignore[assignment]
            folded = torch.empty_like(kernel).copy_(kernel.double().cpu() + update)
            # Another parameter, not other values: kernels that are tied to this one stay the base's.
            vars(layer)["flix_kernel"] = kernel
            layer.weight = nn.Parameter(folded, requires_grad=False)
            layer.flix_enabled = False
    for module in model.modules():
        if isinstance(module, RoutedModel):
            vars(module)["flix_merged"] = dict(row)


def unmerge(model: nn.Module) -> None:
    """Take a composition that :func:`merge_in_place` folded in out again, bit for bit.

    Raises:
        TargetError: the model is not adapted, or not merged.
    """
    require_adapted(model, "unmerge")
    if "flix_merged" not in vars(model):
        raise TargetError("the model is not merged; merge_in_place(model, row) merges it")
    for _, layer in flix_layers(model):
        kernel, device = vars(layer).pop("flix_kernel"), layer.weight.device
        kernel.data = kernel.data.to(device)  # the model may have been moved meanwhile
        layer.weight = kernel
        layer.flix_enabled = True
    for module in model.modules():
        if isinstance(module, RoutedModel):
            vars(module).pop("flix_merged", None)
