"""The operator on the host: the bank rows that the batch uses are read from the routing, the others left alone."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flix.backends import messages
from flix.backends.torch.sums import routed_backward, routed_forward


class _Used:
    """The part of a bank that a batch uses.

    Attributes:
        features: places in the lists, ascending.
        rows: int64 ``[N, R']``: rows of the used features' stack; 0 where a slot is unused.
        width: R', the slots that some row of the batch uses.
    """

    def __init__(self, rows: Tensor, a: Sequence[Tensor], strategy: str) -> None:
        host = rows.numpy()
        taken = np.flatnonzero((host >= 0).any(axis=0))
        self.width = int(taken[-1]) + 1 if len(taken) else 0
        host = host[:, : self.width].astype(np.int64)
        if strategy == "single" and len(host) and (host != host[0]).any():
            row = int(np.argmax((host != host[0]).any(axis=1)))
            raise messages.rows_differ(row)
        ranks = np.asarray([p.shape[0] for p in a])
        ends = np.cumsum(ranks)
        used = host >= 0
        owner = np.searchsorted(ends, host, side="right")
        self.features = np.unique(owner[used])
        shift = np.zeros(len(ranks) + 1, dtype=np.int64)
        mine = ranks[self.features]
        shift[self.features] = np.cumsum(mine) - ends[self.features]
        self.rows = torch.from_numpy(np.where(used, host + shift[owner], 0))

    def values(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [a[i] for i in self.features], [b[i] for i in self.features]


_SMALL = 1 << 16


def _zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is not touched before it is written: most of it belongs to absent features.

    Fresh pages of the system are zero and cost nothing until then; an allocator would clear memory it reuses.
    """
    if size < _SMALL:
        return torch.zeros(size, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)


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
    used = _Used(rows, a, strategy)
    h = scale.new_zeros((count, length, rows.shape[1]))
    if used.width == 0 or x.numel() == 0:
        flat = x.reshape(-1, d_in)
        y = flat @ kernel if bias is None else torch.addmm(bias, flat, kernel)
        return y.view(count, length, -1), h
    factor = scale[:, : used.width].to(x.dtype)
    y, ranks = routed_forward(x, kernel, bias, factor, used.rows, strategy, used.values(a, b))
    if strategy != "masked":
        h[..., : used.width] = ranks
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    rows: Tensor,
    h: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
    *,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients as ``launch.backward`` gives them; those of absent features are zeros that were never written."""
    d_in, d_out = x.shape[2], dy.shape[2]
    bank = sum(p.shape[0] for p in a)
    d_a = _zeros(bank * d_in, a[0].dtype).view(bank, d_in)
    d_b = _zeros(bank * d_out, a[0].dtype).view(bank, d_out)
    d_scale = scale.new_zeros(scale.shape if need_scale else 0)
    used = _Used(rows, a, strategy)
    if used.width == 0 or x.numel() == 0:
        plain = (dy.flatten(0, 1) @ kernel.t()).view_as(x) if need_x else torch.empty_like(x)
        return plain, d_scale, d_a, d_b
    values = used.values(a, b)
    factor = scale[:, : used.width].to(x.dtype)
    ranks = h[..., : used.width].to(x.dtype)
    if strategy == "masked":
        ranks = torch.matmul(x, torch.cat(values[0]).to(x.dtype).t())
    dx, d_factor, d_pairs = routed_backward(
        dy.contiguous(),
        x,
        kernel,
        factor,
        used.rows,
        ranks,
        strategy,
        values,
        need_x=need_x,
        need_scale=need_scale,
    )
    assert d_pairs is not None
    if d_factor is not None:
        d_scale[:, : used.width] = d_factor
    counts = np.asarray([p.shape[0] for p in a])
    mine = np.isin(np.repeat(np.arange(len(a)), counts), used.features)
    index = torch.from_numpy(np.flatnonzero(mine))
    total = len(index) * d_in
    d_a[index] = d_pairs[:total].view(-1, d_in).to(d_a.dtype)
    d_b[index] = d_pairs[total:].view(-1, d_out).to(d_b.dtype)
    return (torch.empty_like(x) if dx is None else dx), d_scale, d_a, d_b
