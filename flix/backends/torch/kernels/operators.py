"""The operators, as torch knows them: ``flix::routed_linear`` and its backward.

They compute one sum on every device: with Triton kernels for the strategy ``"fused"``, in host code for the others
(CPU only). Compilers keep them whole and know their shapes from the fakes below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flix.backends.torch.kernels import host


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("flix::routed_linear", mutates_args=())
def routed_linear(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
) -> tuple[Tensor, Tensor]:
    """y = x W + b + Σ_slots scale · B_row (A_row x), with slots by row of the routing.

    Args:
        x: ``[N, S, d_in]``.
        kernel: ``[d_in, d_out]``, of x's dtype, any strides.
        bias: ``[d_out]`` or None.
        scale: ``[N, R]``, float32 (float64 for a float64 x): weight times s_f, 0 where a slot is unused.
        rows: int32 ``[N, R]``: the slot's row in the bank, -1 where unused. A feature's rows fill
            consecutive slots.
        order, starts: the slots of each bank row, as ``routes`` gives them; may be empty where no gradient is
            wanted, and for strategies other than ``"fused"``.
        a, b: the bank: A ``[r, d_in]`` and B transposed ``[r, d_out]`` of its features. What no row uses costs nothing
            in the forward; the backward gives zeros for it.
        strategy: ``"fused"``; on a CPU also ``"gather"``, ``"masked"`` or ``"single"``.

    Returns:
        y ``[N, S, d_out]``, and the rank-space activations that the backward wants ``[N, S, R]``.
    """
    with torch.autocast(x.device.type, enabled=False):
        if strategy == "fused":
            from flix.backends.torch.kernels import launch

            return launch.forward(x, kernel, bias, scale, rows, list(a), list(b))
        return host.forward(x, kernel, bias, scale, rows, a, b, strategy)


@routed_linear.register_fake
def _(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
) -> tuple[Tensor, Tensor]:
    count, length, _ = x.shape
    return (
        x.new_empty((count, length, kernel.shape[1])),
        x.new_empty((count, length, rows.shape[1]), dtype=_wide(x)),
    )


@torch.library.custom_op("flix::routed_linear_backward", mutates_args=())
def routed_linear_backward(
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
    """Gradients of x, of the scale, of A ``[bank rows, d_in]`` and of B transposed ``[bank rows, d_out]``.

    What is not needed has no meaning.
    """
    with torch.autocast(x.device.type, enabled=False):
        if strategy == "fused":
            from flix.backends.torch.kernels import launch

            return launch.backward(
                dy,
                x,
                kernel,
                scale,
                rows,
                order,
                starts,
                h,
                list(a),
                list(b),
                need_x=need_x,
                need_scale=need_scale,
            )
        return host.backward(
            dy,
            x,
            kernel,
            scale,
            rows,
            h,
            a,
            b,
            strategy,
            need_x=need_x,
            need_scale=need_scale,
        )


@routed_linear_backward.register_fake
def _(
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
    bank = sum(p.shape[0] for p in a)
    dtype = a[0].dtype
    return (
        x.new_empty(x.shape),
        scale.new_empty(scale.shape if need_scale else 0),
        x.new_empty((bank, x.shape[2]), dtype=dtype),
        x.new_empty((bank, kernel.shape[1]), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernel, _, scale, rows, order, starts, a, b, strategy = inputs
    ctx.save_for_backward(x, kernel, scale, rows, order, starts, output[1], *a, *b)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.strategy = strategy


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, kernel, scale, rows, order, starts, h, *params = ctx.saved_tensors
    a, b = params[: len(params) // 2], params[len(params) // 2 :]
    nothing = [None] * len(a)
    if dy is None:
        return (None,) * 7 + (nothing, nothing, None)
    needs = ctx.needs_input_grad
    dx, d_scale, d_a, d_b = routed_linear_backward(
        dy,
        x,
        kernel,
        scale,
        rows,
        order,
        starts,
        h,
        a,
        b,
        ctx.strategy,
        needs[0],
        needs[3],
    )
    flat, flat_dy = x.reshape(-1, x.shape[2]), dy.reshape(-1, dy.shape[2])
    ranks = [p.shape[0] for p in a]
    return (
        dx if needs[0] else None,
        flat.t() @ flat_dy if needs[1] else None,
        flat_dy.sum(0) if needs[2] else None,
        d_scale if needs[3] else None,
        None,
        None,
        None,
        list(torch.split(d_a, ranks)),
        list(torch.split(d_b, ranks)),
        None,
    )


routed_linear.register_autograd(_backward, setup_context=_setup)
