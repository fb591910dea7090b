"""The routed linear map as one autograd function, in three interchangeable strategies.

The forward computes the frozen layer and adds every example's own sum onto it in place; the backward gives
gradients only to the features in the batch. Nothing of size [d_out, d_in] is made for an example. Saved for the
backward are the input and the rank-space activations; stacked rows are made again, since copying them is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flix.backends.torch.parameters import Carried, Values
from flix.backends.torch.placing import Placed

# Copying pair by pair costs about a microsecond for each, whatever its size.
_MOST_BLOCKS = 512


def stack(
    values: Values, d_in: int, d_out: int, dtype: torch.dtype, end: int = 0
) -> tuple[Tensor, Tensor]:
    """The union of a batch's features: A ``[U, d_in]`` and B transposed ``[U, d_out]``, and ``end`` rows of zeros."""
    made = (
        _union(side, size, end, dtype) for side, size in zip(values, (d_in, d_out), strict=True)
    )
    return tuple(made)  # type: ignore[return-value]


def _union(parts: Sequence[Tensor], size: int, end: int, dtype: torch.dtype) -> Tensor:
    """One side of the union; the rows of zeros at its end are what unused slots read."""
    flat = parts[0].dim() == 1
    zeros = (parts[0].new_zeros(end * size if flat else (end, size)),) if end else ()
    return torch.cat((*parts, *zeros)).view(-1, size).to(dtype)


def mask(scale: Tensor, rows: Tensor, union: int) -> Tensor:
    """Each example's factor for every row of the union: ``[N, U]``."""
    return scale.new_zeros(scale.shape[0], union + 1).scatter_add_(1, rows, scale)[:, :union]


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
        rows: ``[N, R]``: rows of the union; U of unused slots, which are zeros.
        blocks: the same pair by pair (see ``UnionPlan``), where it is known: each part is then copied once, straight
            to its place, not first to the union.
    """
    if blocks is None or len(blocks) > _MOST_BLOCKS:
        union = _union(parts, size, 1, dtype)
        # A lookup: to a watched forward, an index_select of as many slots as the batch has rows or tokens looks like
        # tokens being gathered.
        return torch.embedding(union, rows)
    # Rows that lack a feature fill up with as many zeros as another: made once, not for each of them.
    zeros = {i: parts[0].new_zeros(-i * size) for i in {*blocks} if i < 0}
    own = [parts[i] if i >= 0 else zeros[i] for i in blocks]
    return torch.cat(own).to(dtype).view(*rows.shape, size)


def finite(*values: Tensor | None) -> bool:
    """Whether all values are finite, as their sums tell; False while a CUDA graph is captured, which cannot say."""
    given = [value for value in values if value is not None]
    if given and given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    wide = torch.float64 if given and given[0].dtype == torch.float64 else torch.float32
    return all(math.isfinite(value.sum(dtype=wide).item()) for value in given)


def _scaled(h: Tensor, scale: Tensor, live: Tensor | None) -> Tensor:
    """Rank-space activations times their factors, which select: 0 times whatever is 0."""
    z = h * scale[:, None, :]
    return z if live is None else z.masked_fill_((scale == 0)[:, None, :], 0)


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
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, str]:
    """The output ``[N, S, d_out]``, the rank-space activations, and the strategy that gave them.

    Rows stay apart (docs/specification.md §1.5): gather reads each row's own ranks alone. Masked multiplies with
    others' too, by 0, which NaN and Inf survive; so where its result is not finite, gather computes it anew.

    Args:
        x, kernel, bias, scale, rows, strategy, values: see :class:`RoutedLinear`. In the place of a kernel may stand
            the base's output ``[N, S, d_out]``, where another forward gave it; it is not changed.
        blocks: the rows pair by pair, if they are known.
        factor: :func:`mask`, if it was made before.
        live: see ``Placed``; where it is given, the strategy is "gather".
    """
    if live is not None:
        strategy, blocks = "gather", None
    count, length, d_in = x.shape
    d_out = kernel.shape[-1]
    flat = x.reshape(count * length, d_in)
    # Itself, no view: models change it in place.
    y = (
        x.new_empty(count, length, d_out)
        if kernel.dim() == 2
        else kernel.clone(memory_format=torch.contiguous_format)
    )
    out = y.view(-1, d_out)
    if kernel.dim() == 2 and bias is None:
        torch.mm(flat, kernel, out=out)
    elif bias is not None:
        torch.addmm(bias, flat, kernel, out=out)
    if strategy == "gather":
        h = torch.bmm(x, _own(values[0], d_in, rows, blocks, x.dtype).transpose(1, 2))
        b = _own(values[1], d_out, rows if live is None else live, blocks, x.dtype)
        y.baddbmm_(_scaled(h, scale, live), b)
        return y, h, strategy
    a, b, factor = _shared(values, d_in, d_out, scale, rows, strategy, x.dtype, factor)
    h = torch.mm(flat, a.t()).view(count, length, a.shape[0])
    out.addmm_((h * factor[:, None, :]).flatten(0, 1), b)
    if strategy == "masked" and not finite(y):
        return routed_forward(x, kernel, bias, scale, rows, "gather", values, blocks=blocks)
    return y, h, strategy


def _shared(
    values: Values,
    d_in: int,
    d_out: int,
    scale: Tensor,
    rows: Tensor,
    strategy: str,
    dtype: torch.dtype,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[K, d_in]``, B ``[K, d_out]`` and factors ``[N, K]`` of what all examples are multiplied with."""
    a, b = stack(values, d_in, d_out, dtype)
    if strategy == "single":
        return torch.embedding(a, rows[0]), torch.embedding(b, rows[0]), scale
    return a, b, mask(scale, rows, a.shape[0]) if factor is None else factor


def routed_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor | None,
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
    live: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the scale, and of the pairs: A of the union ``[U, d_in]`` and then B ``[U, d_out]``, flat.

    Args:
        grad: of the output, ``[N, S, d_out]``, contiguous.
        kernel: ``[d_in, d_out]``; None where another forward gave the base's output, whose part of x's gradient is its
            own affair.
        h: what the forward gave.
        need_x, need_scale, need_pairs: which are wanted; None stands for the others.
        blocks, factor, live: as for :func:`routed_forward`.
    """
    if live is not None:
        blocks = None
    count, length, d_in = x.shape
    flat, dy = x.reshape(count * length, d_in), grad.flatten(0, 1)
    d_out = dy.shape[1]
    d_scale = dx = d_pairs = None
    if need_pairs:
        # A row before those of A and a row after those of B take what unused slots would add.
        end = 1 + sum(part.numel() for part in values[0]) // d_in
        room = x.new_zeros(end * (d_in + d_out))
        d_pairs = room[d_in:-d_out]
        da, db = room[: end * d_in].view(end, d_in), room[end * d_in :].view(end, d_out)
    if strategy == "gather":
        acting = rows if live is None else live
        index = acting.reshape(-1)
        # One copy of the rows at a time, and the largest tensor, dx, last: this is where memory peaks.
        dh = torch.bmm(grad, _own(values[1], d_out, rows, blocks, x.dtype).transpose(1, 2))
        if need_scale:
            d_scale = (dh * h).sum(1)
        if need_pairs:
            each = torch.bmm(_scaled(h, scale, live).transpose(1, 2), grad)
            db.index_add_(0, index, each.view(-1, d_out))
            del each
        dh = _scaled(dh, scale, live)
        if need_pairs:
            each = torch.bmm(dh.transpose(1, 2), x)
            da.index_add_(0, (index + 1) % end, each.view(-1, d_in))
            del each
        if need_x:
            own = _own(values[0], d_in, acting, blocks, x.dtype)
            if kernel is None:
                dx = torch.bmm(dh, own)
            else:
                dx = torch.mm(dy, kernel.t()).view_as(x).baddbmm_(dh, own)
        return dx, d_scale, d_pairs
    a, b, factor = _shared(values, d_in, d_out, scale, rows, strategy, x.dtype, factor)
    dh = torch.mm(dy, b.t()).view(count, length, b.shape[0])
    if need_scale:
        d_factor = (dh * h).sum(1)
        d_scale = d_factor if strategy == "single" else F.pad(d_factor, (0, 1)).gather(1, rows)
    flat_h = (h * factor[:, None, :]).flatten(0, 1)
    flat_dh = (dh * factor[:, None, :]).flatten(0, 1)
    if need_pairs and strategy == "single":
        da[1:].index_add_(0, rows[0], torch.mm(flat_dh.t(), flat))
        db.index_add_(0, rows[0], torch.mm(flat_h.t(), dy))
    elif need_pairs:
        torch.mm(flat_dh.t(), flat, out=da[1:])
        torch.mm(flat_h.t(), dy, out=db[:-1])
    if need_x:
        if kernel is None:
            dx = torch.mm(flat_dh, a).view_as(x)
        else:
            dx = torch.mm(dy, kernel.t()).addmm_(flat_dh, a).view_as(x)
    if strategy == "masked" and not finite(dx, d_pairs):
        h = torch.bmm(x, _own(values[0], d_in, rows, blocks, x.dtype).transpose(1, 2))
        return routed_backward(
            grad,
            x,
            kernel,
            scale,
            rows,
            h,
            "gather",
            values,
            need_x=need_x,
            need_scale=need_scale,
            need_pairs=need_pairs,
            blocks=blocks,
        )
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
        y, h, strategy = routed_forward(
            x,
            kernel,
            bias,
            scale,
            placed.rows,
            strategy,
            values,
            blocks=placed.host.blocks,
            factor=placed.mask(x.dtype) if strategy == "masked" else None,
            live=placed.live,
        )
        ctx.save_for_backward(x, kernel, bias, scale, carrier, h)
        ctx.strategy, ctx.placed, ctx.values = strategy, placed, values
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            return (*differentiable(ctx, grad), None, None, None)
        x, kernel, _, scale, carrier, h = ctx.saved_tensors
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
            live=placed.live,
        )
        flat, dy = x.reshape(-1, x.shape[-1]), grad.flatten(0, 1)
        d_kernel = torch.mm(flat.t(), dy) if needs[1] else None
        d_bias = dy.sum(0) if needs[2] else None
        if d_pairs is not None:
            d_pairs = d_pairs.to(carrier.device, carrier.dtype)
        return dx, d_kernel, d_bias, d_scale, d_pairs, None, None, None


def differentiable(ctx: Any, grad: Tensor) -> Iterator[Tensor | None]:
    """The gradients of :class:`RoutedLinear` as plain operations, which are differentiated again (``create_graph``)."""
    # Aliases: one input may be made of another, and only its direct part is wanted here.
    given: list[Any] = [None if v is None else v.view_as(v) for v in ctx.saved_tensors[:5]]
    x, kernel, bias, scale, carrier = given
    values: Values = ctx.values
    if carrier is not None:
        parts = Carried.apply(carrier, *values)  # type: ignore[no-untyped-call]
        values = parts[: len(values[0])], parts[len(values[0]) :]
    a, b = stack(values, x.shape[-1], kernel.shape[1], x.dtype, end=1)
    base = x @ kernel if bias is None else x @ kernel + bias
    y = traced_linear(x, base, scale.to(x.dtype), ctx.placed.rows, a, b, ctx.strategy)
    needs = ctx.needs_input_grad[:5]
    wanted = [v for v, need in zip(given, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return (next(found) if need else None for need in needs)


def traced_linear(
    x: Tensor, base: Tensor, scale: Tensor, rows: Tensor, a: Tensor, b: Tensor, strategy: str
) -> Tensor:
    """The same sum in plain differentiable operations, for compilers and other transforms that trace the model.

    Used where ``kernels`` has no operator. Its cost grows with the registered features. "masked" is "gather" here,
    which keeps rows apart whatever the values are, since nothing may depend on those.

    Args:
        x: ``[N, S, d_in]``.
        base: the frozen layer's output, ``[N, S, d_out]``.
        scale: ``[N, R]``, 0 where a slot is unused.
        rows: int64 ``[N, R]``: rows of the bank; of unused slots, the last.
        a: A of every registered feature, stacked, and a row of zeros ``[rows + 1, d_in]``.
        b: B of every registered feature, transposed and stacked, and a row of zeros ``[rows + 1, d_out]``.
        strategy: ``"gather"``, ``"masked"`` or ``"single"``.
    """
    if strategy == "single":
        scale, rows = scale[:1], rows[:1]
    own_a = torch.where(scale[..., None] == 0, a[rows].nan_to_num(), a[rows])
    return base + summed(torch.matmul(x, own_a.transpose(1, 2)), scale, b[rows])


def summed(h: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """Σ over slots of scale · h · B, differentiable: ``[N, S, d_out]`` of h ``[N, S, R]`` and B ``[N, R, d_out]``.

    A slot with the factor 0 adds nothing, whatever its values are, and its factor has a gradient all the same.
    """
    off, factor = (scale == 0)[..., None], scale[:, None, :]
    z = torch.where(off.transpose(1, 2), h.nan_to_num(), h) * factor
    return torch.matmul(z, torch.where(off, b.nan_to_num(), b))
