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
from flix.core.errors import ConfigError


def _where(strategy: str) -> Any:
    """The module that computes a strategy; the kernels' imports Triton."""
    if strategy != "fused":
        return host
    from flix.backends.torch.kernels import launch

    return launch


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
        return _where(strategy).forward(x, kernel, bias, scale, rows, a, b, strategy)  # type: ignore[no-any-return]


@routed_linear.register_fake
def _(x: Tensor, kernel: Tensor, bias: Any, scale: Any, rows: Tensor, *_: Any) -> tuple[Any, Any]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((*x.shape[:2], kernel.shape[1])),
        x.new_empty((*x.shape[:2], rows.shape[1]), dtype=wide),
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
    given = (dy, x, kernel, scale, rows, order, starts, h, a, b, strategy, need_x, need_scale)
    with torch.autocast(x.device.type, enabled=False):
        return _where(strategy).backward(*given)  # type: ignore[no-any-return]


@routed_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, kernel: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, a, _, _, _, need_scale = rest
    bank, dtype = sum(p.shape[0] for p in a), a[0].dtype
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
    if torch.is_grad_enabled():
        raise ConfigError(
            f"gradients of gradients (create_graph=True) are not offered for a compiled model, nor by strategy "
            f"{ctx.strategy!r} of the kernels; use the eager model with strategy='gather'"
        )
    if dy is None:
        return (None,) * 7 + ([None] * len(a), [None] * len(a), None)
    need_x, need_kernel, need_bias, need_scale = ctx.needs_input_grad[:4]
    dx, d_scale, d_a, d_b = routed_linear_backward(
        dy, x, kernel, scale, rows, order, starts, h, a, b, ctx.strategy, need_x, need_scale
    )
    flat, flat_dy = x.reshape(-1, x.shape[2]), dy.reshape(-1, dy.shape[2])
    ranks = [p.shape[0] for p in a]
    return (
        dx if need_x else None,
        flat.t() @ flat_dy if need_kernel else None,
        flat_dy.sum(0) if need_bias else None,
        d_scale if need_scale else None,
        *(None, None, None),
        list(torch.split(d_a, ranks)),
        list(torch.split(d_b, ranks)),
        None,
    )


routed_linear.register_autograd(_backward, setup_context=_setup)
