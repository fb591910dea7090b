"""Modules that would keep their adapted layers from acting as each row needs.

What: ``nn.TransformerEncoder`` and its layers leave their fused path if adapted layers are inside: it reads kernels
past their layers' forward in evaluation, and its nested tensors have no rows. DeBERTa-v2's attention (and SEW-D's),
which calls ``query_proj`` on one table of positions and repeats the result for all rows, computes its bias for each
composition of the batch. All are attributes on the module. When: by ``adapt`` and ``load``, and where one is adapted
later. Undone: by :func:`release`, when the model becomes plain again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch.layer import flix_layers
from flix.backends.torch.routing import ActiveRouting, TracedRouting, activated, current

_BIAS = "disentangled_attention_bias"
_KEPT = "flix_fused"
# What to set on which class: an activation that the fused path does not know, and no nested tensors.
_FUSED: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def prepare(model: nn.Module) -> None:
    """Patch the modules of a model that have adapted layers."""
    for module in model.modules():
        own = vars(module)
        fused = [
            way for kind, way in _FUSED.items() if isinstance(module, kind) and _KEPT not in own
        ]
        biased = hasattr(type(module), _BIAS) and _BIAS not in own
        if not (fused or biased) or next(flix_layers(module), None) is None:
            continue
        for name, value in fused:
            own[_KEPT] = name, own.get(name)
            own[name] = value
        if biased:
            own[_BIAS] = partial(bias_by_composition, module)


def release(model: nn.Module) -> None:
    """Undo :func:`prepare`."""
    for module in model.modules():
        own = vars(module)
        if _KEPT in own:
            name, value = own.pop(_KEPT)
            own[name] = value
        if hasattr(type(module), _BIAS):
            own.pop(_BIAS, None)


def bias_by_composition(
    module: Any,
    query: Tensor,
    key: Tensor,
    relative_pos: Tensor | None,
    rel_embeddings: Tensor,
    scale_factor: Any,
) -> Tensor:
    """The attention's bias by relative position, with each row's own projection of the one table.

    Args:
        module: the attention.
        query, key: ``[B * heads, length, size]``.
        relative_pos: ``[..., length, length]``, with or without a batch.
        rel_embeddings: the table ``[positions, d]``.
        scale_factor: the attention's.

    Returns:
        ``[B * heads, length, length]``.
    """
    plain = type(module).disentangled_attention_bias
    routing, heads = current.routing, module.num_attention_heads
    routed = isinstance(routing, ActiveRouting | TracedRouting) and len(routing.lead) == 1
    if not routed or query.shape[0] != routing.lead[0] * heads:  # type: ignore[union-attr]
        return plain(module, query, key, relative_pos, rel_embeddings, scale_factor)  # type: ignore[no-any-return]
    groups = routing.alike()  # type: ignore[union-attr]
    parts = []
    for rows in groups:
        q, k = (_by_row(t, heads)[rows].flatten(0, 1) for t in (query, key))
        own = relative_pos
        if own is not None and own.dim() > 2 and own.shape[0] == routing.lead[0]:  # type: ignore[union-attr]
            own = own[rows]
        with activated(routing.of_rows(rows[:1], (1,))):  # type: ignore[union-attr]
            made = plain(module, q, k, own, rel_embeddings, scale_factor)
        parts.append(_by_row(made, heads))
    order = torch.tensor([row for rows in groups for row in rows], device=query.device)
    return torch.cat(parts)[order.argsort()].flatten(0, 1)


def _by_row(x: Tensor, heads: int) -> Tensor:
    """``[B * heads, ...]`` as ``[B, heads, ...]``."""
    return x.view(-1, heads, *x.shape[1:])
