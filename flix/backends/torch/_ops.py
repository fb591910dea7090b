"""The routed linear map as one autograd function, in three interchangeable strategies.

The forward computes the frozen layer and adds every example's own sum onto it in place; the backward gives
gradients only to the features in the batch. Nothing of size [d_out, d_in] is made for an example. Saved for the
backward are the input and the rank-space activations; stacked rows are made again, since copying them is cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _stack(params: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A of the union ``[U, d_in]`` and B of the union, transposed, ``[U, d_out]``."""
    half = len(params) // 2
    a = torch.cat(params[:half]).to(dtype)
    b = torch.cat(params[half:], dim=1).to(dtype)
    return a, b.t().contiguous()


def _mask(scale: Tensor, rows: Tensor, union: int) -> Tensor:
    """Each example's factor for every row of the union: ``[N, U]``."""
    return scale.new_zeros(scale.shape[0], union).scatter_add_(1, rows, scale)


class RoutedLinear(torch.autograd.Function):
    """y = x W + b + Σ_slots scale · B_slot (A_slot x), with a slot for every active rank of an example.

    Inputs: x ``[N, S, d_in]``; kernel ``[d_in, d_out]``; bias ``[d_out]`` or None; scale ``[N, R]`` (weight times
    s_f, 0 where a slot is unused); rows int64 ``[N, R]``, the slots' rows in the union; the strategy; then A
    ``[r, d_in]`` of each active feature, then B ``[d_out, r]`` of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        rows: Tensor,
        strategy: str,
        *params: Tensor,
    ) -> Tensor:
        count, length, d_in = x.shape
        flat = x.reshape(count * length, d_in)
        y = torch.mm(flat, kernel) if bias is None else torch.addmm(bias, flat, kernel)
        a, b = _stack(params, x.dtype)
        if strategy == "gather":
            index = rows.reshape(-1)
            a = a.index_select(0, index).view(count, rows.shape[1], d_in)
            b = b.index_select(0, index).view(count, rows.shape[1], y.shape[1])
            h = torch.bmm(x, a.transpose(1, 2))
            y.view(count, length, y.shape[1]).baddbmm_(h * scale[:, None, :], b)
        else:
            if strategy == "single":
                a, b, factor = a[rows[0]], b[rows[0]], scale
            else:
                factor = _mask(scale, rows, a.shape[0])
            h = torch.mm(flat, a.t()).view(count, length, a.shape[0])
            y.addmm_((h * factor[:, None, :]).flatten(0, 1), b)
        ctx.save_for_backward(x, kernel, scale, rows, h, *params)
        ctx.strategy = strategy
        return y.view(count, length, y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, kernel, scale, rows, h, *params = ctx.saved_tensors
        needs = ctx.needs_input_grad
        count, length, d_in = x.shape
        grad = grad.contiguous()
        flat, dy = x.reshape(count * length, d_in), grad.flatten(0, 1)
        a, b = _stack(tuple(params), x.dtype)
        union = a.shape[0]
        dx = torch.mm(dy, kernel.t()) if needs[0] else None
        d_kernel = torch.mm(flat.t(), dy) if needs[1] else None
        d_bias = dy.sum(0) if needs[2] else None
        if ctx.strategy == "gather":
            index = rows.reshape(-1)
            a = a.index_select(0, index).view(count, rows.shape[1], d_in)
            b = b.index_select(0, index).view(count, rows.shape[1], dy.shape[1])
            dh = torch.bmm(grad, b.transpose(1, 2))
            d_scale = (dh * h).sum(1) if needs[3] else None
            db = torch.bmm((h * scale[:, None, :]).transpose(1, 2), grad)
            dh = dh * scale[:, None, :]
            da = torch.bmm(dh.transpose(1, 2), x)
            if dx is not None:
                dx.view(count, length, d_in).baddbmm_(dh, a)
            da = da.new_zeros(union, d_in).index_add_(0, index, da.view(-1, d_in))
            db = db.new_zeros(union, dy.shape[1]).index_add_(0, index, db.view(-1, dy.shape[1]))
        else:
            if ctx.strategy == "single":
                a, b, factor = a[rows[0]], b[rows[0]], scale
            else:
                factor = _mask(scale, rows, union)
            dh = torch.mm(dy, b.t()).view(count, length, b.shape[0])
            d_scale = None
            if needs[3]:
                d_factor = (dh * h).sum(1)
                d_scale = d_factor if ctx.strategy == "single" else d_factor.gather(1, rows)
            db = torch.mm((h * factor[:, None, :]).flatten(0, 1).t(), dy)
            flat_dh = (dh * factor[:, None, :]).flatten(0, 1)
            da = torch.mm(flat_dh.t(), flat)
            if dx is not None:
                dx.addmm_(flat_dh, a)
            if ctx.strategy == "single":
                da = da.new_zeros(union, d_in).index_add_(0, rows[0], da)
                db = db.new_zeros(union, dy.shape[1]).index_add_(0, rows[0], db)
        half = len(params) // 2
        # One dtype for all pairs of a layer, so that one conversion and one split serve them.
        ranks = [p.shape[0] for p in params[:half]]
        d_a = torch.split(da.to(params[0].dtype), ranks)
        d_b = torch.split(db.to(params[0].dtype).t(), ranks, dim=1)
        return (
            dx.view_as(x) if dx is not None else None,
            d_kernel,
            d_bias,
            d_scale,
            None,
            None,
            *d_a,
            *d_b,
        )


def traced_linear(
    x: Tensor, base: Tensor, scale: Tensor, rows: Tensor, a: Tensor, b: Tensor, strategy: str
) -> Tensor:
    """The same sum in plain differentiable operations, for compilers that trace the model.

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
