"""The kernels under eager autograd: no dispatcher, and no tensor a feature, stands between a layer and its launches.

In a model of a hundred layers those cost more than the kernels themselves; ``operators`` is for compilers, which do
not pay them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flix.backends.torch import added
from flix.backends.torch.kernels import launch
from flix.backends.torch.kernels.tables import layer_table
from flix.backends.torch.parameters import InForce
from flix.backends.torch.placing import Placed
from flix.backends.torch.sums import differentiable


class FusedLinear(torch.autograd.Function):
    """:class:`flix.backends.torch.sums.RoutedLinear` by the fused kernels.

    Inputs: x ``[N, S, d_in]``; kernel ``[d_in, d_out]``; bias ``[d_out]`` or None; scale ``[N, R]``, float32; the
    layer's carrier or None; the batch's placing; the vectors of its features; and the layer's place.
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
        found: InForce,
        place: int,
    ) -> Tensor:
        table = layer_table(found, place, placed.active, x.device)
        y, h = launch.outputs(x, kernel, bias, scale, placed.grouped()[0], table)
        ctx.save_for_backward(x, kernel, bias, scale, carrier, h)
        ctx.placed, ctx.table = placed, table
        ctx.found, ctx.place = found, place  # the table points into what it holds
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            x = ctx.saved_tensors[0]
            ctx.values, ctx.strategy = (
                ctx.found.values(ctx.placed.active, ctx.place, x.device),
                "gather",
            )
            return (*differentiable(ctx, dy), None, None, None)
        x, kernel, _, scale, carrier, h = ctx.saved_tensors
        need_x, need_kernel, need_bias, *needs = ctx.needs_input_grad[:5]
        dx, d_scale, d_pairs = _gradients(ctx, dy, x, kernel, scale, carrier, h, need_x, *needs)
        flat, flat_dy = x.reshape(-1, x.shape[2]), dy.reshape(-1, dy.shape[2])
        return (
            dx,
            flat.t() @ flat_dy if need_kernel else None,
            flat_dy.sum(0) if need_bias else None,
            d_scale,
            d_pairs,
            *(None, None, None),
        )


class FusedAround(torch.autograd.Function):
    """:class:`flix.backends.torch.added.Added` by the fused kernels.

    Inputs: x ``[N, S, d_in]``; the layer's own output ``[N, S, d_out]``, in the dtype of x; and FusedLinear's others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        scale: Tensor,
        carrier: Tensor | None,
        placed: Placed,
        found: InForce,
        place: int,
    ) -> Tensor:
        table = layer_table(found, place, placed.active, x.device)
        y, h = launch.outputs(x, None, None, scale, placed.grouped()[0], table, base)
        ctx.save_for_backward(x, scale, carrier, h)
        ctx.placed, ctx.table = placed, table
        ctx.found, ctx.place = found, place
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            device = ctx.saved_tensors[0].device
            ctx.values = ctx.found.values(ctx.placed.active, ctx.place, device)
            ctx.strategy = "gather"
            return (*added.differentiable(ctx, dy), None, None, None)
        x, scale, carrier, h = ctx.saved_tensors
        need_x, need_base, *needs = ctx.needs_input_grad[:4]
        dx, d_scale, d_pairs = _gradients(ctx, dy, x, None, scale, carrier, h, need_x, *needs)
        return dx, dy if need_base else None, d_scale, d_pairs, None, None, None


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    kernel: Tensor | None,
    scale: Tensor,
    carrier: Tensor | None,
    h: Tensor,
    need_x: bool,
    need_scale: bool,
    need_pairs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, scale and the pairs, None where they are not needed."""
    table, room, pairs = ctx.table, None, None
    if need_pairs:
        d_in, d_out = x.shape[2], dy.shape[2]
        room = x.new_empty(table.rows * (d_in + d_out), dtype=table.dtype)
        a, b = room.split_with_sizes((table.rows * d_in, table.rows * d_out))
        pairs = a.view(-1, d_in), b.view(-1, d_out)
    given = x, kernel, scale, *ctx.placed.grouped(), h, table, pairs, need_x, need_scale
    dx, d_scale = launch.gradients(dy, *given)
    own = None if room is None else room.to(carrier.device, carrier.dtype)  # type: ignore[union-attr]
    return dx if need_x else None, d_scale, own
