"""The routed linear map as one autograd function, in three interchangeable strategies.

The forward computes the frozen layer and adds every example's own sum onto it in place; the backward gives
gradients only to the features in the batch. Nothing of size [d_out, d_in] is made for an example. Saved for the
backward are the input and the rank-space activations; stacked rows are made again, since copying them is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flix.backends.torch._context import DevicePlan

# Copying pair by pair costs about a microsecond for each, whatever its size.
_MOST_BLOCKS = 512


Stack = tuple[Tensor, Tensor]
"""A of a batch's union ``[U, d_in]``, and B of it ``[d_out, U]``."""


def stack(params: Sequence[Tensor], dtype: torch.dtype) -> Stack:
    """The union of a batch's features: A of each, then B of each, side by side."""
    half = len(params) // 2
    a = torch.cat(tuple(params[:half]))
    b = torch.cat(tuple(params[half:]), dim=1)
    return a.to(dtype), b.to(dtype)


def mask(scale: Tensor, rows: Tensor, union: int) -> Tensor:
    """Each example's factor for every row of the union: ``[N, U]``."""
    return scale.new_zeros(scale.shape[0], union).scatter_add_(1, rows, scale)


def _own_a(
    params: Sequence[Tensor], rows: Tensor, blocks: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """A of each example's slots, ``[N, R, d_in]``.

    Args:
        rows: ``[N, R]``: rows of the union.
        blocks: the same pair by pair (see ``UnionPlan``), where it is known: each pair is then copied once, straight
            to its place, not first to the union.
    """
    own, first = params[: len(params) // 2], params[0]
    if blocks is None or len(blocks) > _MOST_BLOCKS:
        a = torch.cat(tuple(own)).to(dtype).index_select(0, rows.reshape(-1))
    else:
        pads = (first.new_zeros(-i, first.shape[1]) if i < 0 else own[i] for i in blocks)
        a = torch.cat(tuple(pads)).to(dtype)
    return a.view(*rows.shape, first.shape[1])


def _own_b(
    params: Sequence[Tensor], rows: Tensor, blocks: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """B of each example's slots, transposed, ``[N, R, d_out]`` (strided); otherwise as :func:`_own_a`."""
    own = params[len(params) // 2 :]
    if blocks is None or len(blocks) > _MOST_BLOCKS:
        b = torch.cat(tuple(own), dim=1).to(dtype).t().contiguous()
        return b.index_select(0, rows.reshape(-1)).view(*rows.shape, own[0].shape[0])
    pads = (own[0].new_zeros(own[0].shape[0], -i) if i < 0 else own[i] for i in blocks)
    b = torch.cat(tuple(pads), dim=1).to(dtype)
    return b.view(own[0].shape[0], *rows.shape).permute(1, 2, 0)


def _whole(
    params: Sequence[Tensor],
    scale: Tensor,
    rows: Tensor,
    strategy: str,
    dtype: torch.dtype,
    union: Stack | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[K, d_in]``, B ``[d_out, K]`` and factors ``[N, K]`` of what all examples are multiplied with."""
    a, b = stack(params, dtype) if union is None else union
    if strategy == "single":
        return a.index_select(0, rows[0]), b.index_select(1, rows[0]), scale
    return a, b, mask(scale, rows, a.shape[0]) if factor is None else factor


def routed_forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    strategy: str,
    params: Sequence[Tensor],
    *,
    blocks: Sequence[int] | None = None,
    factor: Tensor | None = None,
    union: Stack | None = None,
) -> tuple[Tensor, Tensor]:
    """The output ``[N, S, d_out]`` and the rank-space activations, for the inputs of :class:`RoutedLinear`.

    Args:
        x, kernel, bias, scale, rows, strategy, params: see :class:`RoutedLinear`.
        blocks: the rows pair by pair, if they are known.
        factor: :func:`mask`, if it was made before.
        union: :func:`stack`, if it was made before.
    """
    count, length, d_in = x.shape
    flat = x.reshape(count * length, d_in)
    y = torch.mm(flat, kernel) if bias is None else torch.addmm(bias, flat, kernel)
    if strategy == "gather":
        h = torch.bmm(x, _own_a(params, rows, blocks, x.dtype).transpose(1, 2))
        b = _own_b(params, rows, blocks, x.dtype)
        y.view(count, length, y.shape[1]).baddbmm_(h * scale[:, None, :], b)
    else:
        a, b, factor = _whole(params, scale, rows, strategy, x.dtype, union, factor)
        h = torch.mm(flat, a.t()).view(count, length, a.shape[0])
        y.addmm_((h * factor[:, None, :]).flatten(0, 1), b.t())
    return y.view(count, length, y.shape[1]), h


def routed_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    rows: Tensor,
    h: Tensor,
    strategy: str,
    params: Sequence[Tensor],
    *,
    need_x: bool,
    need_scale: bool,
    blocks: Sequence[int] | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the scale, of A ``[U, d_in]`` and of B transposed ``[U, d_out]``.

    Args:
        grad: of the output, ``[N, S, d_out]``, contiguous.
        h: what the forward gave.
        need_x, need_scale: which of the first two are wanted; None stands for the others.
        blocks, factor: as for :func:`routed_forward`.
    """
    count, length, d_in = x.shape
    flat, dy = x.reshape(count * length, d_in), grad.flatten(0, 1)
    total = sum(p.shape[0] for p in params[: len(params) // 2])
    d_scale = dx = None
    if strategy == "gather":
        index = rows.reshape(-1)
        # One copy of the rows at a time, and the largest tensor, dx, last: this is where memory peaks.
        dh = torch.bmm(grad, _own_b(params, rows, blocks, x.dtype).transpose(1, 2))
        if need_scale:
            d_scale = (dh * h).sum(1)
        each = torch.bmm((h * scale[:, None, :]).transpose(1, 2), grad).view(-1, dy.shape[1])
        db = each.new_zeros(total, dy.shape[1]).index_add_(0, index, each)
        dh = dh * scale[:, None, :]
        each = torch.bmm(dh.transpose(1, 2), x).view(-1, d_in)
        da = each.new_zeros(total, d_in).index_add_(0, index, each)
        del each
        if need_x:
            dx = torch.mm(dy, kernel.t()).view_as(x)
            dx.baddbmm_(dh, _own_a(params, rows, blocks, x.dtype))
        return dx, d_scale, da, db
    a, b, factor = _whole(params, scale, rows, strategy, x.dtype, None, factor)
    dh = torch.mm(dy, b).view(count, length, b.shape[1])
    if need_scale:
        d_factor = (dh * h).sum(1)
        d_scale = d_factor if strategy == "single" else d_factor.gather(1, rows)
    db = torch.mm((h * factor[:, None, :]).flatten(0, 1).t(), dy)
    flat_dh = (dh * factor[:, None, :]).flatten(0, 1)
    da = torch.mm(flat_dh.t(), flat)
    if need_x:
        dx = torch.mm(dy, kernel.t()).addmm_(flat_dh, a).view_as(x)
    if strategy == "single":
        da = da.new_zeros(total, d_in).index_add_(0, rows[0], da)
        db = db.new_zeros(total, dy.shape[1]).index_add_(0, rows[0], db)
    return dx, d_scale, da, db


class RoutedLinear(torch.autograd.Function):
    """y = x W + b + Σ_slots scale · B_slot (A_slot x), with a slot for every active rank of an example.

    Inputs: x ``[N, S, d_in]``; kernel ``[d_in, d_out]``; bias ``[d_out]`` or None; scale ``[N, R]`` (weight times
    s_f, 0 where a slot is unused); the plan of the batch, which has the slots' rows in the union; the strategy; then A
    ``[r, d_in]`` of each active feature, then B ``[d_out, r]`` of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        plan: DevicePlan,
        strategy: str,
        *params: Tensor,
    ) -> Tensor:
        y, h = routed_forward(
            x,
            kernel,
            bias,
            scale,
            plan.rows,
            strategy,
            params,
            blocks=plan.host.blocks,
            factor=plan.mask(x.dtype) if strategy == "masked" else None,
        )
        ctx.save_for_backward(x, kernel, scale, h, *params)
        ctx.strategy, ctx.plan = strategy, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, kernel, scale, h, *params = ctx.saved_tensors
        needs, plan = ctx.needs_input_grad, ctx.plan
        grad = grad.contiguous()
        dx, d_scale, da, db = routed_backward(
            grad,
            x,
            kernel,
            scale,
            plan.rows,
            h,
            ctx.strategy,
            params,
            need_x=needs[0],
            need_scale=needs[3],
            blocks=plan.host.blocks,
            factor=plan.mask(x.dtype) if ctx.strategy == "masked" else None,
        )
        flat, dy = x.reshape(-1, x.shape[-1]), grad.flatten(0, 1)
        d_kernel = torch.mm(flat.t(), dy) if needs[1] else None
        d_bias = dy.sum(0) if needs[2] else None
        # One dtype for all pairs of a layer, so that one conversion and one split serve them.
        ranks = [p.shape[0] for p in params[: len(params) // 2]]
        da, db = da.to(params[0].dtype), db.to(params[0].dtype)
        d_a = torch.split(da, ranks)
        if len(set(ranks)) == 1:
            # In the layout of the parameters, or each would be copied once more when it is accumulated.
            whole = db.view(len(ranks), ranks[0], db.shape[1]).transpose(1, 2).contiguous()
            d_b = whole.unbind(0)
        else:
            d_b = torch.split(db.t(), ranks, dim=1)
        return (dx, d_kernel, d_bias, d_scale, None, None, *d_a, *d_b)


def traced_linear(
    x: Tensor, base: Tensor, scale: Tensor, rows: Tensor, a: Tensor, b: Tensor, strategy: str
) -> Tensor:
    """The same sum in plain differentiable operations, for compilers that trace the model.

    Used where ``kernels`` has no operator for the device. Its cost grows with the registered features.

    Args:
        x: ``[N, S, d_in]``.
        base: the frozen layer's output, ``[N, S, d_out]``.
        scale: ``[N, R]``, 0 where a slot is unused.
        rows: int64 ``[N, R]``: rows of the bank.
        a: A of every registered feature, stacked ``[rows, d_in]``.
        b: B of every registered feature, transposed and stacked ``[rows, d_out]``.
        strategy: ``"gather"``, ``"masked"`` or ``"single"``.
    """
    if strategy == "gather":
        h = torch.bmm(x, a[rows].transpose(1, 2)) * scale[:, None, :]
        return base + torch.bmm(h, b[rows])
    if strategy == "single":
        h = torch.matmul(x, a[rows[0]].t()) * scale[:1, None, :]
        return base + torch.matmul(h, b[rows[0]])
    mask = torch.zeros(scale.shape[0], a.shape[0], dtype=scale.dtype, device=scale.device)
    mask = mask.scatter_add(1, rows, scale)
    return base + torch.matmul(torch.matmul(x, a.t()) * mask[:, None, :], b)
