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

from flix.backends.torch.parameters import Values
from flix.backends.torch.placing import Placed

# Copying pair by pair costs about a microsecond for each, whatever its size.
_MOST_BLOCKS = 512


Stack = tuple[Tensor, Tensor]
"""A of a batch's union ``[U, d_in]``, and B of it transposed ``[U, d_out]``."""


def stack(values: Values, d_in: int, d_out: int, dtype: torch.dtype) -> Stack:
    """The union of a batch's features."""
    a, b = values
    return torch.cat(a).view(-1, d_in).to(dtype), torch.cat(b).view(-1, d_out).to(dtype)


def mask(scale: Tensor, rows: Tensor, union: int) -> Tensor:
    """Each example's factor for every row of the union: ``[N, U]``."""
    return scale.new_zeros(scale.shape[0], union).scatter_add_(1, rows, scale)


def _own(
    parts: Sequence[Tensor],
    size: int,
    rows: Tensor,
    blocks: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """One side of each example's slots, ``[N, R, size]``.

    Args:
        parts: of each feature of the union.
        rows: ``[N, R]``: rows of the union.
        blocks: the same pair by pair (see ``UnionPlan``), where it is known: each part is then copied once, straight
            to its place, not first to the union.
    """
    if blocks is None or len(blocks) > _MOST_BLOCKS:
        union = torch.cat(tuple(parts)).view(-1, size).to(dtype)
        return union.index_select(0, rows.reshape(-1)).view(*rows.shape, size)
    own = [parts[i] if i >= 0 else parts[0].new_zeros(-i * size) for i in blocks]
    return torch.cat(own).to(dtype).view(*rows.shape, size)


def _shared(
    values: Values,
    d_in: int,
    d_out: int,
    scale: Tensor,
    rows: Tensor,
    strategy: str,
    dtype: torch.dtype,
    union: Stack | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[K, d_in]``, B ``[K, d_out]`` and factors ``[N, K]`` of what all examples are multiplied with."""
    a, b = stack(values, d_in, d_out, dtype) if union is None else union
    if strategy == "single":
        return a.index_select(0, rows[0]), b.index_select(0, rows[0]), scale
    return a, b, mask(scale, rows, a.shape[0]) if factor is None else factor


def routed_forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    strategy: str,
    values: Values,
    *,
    blocks: Sequence[int] | None = None,
    factor: Tensor | None = None,
    union: Stack | None = None,
) -> tuple[Tensor, Tensor]:
    """The output ``[N, S, d_out]`` and the rank-space activations, for the inputs of :class:`RoutedLinear`.

    Args:
        x, kernel, bias, scale, rows, strategy, values: see :class:`RoutedLinear`.
        blocks: the rows pair by pair, if they are known.
        factor: :func:`mask`, if it was made before.
        union: :func:`stack`, if it was made before.
    """
    count, length, d_in = x.shape
    flat = x.reshape(count * length, d_in)
    y = torch.mm(flat, kernel) if bias is None else torch.addmm(bias, flat, kernel)
    d_out = y.shape[1]
    if strategy == "gather":
        h = torch.bmm(x, _own(values[0], d_in, rows, blocks, x.dtype).transpose(1, 2))
        b = _own(values[1], d_out, rows, blocks, x.dtype)
        y.view(count, length, d_out).baddbmm_(h * scale[:, None, :], b)
    else:
        a, b, factor = _shared(values, d_in, d_out, scale, rows, strategy, x.dtype, union, factor)
        h = torch.mm(flat, a.t()).view(count, length, a.shape[0])
        y.addmm_((h * factor[:, None, :]).flatten(0, 1), b)
    return y.view(count, length, d_out), h


def routed_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    rows: Tensor,
    h: Tensor,
    strategy: str,
    values: Values,
    *,
    need_x: bool,
    need_scale: bool,
    need_pairs: bool = True,
    blocks: Sequence[int] | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the scale, and of the pairs: A of the union ``[U, d_in]`` and then B ``[U, d_out]``, flat.

    Args:
        grad: of the output, ``[N, S, d_out]``, contiguous.
        h: what the forward gave.
        need_x, need_scale, need_pairs: which are wanted; None stands for the others.
        blocks, factor: as for :func:`routed_forward`.
    """
    count, length, d_in = x.shape
    flat, dy = x.reshape(count * length, d_in), grad.flatten(0, 1)
    d_out = dy.shape[1]
    d_scale = dx = d_pairs = None
    if need_pairs:
        d_pairs = x.new_zeros(sum(part.numel() for side in values for part in side))
        total = d_pairs.numel() // (d_in + d_out)
        da, db = d_pairs[: total * d_in].view(-1, d_in), d_pairs[total * d_in :].view(-1, d_out)
    if strategy == "gather":
        index = rows.reshape(-1)
        # One copy of the rows at a time, and the largest tensor, dx, last: this is where memory peaks.
        dh = torch.bmm(grad, _own(values[1], d_out, rows, blocks, x.dtype).transpose(1, 2))
        if need_scale:
            d_scale = (dh * h).sum(1)
        if need_pairs:
            each = torch.bmm((h * scale[:, None, :]).transpose(1, 2), grad)
            db.index_add_(0, index, each.view(-1, d_out))
            del each
        dh = dh * scale[:, None, :]
        if need_pairs:
            each = torch.bmm(dh.transpose(1, 2), x)
            da.index_add_(0, index, each.view(-1, d_in))
            del each
        if need_x:
            dx = torch.mm(dy, kernel.t()).view_as(x)
            dx.baddbmm_(dh, _own(values[0], d_in, rows, blocks, x.dtype))
        return dx, d_scale, d_pairs
    a, b, factor = _shared(values, d_in, d_out, scale, rows, strategy, x.dtype, None, factor)
    dh = torch.mm(dy, b.t()).view(count, length, b.shape[0])
    if need_scale:
        d_factor = (dh * h).sum(1)
        d_scale = d_factor if strategy == "single" else d_factor.gather(1, rows)
    flat_h = (h * factor[:, None, :]).flatten(0, 1)
    flat_dh = (dh * factor[:, None, :]).flatten(0, 1)
    if need_pairs and strategy == "single":
        da.index_add_(0, rows[0], torch.mm(flat_dh.t(), flat))
        db.index_add_(0, rows[0], torch.mm(flat_h.t(), dy))
    elif need_pairs:
        torch.mm(flat_dh.t(), flat, out=da)
        torch.mm(flat_h.t(), dy, out=db)
    if need_x:
        dx = torch.mm(dy, kernel.t()).addmm_(flat_dh, a).view_as(x)
    return dx, d_scale, d_pairs


class RoutedLinear(torch.autograd.Function):
    """y = x W + b + Σ_slots scale · B_slot (A_slot x), with a slot for every active rank of an example.

    Inputs: x ``[N, S, d_in]``; kernel ``[d_in, d_out]``; bias ``[d_out]`` or None; scale ``[N, R]`` (weight times
    s_f, 0 where a slot is unused); the layer's carrier (see ``parameters``) or None; the batch's placing, which has
    the slots' rows in the union; the strategy; and the parts of A and B of each active feature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        carrier: Tensor | None,
        placed: Placed,
        strategy: str,
        values: Values,
    ) -> Tensor:
        y, h = routed_forward(
            x,
            kernel,
            bias,
            scale,
            placed.rows,
            strategy,
            values,
            blocks=placed.host.blocks,
            factor=placed.mask(x.dtype) if strategy == "masked" else None,
        )
        ctx.save_for_backward(x, kernel, scale, h)
        ctx.strategy, ctx.placed, ctx.values = strategy, placed, values
        ctx.like = None if carrier is None else (carrier.device, carrier.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, kernel, scale, h = ctx.saved_tensors
        needs, placed = ctx.needs_input_grad, ctx.placed
        grad = grad.contiguous()
        dx, d_scale, d_pairs = routed_backward(
            grad,
            x,
            kernel,
            scale,
            placed.rows,
            h,
            ctx.strategy,
            ctx.values,
            need_x=needs[0],
            need_scale=needs[3],
            need_pairs=needs[4],
            blocks=placed.host.blocks,
            factor=placed.mask(x.dtype) if ctx.strategy == "masked" else None,
        )
        flat, dy = x.reshape(-1, x.shape[-1]), grad.flatten(0, 1)
        d_kernel = torch.mm(flat.t(), dy) if needs[1] else None
        d_bias = dy.sum(0) if needs[2] else None
        if d_pairs is not None:
            d_pairs = d_pairs.to(*ctx.like)
        return dx, d_kernel, d_bias, d_scale, d_pairs, None, None, None


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
