"""Absent features stay put in compiled models too.

In eager mode the parameters of features absent from a batch take no part, so they get no gradient and no optimizer
moves them. A compiled graph must have a fixed structure: it gives every parameter a gradient, zero for the absent,
and weight decay or momentum would then move them. A compiled forward therefore marks the features it sees in a
buffer of the model, and before any torch optimizer steps, gradients of features never seen since the last step are
taken away.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flix.backends.torch._layer import FlixLayer

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(model: nn.Module) -> None:
    """Watch an adapted model (one with the buffer ``flix_present``)."""
    _models.add(model)


def _traced_models(optimizer: torch.optim.Optimizer) -> list[nn.Module]:
    models = [model for model in _models if getattr(model, "flix_traced", False)]
    if not models:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [m for m in models if any(id(p) in held for p in m.parameters() if p.requires_grad)]


def _before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for model in _traced_models(optimizer):
        present = model.flix_present.tolist()  # type: ignore[operator, union-attr]
        for layer in model.modules():
            if isinstance(layer, FlixLayer):
                for feature, a, b in layer.pairs():
                    if not present[layer.flix_config.registry.id(*feature)]:
                        a.grad = b.grad = None


def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for model in _traced_models(optimizer):
        model.flix_present.zero_()  # type: ignore[operator, union-attr]
        model.flix_traced = False  # type: ignore[assignment]


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
