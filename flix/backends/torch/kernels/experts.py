"""``flix::routed_experts``: a kernel of experts with its features in a compiled graph, which keeps it whole.

Which features act is known when the operator runs; it then reads the ids on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flix.backends.torch import experts_sums as sums
from flix.backends.torch.experts_entries import Entries, Sent, Share
from flix.backends.torch.grouped import Groups
from flix.backends.torch.parameters import Values
from flix.core.errors import ConfigError


def _placed(
    of: Tensor,
    token: Tensor,
    row: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ranks: Sequence[int],
    scales: Sequence[float],
    experts: int,
) -> tuple[Sent, list[Share], Values, Tensor | None, Entries, Tensor | None]:
    """Entries, shares, values, factors, and which entries are of rows with an id of no feature."""
    sent = Sent(Groups(of, experts), token, row)
    host = ids.detach().cpu().numpy().astype(np.int64)
    unknown = (host < -1) | (host >= len(ranks))
    odd = None
    if a and unknown.any():
        odd = torch.from_numpy(unknown.any(1)).to(row.device)[row]
    host = np.where(unknown, -1, host)
    held = {i: place for place, i in enumerate(i for i, rank in enumerate(ranks) if rank)}
    entries = Entries(host, held if a else (), sent)
    values = [a[held[i]] for i in entries.features], [b[held[i]] for i in entries.features]
    factors = None if weights is None else entries.factors(weights)
    shares = entries.shares(entries.features, ranks, scales, factors is not None)
    return sent, shares, values, factors, entries, odd


@torch.library.custom_op("flix::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor,
    kernel: Tensor,
    weights: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    of: Tensor,
    token: Tensor,
    row: Tensor,
    ids: Tensor,
    gathers: bool,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """The output ``[S, d_out]`` of entries sorted by expert (see :mod:`flix.backends.torch.experts_sums`).

    Args:
        x: tokens if ``gathers``, else entries.
        kernel: ``[E, d_in, d_out]``, any strides.
        weights: ``[N, W]`` or None for 1.
        a, b: A ``[E * r * d_in]`` and B transposed ``[E * r * d_out]`` of every feature with a rank here; perhaps none.
        of, token, row: int64 ``[S]``: the expert, token and row of each entry.
        ids: integer ``[N, W]``; -1 pads. Rows with an id of no feature give NaN.
        gathers: whether entries are made of the tokens.
        ranks, scales: r_f and s_f of each registered feature.
    """
    with torch.autocast(x.device.type, enabled=False):
        sent, shares, values, factors, _, odd = _placed(
            of, token, row, ids, weights, a, b, ranks, scales, kernel.shape[0]
        )
        y, _ = sums.forward(x, kernel, sent, gathers, shares, values, factors)
        return y if odd is None else y.masked_fill_(odd.unsqueeze(1), float("nan"))


@routed_experts.register_fake
def _(x: Tensor, kernel: Tensor, weights: Any, a: Any, b: Any, of: Tensor, *_: Any) -> Tensor:
    return x.new_empty((of.shape[0], kernel.shape[2]))


@torch.library.custom_op("flix::routed_experts_backward", mutates_args=())
def routed_experts_backward(
    dy: Tensor,
    x: Tensor,
    kernel: Tensor,
    weights: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    of: Tensor,
    token: Tensor,
    row: Tensor,
    ids: Tensor,
    gathers: bool,
    ranks: Sequence[int],
    scales: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the kernel, the weights, and of all A and all B, one after the other.

    What is not needed has no meaning.
    """
    need_x, need_kernel, need_weights, need_values = needs
    with torch.autocast(x.device.type, enabled=False):
        sent, shares, values, factors, entries, _ = _placed(
            of, token, row, ids, weights, a, b, ranks, scales, kernel.shape[0]
        )
        kept = sums.activations(x, kernel, sent, gathers, shares, values)
        wanted = (need_x, need_kernel, need_weights, need_values)
        dx, d_kernel, d_factors, flat = sums.backward(
            dy.contiguous(), x, kernel, sent, gathers, shares, values, factors, kept, wanted
        )
        d_weights = x.new_zeros(0)
        if weights is not None:
            d_weights = torch.zeros_like(weights)
            if d_factors is not None:
                d_weights = entries.scattered(d_factors, d_weights)
        sizes = [v.numel() for v in a], [v.numel() for v in b]
        grads = tuple(a[0].new_zeros(sum(s)) if a else x.new_zeros(0) for s in sizes)
        if flat is not None:
            made = flat.split_with_sizes([v.numel() for side in values for v in side])
            count = len(entries.features)
            held = [i for i, rank in enumerate(ranks) if rank]
            sides = made[:count], made[count:]
            for parts, size, grad in zip(sides, sizes, grads, strict=True):
                starts = np.cumsum([0, *size]).tolist()
                for feature, value in zip(entries.features, parts, strict=True):
                    place = held.index(feature)
                    grad[starts[place] : starts[place + 1]] = value.to(grad.dtype)
        return (
            torch.empty_like(x) if dx is None else dx,
            x.new_zeros(0) if d_kernel is None else d_kernel,
            d_weights,
            *grads,  # type: ignore[return-value]
        )


@routed_experts_backward.register_fake
def _(
    dy: Tensor, x: Tensor, kernel: Tensor, weights: Any, a: Any, b: Any, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    dtype = a[0].dtype if a else x.dtype
    return (
        torch.empty_like(x),
        x.new_empty(kernel.shape) if needs[1] else x.new_empty(0),
        x.new_empty(0) if weights is None else torch.empty_like(weights),
        x.new_empty(sum(v.numel() for v in a), dtype=dtype),
        x.new_empty(sum(v.numel() for v in b), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernel, weights, a, b, of, token, row, ids, gathers, ranks, scales = inputs
    ctx.save_for_backward(x, kernel, weights, of, token, row, ids, *a, *b)
    ctx.given = gathers, list(ranks), list(scales)
    ctx.count = len(a)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, kernel, weights, of, token, row, ids, *values = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise ConfigError(
            "gradients of gradients (create_graph=True) are not offered for a compiled model; use the eager model"
        )
    gathers, ranks, scales = ctx.given
    a, b = values[: ctx.count], values[ctx.count :]
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    needs.append(any(v.requires_grad for v in values))
    dx, d_kernel, d_weights, d_a, d_b = routed_experts_backward(
        dy, x, kernel, weights, a, b, of, token, row, ids, gathers, ranks, scales, needs
    )
    return (
        dx if needs[0] else None,
        d_kernel if needs[1] else None,
        d_weights if needs[2] else None,
        list(d_a.split([v.numel() for v in a])) if needs[3] else [None] * len(a),
        list(d_b.split([v.numel() for v in b])) if needs[3] else [None] * len(b),
        *([None] * 7),
    )


routed_experts.register_autograd(_backward, setup_context=_setup)
