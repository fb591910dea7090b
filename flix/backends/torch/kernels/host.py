"""The operator on the host: the bank rows that the batch uses are read from the routing, the others left alone."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from flix.backends import messages
from flix.backends.torch.parameters import Values
from flix.backends.torch.sums import routed_backward, routed_forward
from flix.core.strategy.union import BankPart, bank_part, first_unlike

_SMALL = 1 << 16


def _zeros(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is not touched before it is written: most of it belongs to absent features.

    Fresh pages of the system are zero and cost nothing until then; an allocator would clear memory it reuses.
    """
    if rows * size < _SMALL:
        return torch.zeros(rows, size, dtype=dtype)
    fresh = mmap.mmap(-1, rows * size * dtype.itemsize)
    return torch.frombuffer(fresh, dtype=dtype).view(rows, size)


def _used(
    rows: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], strategy: str
) -> tuple[BankPart, Values]:
    part = bank_part(rows.numpy(), [p.shape[0] for p in a])
    if strategy == "single" and (place := first_unlike(rows.numpy(), None)) is not None:
        raise messages.rows_differ(place)
    return part, ([a[i] for i in part.features], [b[i] for i in part.features])


def forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
) -> tuple[Tensor, Tensor]:
    """y ``[N, S, d_out]`` and h ``[N, S, R]``; h is left empty where the backward makes it again."""
    count, length, d_in = x.shape
    used, values = _used(rows, a, b, strategy)
    width = used.rows.shape[1]
    h = scale.new_zeros((count, length, rows.shape[1]))
    if width == 0 or x.numel() == 0:
        flat = x.reshape(-1, d_in)
        y = flat @ kernel if bias is None else torch.addmm(bias, flat, kernel)
        return y.view(count, length, -1), h
    factor, places, live = _slots(scale, used, x.dtype)
    y, ranks, how = routed_forward(x, kernel, bias, factor, places, strategy, values, live=live)
    if how != "masked":
        h[..., :width] = ranks
    return y, h


def _slots(
    scale: Tensor, used: BankPart, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors, rows and, where some are used with the factor 0, those that act (see ``Placed.live``)."""
    factor, places = scale[:, : used.rows.shape[1]].to(dtype), torch.from_numpy(used.rows)
    live = torch.where(factor == 0, int((used.ends - used.starts).sum()), places)
    return factor, places, None if torch.equal(live, places) else live


def backward(
    dy: Tensor,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    h: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients as ``launch.backward`` gives them; those of absent features are zeros that were never written."""
    d_in, d_out = x.shape[2], dy.shape[2]
    bank = sum(p.shape[0] for p in a)
    d_a, d_b = (_zeros(bank, size, a[0].dtype) for size in (d_in, d_out))
    d_scale = scale.new_zeros(scale.shape if need_scale else 0)
    used, values = _used(rows, a, b, strategy)
    width = used.rows.shape[1]
    if width == 0 or x.numel() == 0:
        plain = (dy.flatten(0, 1) @ kernel.t()).view_as(x) if need_x else torch.empty_like(x)
        return plain, d_scale, d_a, d_b
    factor, places, live = _slots(scale, used, x.dtype)
    ranks = h[..., :width].to(x.dtype)
    if live is not None:
        strategy = "gather"
    if strategy == "masked":
        ranks = torch.matmul(x, torch.cat(values[0]).to(x.dtype).t())
    dx, d_factor, d_pairs = routed_backward(
        dy.contiguous(),
        x,
        kernel,
        factor,
        places,
        ranks,
        strategy,
        values,
        need_x=need_x,
        need_scale=need_scale,
        live=live,
    )
    assert d_pairs is not None
    if d_factor is not None:
        d_scale[:, :width] = d_factor
    index, total = torch.from_numpy(used.own), len(used.own) * d_in
    d_a[index] = d_pairs[:total].view(-1, d_in).to(d_a.dtype)
    d_b[index] = d_pairs[total:].view(-1, d_out).to(d_b.dtype)
    return (torch.empty_like(x) if dx is None else dx), d_scale, d_a, d_b
